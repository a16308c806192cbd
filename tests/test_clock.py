"""What a network's hooks tell belongs to a thread of execution: the time of T-LoRA, that samples are drawn; and so does
what a layer draws for a training step. Threads meet at barriers in the middle of their passes: nothing is by chance."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from helpers_numeric import assert_close, make_input, make_layer
from tiny_parts import inputs, randomise, sd_unet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import networks.lora
import networks.lycoris
from networks.algos import ALGOS
from networks.algos.clock import Clock, Moment, _Thread
from networks.archs.spec import Timestep
from networks.layers.adapted import AdaptedLayer
from networks.layers.dropout import Dropouts
from networks.layers.runtime import Runtime
from networks.layers.site import Site
from networks.network.watching import TimeReader, Watch
from networks.tensors.geometry import Geometry

DIM = 4
PATIENCE = 300  # seconds, for threads that wait for each other


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each of the calls gives, every one in a new thread."""
    found: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            found[i] = calls[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


def elsewhere(call: Callable[[], Any]) -> Any:
    return at_once([call])[0]


@contextmanager
def meeting(module: nn.Module, threads: int) -> Iterator[None]:
    """All of them are in the middle of their passes at once."""
    barrier = threading.Barrier(threads)

    def wait(module: nn.Module, args: Any) -> None:
        barrier.wait(PATIENCE)

    hook = module.register_forward_pre_hook(wait)
    yield
    hook.remove()


def made(unet: nn.Module, **arguments: str) -> Any:
    network = networks.lycoris.create_network(
        1.0, DIM, 2, None, None, unet, algo="tlora", preset="attn-mlp", **arguments
    )
    network.apply_to(None, unet, False, True)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return network


def drawn(unet: nn.Module, time: int) -> Tensor:
    latents, _, text = inputs()
    with torch.no_grad():
        return unet(latents, torch.tensor([time, time]), text).sample


# -- threads


def test_twenty_threads_at_different_timesteps() -> None:
    unet = sd_unet()
    network = made(unet)
    times = [1000 * i // 19 for i in range(20)]
    alone = [drawn(unet, time) for time in times]
    assert not any(torch.equal(alone[0], other) for other in alone[10:])

    def visit(time: int) -> tuple[Tensor, Any, bool]:
        return drawn(unet, time), network.clock.now.time, network.runtime.sampling

    for _ in range(3):
        with meeting(unet.mid_block, 20):
            found = at_once([lambda time=time: visit(time) for time in times])
        assert sum(not torch.equal(a, b) for (a, _, _), b in zip(found, alone, strict=True)) == 0
        assert all(time is None and not sampling for _, time, sampling in found), "what was before is in force again"


def test_twenty_threads_in_training_and_drawing() -> None:
    """Half of them with gradients through checkpoints, each with the backward of its own."""
    unet = sd_unet()
    network = made(unet)
    unet.enable_gradient_checkpointing(lambda f, *a: checkpoint(f, *a, use_reentrant=False))
    unet.train()
    parameters = list(network.parameters())

    def trained(time: int) -> list[Tensor]:
        latents, _, text = inputs()
        y = unet(latents.requires_grad_(), torch.tensor([time, 1000 - time]), text).sample
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [latents, *parameters])]

    calls: list[Callable[[], list[Tensor]]] = []
    for i in range(20):
        time = 1000 * i // 19
        calls.append((lambda time=time: trained(time)) if i % 2 else (lambda time=time: [drawn(unet, time)]))
    alone = [call() for call in calls]
    for found, wanted in zip(at_once(calls), alone, strict=True):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))


def test_two_pipelines_in_one_process() -> None:
    one, two = sd_unet(), sd_unet()
    made(one), made(two)
    latents, _, text = inputs()
    wanted = one(latents, torch.tensor([900, 900]), text).sample
    inner: list[Tensor] = []

    def other(module: nn.Module, args: Any) -> None:
        inner.append(two(latents, torch.tensor([10, 10]), text).sample)

    hook = one.mid_block.register_forward_pre_hook(other)
    assert torch.equal(one(latents, torch.tensor([900, 900]), text).sample, wanted)
    hook.remove()
    assert torch.equal(inner[0], two(latents, torch.tensor([10, 10]), text).sample)


def test_a_thread_that_was_told_nothing_sees_the_last_pass_with_gradients() -> None:
    clock, seen = Clock(), []
    assert clock.now.time is None
    for time in (torch.tensor([0.25]), torch.tensor([0.5])):
        clock.enter(time)
        with torch.no_grad():
            clock.leave(clock.enter(torch.tensor([0.75])))
        seen.append(elsewhere(lambda: clock.now.time))
        assert clock.now.time is time
    assert [float(time) for time in seen] == [0.25, 0.5]


def test_nothing_is_left_of_threads_that_end() -> None:
    """As in a server."""
    unet = sd_unet()
    network = made(unet)
    alive: list[weakref.ref[Moment]] = []

    def visit(time: int) -> None:
        drawn(unet, time)
        network.clock.set_mask(torch.ones(DIM))
        alive.append(weakref.ref(network.clock.now))

    for i in range(40):
        elsewhere(lambda i=i: visit(25 * i))
    gc.collect()
    assert not any(moment() is not None for moment in alive)
    assert sum(isinstance(one, _Thread) for one in gc.get_objects()) <= 4  # this thread's alone, of each clock
    latents, _, text = inputs()
    for _ in range(5):  # nor of backward passes
        unet(latents.requires_grad_(), 500, text).sample.sum().backward()
    gc.collect()
    assert len(network.clock._backwards) <= 1


# -- the backward in another thread, as on CUDA


def passes(reentrant: bool | None, times: Sequence[Sequence[int]], deep: bool = False) -> tuple[Any, Any, list[Tensor]]:
    """A network and its model, and the outputs of a pass at each of the times, one picture in each; None = no
    checkpoints, `deep` = checkpoints in checkpoints."""
    unet = sd_unet()
    torch.manual_seed(0)
    network = made(unet)
    if reentrant is not None:
        unet.enable_gradient_checkpointing(lambda f, *a: checkpoint(f, *a, use_reentrant=reentrant))
        unet.train()
    if deep:
        for name in ("down_blocks.0", "up_blocks.1"):
            block = unet.get_submodule(name)
            for inner in block.attentions:
                own = inner.forward
                inner.forward = partial(in_checkpoint, own, reentrant)
    latents, _, text = inputs(len(times))
    latents.requires_grad_()
    outputs = []
    for i, time in enumerate(times):
        outputs.append(unet(latents[i : i + 1], torch.tensor(time), text[i : i + 1]).sample)
    return network, unet, outputs


def in_checkpoint(own: Callable[..., Any], reentrant: bool, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(lambda *a: own(*a, **kwargs), *args, use_reentrant=reentrant)


def gradients(network: nn.Module) -> list[Tensor]:
    return [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.sweep(2)
@pytest.mark.parametrize("deep", [False, True], ids=["one level", "two levels"])
@pytest.mark.parametrize("times", [[[900]], [[900], [10]], [[10], [600], [900]]], ids=str)
@pytest.mark.parametrize("reentrant", (True, False))
def test_recomputation_in_another_thread_sees_its_own_pass(reentrant: bool, times: list[list[int]], deep: bool) -> None:
    """Samples are drawn in between, and after the backward."""
    network, _, outputs = passes(None, times)
    torch.cat(outputs).square().sum().backward()
    wanted = gradients(network)
    network, unet, outputs = passes(reentrant, times, deep)
    alone = drawn(unet, 300)
    elsewhere(lambda: drawn(unet, 700))
    elsewhere(lambda: torch.cat(outputs).square().sum().backward())
    found = gradients(network)
    assert len(found) == len(wanted) and all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True)
    )
    assert torch.equal(drawn(unet, 300), alone)
    assert torch.equal(elsewhere(lambda: drawn(unet, 300)), alone)


def test_backward_passes_in_several_threads_at_once() -> None:
    """The passes were made here: those threads were told nothing."""
    times = [[900], [10], [400], [650]]
    unet = sd_unet()
    network = made(unet)
    unet.enable_gradient_checkpointing(lambda f, *a: checkpoint(f, *a, use_reentrant=False))
    unet.train()
    latents, _, text = inputs(1)
    parameters = list(network.parameters())

    def output(time: list[int]) -> Tensor:
        return unet(latents, torch.tensor(time), text).sample.square().sum()

    wanted = [torch.autograd.grad(output(time), parameters) for time in times]
    losses = [output(time) for time in times]
    with meeting(unet.up_blocks[0].resnets[0], len(times)):  # which is computed again when all have begun
        found = at_once([lambda loss=loss: torch.autograd.grad(loss, parameters) for loss in losses])
    for one, expected in zip(found, wanted, strict=True):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one, expected, strict=True))


def test_the_next_pass_after_a_failed_backward() -> None:
    _, unet, outputs = passes(False, [[900], [10]])
    alone = drawn(unet, 300)
    outputs[0].register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        torch.cat(outputs).sum().backward()
    assert torch.equal(drawn(unet, 300), alone)


@pytest.mark.parametrize("drawing", [True, False], ids=["drawing", "training"])
def test_the_next_pass_after_a_failed_one(drawing: bool) -> None:
    unet = sd_unet()
    torch.manual_seed(0)
    network = made(unet)
    latents, _, text = inputs()
    unet(latents, torch.tensor([900, 10]), text)
    before = network.clock.now
    hook = unet.mid_block.register_forward_pre_hook(lambda module, args: 1 / 0)
    with torch.set_grad_enabled(not drawing), pytest.raises(ZeroDivisionError):
        unet(latents, torch.tensor([300, 300]), text)
    hook.remove()
    assert (network.clock.now is before) is drawing and not network.runtime.sampling
    other = sd_unet()
    torch.manual_seed(0)
    made(other)
    assert torch.equal(drawn(unet, 600), drawn(other, 600))


# -- masks by hand, and groups


def test_a_mask_by_hand_belongs_to_the_thread_and_to_its_passes() -> None:
    unet = sd_unet()
    network = made(unet)
    whole, least = drawn(unet, 0), drawn(unet, 1000)
    network.set_timestep_mask(torch.tensor([1.0, 0, 0, 0]), 0)
    assert torch.equal(drawn(unet, 1000), least) and not torch.allclose(drawn(unet, 0), whole)
    assert torch.equal(elsewhere(lambda: drawn(unet, 0)), whole), "another thread has the time"
    network.set_timestep_mask(None)
    assert torch.equal(drawn(unet, 0), whole)
    assert elsewhere(lambda: network.set_timestep_mask(torch.zeros(DIM))) is None
    assert torch.equal(drawn(unet, 0), whole)


@pytest.mark.parametrize("reentrant", (True, False))
def test_each_pass_goes_back_with_its_own_mask(reentrant: bool) -> None:
    latents, _, text = inputs(2)
    masks = [torch.tensor([1.0, 0, 0, 0]), torch.tensor([1.0, 1, 0, 1])]
    found = []
    for way in ("plain", "checkpoint"):
        unet = sd_unet()
        torch.manual_seed(0)
        network = made(unet)
        if way == "checkpoint":
            unet.enable_gradient_checkpointing(lambda f, *a: checkpoint(f, *a, use_reentrant=reentrant))
            unet.train()
        outputs = []
        for i, mask in enumerate(masks):
            network.set_timestep_mask(mask)
            outputs.append(unet(latents[i : i + 1].clone().requires_grad_(), 500, text[i : i + 1]).sample)
        torch.cat(outputs).square().sum().backward()
        found.append([p.grad for p in network.parameters()])
        assert network.clock.now.mask is not None
        again = unet(latents[:1], 500, text[:1]).sample  # the mask which was set last holds on
        torch.testing.assert_close(unet(latents[1:], 500, text[1:]).sample, outputs[1])
        assert not torch.equal(again, outputs[0])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_networks_of_one_number_share_the_time_within_a_thread() -> None:
    one, two = sd_unet(), sd_unet()
    same = made(one, mask_group_id="7"), made(two, mask_group_id="7")
    alone = made(sd_unet())
    assert same[0].layers[0][1].adapter.clock is same[1].layers[0][1].adapter.clock is not alone.clock
    latents, _, text = inputs()
    one(latents, torch.tensor([100, 600]), text)
    other = same[1].layers[0][1].adapter.clock
    torch.testing.assert_close(other.now.time, torch.tensor([0.9, 0.4]))
    with torch.no_grad():
        hook = two.mid_block.register_forward_pre_hook(lambda m, a: seen.append(float(other.now.time[0])))
        seen: list[float] = []
        elsewhere(lambda: drawn(two, 250))
        hook.remove()
    assert seen == [0.75] and alone.clock.now.time is None
    torch.testing.assert_close(other.now.time, torch.tensor([0.9, 0.4]))


def test_number_0_is_a_group_where_it_is_asked_for() -> None:
    given, plain = made(sd_unet(), mask_group_id="0"), made(sd_unet())
    mask = torch.tensor([1.0, 0, 0, 0])
    plain.set_timestep_mask(mask)  # also for its own layers, as hosts call it that know of no groups
    assert given.layers[0][1].adapter.clock.now.mask is mask and plain.clock.now.mask is mask
    given.set_timestep_mask(None, 0)
    assert given.layers[0][1].adapter.clock.now.mask is None and plain.clock.now.mask is mask
    plain.set_timestep_mask(None)


# -- copies


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_model_and_network_has_a_clock_of_its_own(way: str) -> None:
    unet = sd_unet()
    network = made(unet)
    drawn(unet, 900)
    both = copy.deepcopy((unet, network)) if way == "deepcopy" else pickle.loads(pickle.dumps((unet, network)))
    other, second = both
    clocks = {layer.adapter.clock for layer in second.adapted_layers}
    assert clocks == {second.clock} and second.clock is not network.clock
    for time in (900, 10):
        assert torch.equal(drawn(other, time), drawn(unet, time))
    assert not torch.equal(drawn(other, 900), drawn(other, 10))
    latents, _, text = inputs()
    other(latents, torch.tensor([100, 600]), text)
    assert second.clock.now.time is not None and network.clock.now.time is None
    grouped = made(sd_unet(), mask_group_id="9")
    again = copy.deepcopy(grouped)
    assert again.layers[0][1].adapter.clock is grouped.layers[0][1].adapter.clock


# -- compiled


class Small(nn.Module):
    """A model of one block, which goes by the time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(12, 12), nn.Tanh()).double()
        self.broken, self.reentrant = False, None

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x * 1.5
        if self.broken:
            torch._dynamo.graph_break()
        return self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)


def small() -> tuple[Small, nn.Module]:
    model = Small()
    adapter = ALGOS["tlora"](Geometry.of(model.block[0]), DIM).double()
    layer = AdaptedLayer("x", model.block[0], adapter, 1.0, runtime=Runtime(1.0)).double()
    layer.attach()
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))
    adapter.clock = Clock()
    Watch(layer.runtime, [adapter.clock], TimeReader("timestep", 1, Timestep(("timestep",)))).hook(model)
    return model, adapter


def run_small(call: Callable[..., Tensor], time: float) -> Tensor:
    return call(torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 12).requires_grad_(), torch.tensor(time))


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "with a break"])
@pytest.mark.parametrize("part", ["model", "block"])
def test_compiled_threads(part: str, broken: bool) -> None:
    """The time is read in the thread that runs, also behind a break of the graph."""
    model, _ = small()
    times = (900.0, 10.0, 500.0)
    wanted = [run_small(model, time).detach() for time in times]
    torch._dynamo.reset()
    model.broken, call = broken, model
    if part == "model":
        call = torch.compile(model, backend="eager", fullgraph=not broken)
    else:
        model.block.compile(backend="eager", fullgraph=True)
    for grad in (True, False):
        for where in (lambda f: f(), elsewhere):
            for time, expected in zip(times, wanted, strict=True):
                found = where(lambda time=time, grad=grad: with_grad(grad, lambda: run_small(call, time)))
                assert_close(found.detach(), expected, f"{time}")
    torch._dynamo.reset()


def with_grad(grad: bool, call: Callable[[], Tensor]) -> Tensor:
    with torch.set_grad_enabled(grad):
        return call()


@pytest.mark.parametrize("where", [lambda f: f(), elsewhere], ids=["here", "elsewhere"])
@pytest.mark.parametrize("reentrant", (True, False))
def test_compiled_blocks_under_checkpointing(reentrant: bool, where: Any) -> None:
    """They are computed again as they are, compiled."""
    found = []
    for way in ("plain", "checkpoint"):
        torch._dynamo.reset()
        model, adapter = small()
        if way == "checkpoint":
            model.reentrant = reentrant
            model.block.compile(backend="aot_eager", fullgraph=True)
        outputs = [run_small(model, time) for time in (900.0, 10.0)]
        with torch.no_grad():
            run_small(model, 500.0)
        where(lambda outputs=outputs: torch.cat(outputs).square().sum().backward())
        found.append([p.grad for p in adapter.parameters()])
    for a, b in zip(*found, strict=True):
        assert_close(b, a, "gradient")
    torch._dynamo.reset()


# -- what else a pass tells, or draws


def test_one_thread_draws_while_another_trains() -> None:
    """Dropouts act in the one and not in the other."""
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 4, 4, None, None, unet, neuron_dropout=0.5, module_dropout="0.5")
    network.apply_to(None, unet, False, True)
    randomise(network, 0.5)
    network.train()
    clean = drawn(unet, 100)
    latents, _, text = inputs()

    def trained() -> Tensor:
        return unet(latents, torch.tensor([100, 100]), text).sample.detach()

    for _ in range(3):
        with meeting(unet.mid_block, 2):
            quiet, noisy = at_once([lambda: drawn(unet, 100), trained])
        assert torch.equal(quiet, clean) and not torch.allclose(noisy, clean)


class Meeting(nn.Linear):
    """Threads wait for each other in its forward."""

    barrier: threading.Barrier | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.barrier is not None:
            self.barrier.wait(PATIENCE)
        return super().forward(x)


def dylora(base: nn.Module) -> AdaptedLayer:
    adapter = ALGOS["dylora"](Geometry.of(base), 8, {"block_size": 1}).double()
    randomise(adapter)
    layer = AdaptedLayer("lora_unet_x", base, adapter, 1.0, runtime=Runtime(1.0)).double()
    layer.attach()
    return layer.train()


def test_the_block_of_a_training_step_is_its_threads() -> None:
    base = Meeting(12, 10).double()
    layer = dylora(base)
    x = torch.randn(3, 12, dtype=torch.float64)

    def run(sampling: bool) -> Tensor:
        layer.runtime.sampling = sampling
        return layer.base(x).detach()

    whole = run(True)
    layer.runtime.sampling = False
    cuts = []
    for _ in range(6):
        base.barrier = threading.Barrier(2)
        quiet, cut = at_once([lambda: run(True), lambda: run(False)])
        base.barrier = None
        assert_close(quiet, whole, "drawn beside a training step")
        cuts.append(torch.allclose(cut, whole))
    assert not all(cuts)


@pytest.mark.parametrize("way", ["recomputation that ends early", "exception"])
def test_no_block_outlives_its_step(way: str) -> None:
    base = Meeting(12, 10).double()
    layer = dylora(base)
    x = torch.randn(3, 12, dtype=torch.float64)
    layer.eval()
    whole = layer.base(x).detach()
    layer.train()
    for _ in range(4):
        if way == "exception":
            base.barrier = threading.Barrier(1)
            base.barrier.abort()
            with pytest.raises(threading.BrokenBarrierError):
                layer.base(x)
            base.barrier = None
        else:
            checkpoint(layer.base, x.clone().requires_grad_(), use_reentrant=False).square().sum().backward()
        layer.eval()
        assert_close(layer.base(x), whole, "all ranks outside a step")
        layer.train()


def test_the_base_on_which_glora_acts_is_its_threads() -> None:
    """Two modules of one fused layer at once."""
    whole = make_layer("linear")
    parts = []
    for start, stop in ((0, 40), (40, 110)):
        module = nn.Linear(whole.in_features, stop - start).double()
        with torch.no_grad():
            module.weight.copy_(whole.weight[start:stop])
        parts.append(Site(module, ((start, stop),)))
    adapter = ALGOS["glora"](Geometry.of(whole), 3).double()
    randomise(adapter)
    layer = AdaptedLayer("x", parts, adapter, 1.0, Dropouts(), Runtime(1.0)).double()
    layer.attach()
    x = make_input("linear")
    wanted = [site.module(x) for site in parts]
    barrier, own = threading.Barrier(2), adapter.factors

    def factors(x: Tensor) -> dict[str, Tensor]:
        barrier.wait(PATIENCE)
        return own(x)

    adapter.factors = factors  # type: ignore[method-assign]
    for found, expected in zip(at_once([lambda s=s: s.module(x) for s in parts]), wanted, strict=True):
        assert_close(found, expected, "rows")
