"""T-LoRA: its start, its masks by the time of each sample, and its files. What all algorithms share is tested in
test_algo_matrix."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_numeric import KINDS, assert_close, learn_lengths, make_input, make_layer
from registry_archs import data_of
from safetensors.torch import load_file, save_file
from test_key_merge import LORA_UTILS
from tiny_parts import draw, inputs, randomise, sd_unet, text_encoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toy_models import signal, toy

import networks.lora
import networks.lycoris
from networks.algos.clock import Clock
from networks.algos.lora import LoRA
from networks.algos.tlora import TLoRA
from networks.archs import ARCHS
from networks.archs.spec import Timestep
from networks.files import codec
from networks.files.checkpoint import Checkpoint
from networks.files.merge import CheckpointMerge, MergeInput, merged_weight
from networks.hosts import key_merge
from networks.layers.adapted import AdaptedLayer
from networks.layers.runtime import Runtime
from networks.network.watching import TimeReader, time_reader
from networks.tensors import low_rank
from networks.tensors.geometry import Geometry

DIM, SCALE, MULTIPLIER = 4, 0.75, 0.7
TIMES = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
ACTIVE = (1, 2, 4)  # floor(time * 3) + 1


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def single(kind: str, dora: str = "", **options: Any) -> AdaptedLayer:
    """An attached float64 layer whose factors have left their start; its clock is its own."""
    base = make_layer(kind)
    adapter = TLoRA(Geometry.of(base), DIM, options).double()
    layer = AdaptedLayer("lora_unet_x", base, adapter, SCALE, runtime=Runtime(MULTIPLIER), dora=dora).double()
    layer.attach()
    move(layer)
    layer.load_magnitude(None)
    adapter.clock = Clock()
    return layer


def move(module: nn.Module, size: float = 0.3) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=size)


def masked(adapter: TLoRA, active: int) -> Tensor:
    """P diag(lam m) Q - P0 diag(lam0 m) Q0 of a live adapter, by the definition."""
    m = torch.diag((torch.arange(adapter.dim) < active).double())
    p0, q0 = adapter.p0.flatten(1), adapter.q0.flatten(1)
    p, q = p0 + adapter.p.flatten(1), q0 + adapter.q.flatten(1)
    lam0, lam = torch.diag(adapter.lam0[0]), torch.diag((adapter.lam0 + adapter.lam)[0])
    return (p @ lam @ m @ q - p0 @ lam0 @ m @ q0).reshape(adapter.geometry.weight_shape).detach()


# -- the start


@pytest.mark.parametrize("sig_type", ("principal", "middle", "last"))
@pytest.mark.parametrize("kind", ("linear", "conv_3x3", "conv_grouped"))
def test_the_start_is_of_the_weight(kind: str, sig_type: str) -> None:
    base = make_layer(kind)
    adapter = TLoRA(Geometry.of(base), DIM, {"sig_type": sig_type}).double()
    layer = AdaptedLayer("x", base, adapter, SCALE)
    layer.attach()
    u, s, vh = torch.linalg.svd(base.weight.flatten(1), full_matrices=False)
    at = {"principal": 0, "middle": (len(s) - DIM) // 2, "last": len(s) - DIM}[sig_type]
    wanted = (u[:, at : at + DIM] * s[at : at + DIM]) @ vh[at : at + DIM]
    p0, q0 = adapter.p0.flatten(1), adapter.q0.flatten(1)
    assert_close((p0 * adapter.lam0) @ q0, wanted, "P0 diag(lam0) Q0")
    assert_close(p0.T @ p0, torch.eye(DIM, dtype=torch.float64), "P0")
    assert_close(q0 @ q0.T, torch.eye(DIM, dtype=torch.float64), "Q0")
    assert not adapter.delta().any()


@pytest.mark.parametrize("sig_type", ("principal", "middle", "last"))
def test_the_start_of_a_random_matrix_needs_no_base(sig_type: str) -> None:
    base = make_layer("linear").to("meta")
    adapter = TLoRA(Geometry.of(base), DIM, {"use_data_init": False, "sig_type": sig_type})
    assert not adapter.wants_base
    eye = torch.eye(DIM)
    torch.testing.assert_close(adapter.p0.T @ adapter.p0, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(adapter.q0 @ adapter.q0.T, eye, atol=1e-5, rtol=0)
    assert bool((adapter.lam0.diff() <= 0).all()) and bool((adapter.lam0 > 0).all())


def test_large_weights_have_their_leading_vectors_without_a_full_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    u, v = (torch.linalg.qr(torch.randn(600, 600, dtype=torch.float64))[0] for _ in range(2))
    s = 0.97 ** torch.arange(600, dtype=torch.float64)
    W = (u * s) @ v
    exact = low_rank.singular(W, 8, exact=True)
    with monkeypatch.context() as patch:
        svd = torch.linalg.svd
        patch.setattr(torch.linalg, "svd", lambda m, **kw: svd(m, **kw) if min(m.shape) < 100 else pytest.fail("full"))
        found = low_rank.singular(W, 8)
    assert_close(found[1], exact[1], "values", 1e-3)
    assert_close((found[0] * found[1]) @ found[2], (exact[0] * exact[1]) @ exact[2], "triples", 0.05)
    again = low_rank.singular(W, 8)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "no chance in it"


def test_the_weight_is_read_when_it_is_there() -> None:
    """Hosts create a network on a model without weights, or load others later; what training or a file has set
    stays."""
    base = nn.Linear(20, 12, device="meta")
    adapter = TLoRA(Geometry.of(base), DIM)
    layer = AdaptedLayer("x", base, adapter, SCALE)
    with pytest.raises(ValueError, match="its start values come from the base weight, which is not there yet"):
        layer.attach()
    base.to_empty(device="cpu")
    nn.init.normal_(base.weight)
    nn.init.zeros_(base.bias)
    layer.attach()
    assert not adapter.wants_base
    s = torch.linalg.svdvals(base.weight.detach())[:DIM]
    torch.testing.assert_close(adapter.lam0[0], s)
    start = adapter.q0.clone()
    layer.detach()
    nn.init.normal_(base.weight)
    layer.attach()
    assert torch.equal(adapter.q0, start)


def test_a_copy_made_before_the_base_was_seen_still_waits_for_it() -> None:
    base = make_layer("linear")
    adapter = TLoRA(Geometry.of(base), DIM, {}).double()
    copied = copy.deepcopy(adapter)
    for one in (adapter, copied):
        assert one.wants_base
        AdaptedLayer("lora_unet_x", base, one, SCALE).attach()
        assert not one.wants_base and not copy.deepcopy(one).wants_base
        torch.testing.assert_close(one.lam0.flatten(), torch.linalg.svdvals(base.weight)[:DIM])
        base = make_layer("linear")


def test_more_ranks_than_the_layer_has() -> None:
    """Those above are free directions of length 0, which can grow."""
    base = nn.Linear(3, 5).double()
    adapter = TLoRA(Geometry.of(base), 6).double()
    layer = AdaptedLayer("x", base, adapter, SCALE)
    layer.attach()
    layer(torch.randn(7, 3, dtype=torch.float64)).square().sum().backward()
    assert bool((adapter.lam.grad[0] != 0).all())


def test_a_quantised_base_is_read_dequantised() -> None:
    import bitsandbytes as bnb

    base = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    base.load_state_dict({"weight": torch.randn(64, 64)})
    base = base.to("cpu")
    base(torch.randn(1, 64))  # quantises
    adapter = TLoRA(Geometry.of(base), DIM)
    layer = AdaptedLayer("x", base, adapter, SCALE)
    layer.attach()
    s = torch.linalg.svdvals(bnb.functional.dequantize_4bit(base.weight, base.weight.quant_state).float())
    torch.testing.assert_close(adapter.lam0[0], s[:DIM], atol=1e-3, rtol=1e-3)


# -- masks


def clock_at(time: Tensor) -> Clock:
    clock = Clock()
    clock.enter(time)
    return clock


def test_the_schedule() -> None:
    """Numbers of active ranks of 16 at timesteps of 1000, as LyCORIS counts them."""
    table = {1.0: {0: 16, 100: 14, 250: 12, 500: 8, 750: 4, 900: 2, 1000: 1}, 2.0: {0: 16, 250: 9, 500: 4, 750: 1}}
    for exponent, rows in table.items():
        mask = clock_at((1000 - torch.tensor([float(t) for t in rows])) / 1000).rank_mask(16, 1, exponent)
        assert mask is not None and mask.sum(1).tolist() == list(rows.values())
        assert bool((mask.diff(dim=1) <= 0).all()), "the first ones"
    every = clock_at((1000 - torch.arange(1001.0)) / 1000)
    for dim, least in ((16, 1), (7, 3), (4, 4)):
        mask = every.rank_mask(dim, least, 1.0)
        assert mask is not None
        wanted = [(1000 - t) * (dim - least) // 1000 + least for t in range(1001)]
        assert mask.sum(1).tolist() == wanted


@pytest.mark.parametrize("noise,clean", [(1000.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_whole_numbers_of_ranks_are_not_lost_to_rounding(noise: float, clean: float) -> None:
    """At every timestep of 1000, for every dim, as models are told the time; counted in whole numbers."""
    values = torch.arange(1001) if noise > 1 else torch.arange(1001) / 1000
    values = values if noise else 1 - values
    read = TimeReader("t", 0, Timestep(("t",), noise, clean))
    clock = clock_at(read([values], {}))
    for dim in range(2, 129):
        for least in {1, min(3, dim)}:
            mask = clock.rank_mask(dim, least, 1.0)
            assert mask is not None
            assert mask.sum(1).tolist() == [(1000 - t) * (dim - least) // 1000 + least for t in range(1001)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "linear_no_bias"])
def test_each_sample_has_its_own_ranks(kind: str) -> None:
    layer = single(kind)
    x, plain = make_input(kind, samples=3), copy.deepcopy(layer.base)
    del plain.forward
    layer.adapter.clock.enter(TIMES)
    y = layer.base(x)
    for i, active in enumerate(ACTIVE):
        W = layer.base.weight + MULTIPLIER * SCALE * masked(layer.adapter, active)
        twin = copy.deepcopy(plain)
        with torch.no_grad():
            twin.weight.copy_(W)
        assert_close(y[i] - plain(x[i : i + 1])[0], (twin(x[i : i + 1]) - plain(x[i : i + 1]))[0], f"sample {i}")
    for training in (True, False):
        layer.train(training)
        assert_close(layer.base(x), y, "training or not")
    full = layer.base.weight + MULTIPLIER * SCALE * masked(layer.adapter, DIM)
    assert_close(layer.new_weight(layer.base.weight), full, "weights hold all ranks")
    layer.adapter.clock.enter(None)
    whole = layer.base(x)
    with torch.no_grad():
        plain.weight.copy_(full)
    assert_close(whole, plain(x), "without a time")


def test_rows_of_one_sample_follow_each_other() -> None:
    """A layer on frames or tokens: [samples * rows, features]."""
    layer, x = single("linear"), torch.randn(3, 5, 108, dtype=torch.float64)
    layer.adapter.clock.enter(TIMES)
    assert_close(layer.base(x.flatten(0, 1)).unflatten(0, (3, 5)), layer.base(x), "flattened")
    with pytest.raises(ValueError, match="timesteps of 3 samples reached a layer with a batch of 2"):
        layer.base(x[:2])
    layer.adapter.clock.enter(TIMES[:1])
    assert layer.base(x[0, 0]).shape == (110,)


@pytest.mark.parametrize("side", ("output", "input"))
def test_dora_measures_the_weight_with_all_ranks(side: str) -> None:
    layer, x = single("linear", side), make_input("linear", samples=3)
    learn_lengths(layer)
    W, dim = layer.base.weight, 1 if side == "output" else 0
    lengths = (W + SCALE * masked(layer.adapter, DIM)).norm(dim=dim, keepdim=True)
    layer.adapter.clock.enter(TIMES)
    y = layer.base(x)
    for i, active in enumerate(ACTIVE):
        changed = (W + SCALE * masked(layer.adapter, active)) * layer.magnitude / lengths
        wanted = nn.functional.linear(x[i], W + MULTIPLIER * (changed - W), layer.base.bias)
        assert_close(y[i], wanted, f"sample {i}")


@pytest.mark.parametrize("passes", (1, 2))
@pytest.mark.parametrize("reentrant", (True, False))
def test_gradients_under_checkpointing_are_those_of_each_sample(reentrant: bool, passes: int) -> None:
    """Also where a trainer makes a pass for each sample before it goes back. A picture drawn without gradients between
    forward and backward changes nothing."""
    found = []
    for way in ("plain", "checkpoint"):
        unet = sd_unet()
        torch.manual_seed(0)
        network = made(unet)
        if way == "checkpoint":
            unet.enable_gradient_checkpointing(lambda f, *a: checkpoint(f, *a, use_reentrant=reentrant))
            unet.train()
        latents, _, text = inputs()
        latents.requires_grad_()
        parts = [torch.tensor([900, 10])] if passes == 1 else torch.tensor([[900], [10]])
        pieces = zip(latents.chunk(passes), parts, text.chunk(passes), strict=True)
        y = torch.cat([unet(x, time, words).sample for x, time, words in pieces])
        with torch.no_grad():
            unet(latents, 500, text)
        y.square().sum().backward()
        found.append([p.grad for p in network.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def made(unet: nn.Module, dim: int = DIM, **arguments: str) -> Any:
    network = networks.lycoris.create_network(
        1.0, dim, 2, None, None, unet, algo="tlora", preset="attn-mlp", **arguments
    )
    network.apply_to(None, unet, False, True)
    move(network, 0.1)
    return network


def test_sampling_has_its_own_time_and_gives_the_former_back() -> None:
    unet = sd_unet()
    network = made(unet)
    clock = network.clock
    latents, _, text = inputs()
    with torch.no_grad():
        alone = unet(latents, 900, text).sample
    assert clock.now.time is None
    unet(latents, torch.tensor([100, 600]), text)
    torch.testing.assert_close(clock.now.time, torch.tensor([0.9, 0.4]))
    with torch.no_grad():
        assert torch.equal(unet(latents, torch.tensor(900), text).sample, alone)
        assert not torch.equal(unet(latents, torch.tensor(100), text).sample, unet(latents, 900, text).sample)
    torch.testing.assert_close(clock.now.time, torch.tensor([0.9, 0.4]))
    network.detach()


def test_a_batch_is_its_samples() -> None:
    unet = sd_unet()
    made(unet).eval()
    latents, _, text = inputs(3)
    times = torch.tensor([0, 550, 999])
    together = unet(latents, times, text).sample
    for i, time in enumerate(times):
        alone = unet(latents[i : i + 1], time, text[i : i + 1]).sample
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("whole", (True, False))
def test_compiled(whole: bool) -> None:
    """The time is no constant of the graphs, nor the reason for new ones."""
    unet = sd_unet()
    made(unet)
    latents, _, text = inputs()
    all_times = ([900, 10], [10, 900], [500, 500])
    wanted = [unet(latents, torch.tensor(times), text).sample for times in all_times]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if whole:
        call = torch.compile(unet, backend="eager", fullgraph=True)
    else:
        call = unet
        for block in unet.down_blocks:
            block.compile(backend="aot_eager")
    graphs = []
    for times, expected in zip(all_times, wanted, strict=True):
        torch.testing.assert_close(call(latents, torch.tensor(times), text).sample, expected, atol=1e-5, rtol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[-2]
    torch._dynamo.reset()


def test_text_encoders_keep_all_ranks() -> None:
    encoder, unet = text_encoder(), sd_unet()
    network = networks.lora.create_network(1.0, DIM, 2, None, encoder, unet, algo="tlora")
    network.apply_to(encoder, unet, True, True)
    parts = {row.part: layer.adapter.clock for row, layer in network.layers}
    assert parts["text_encoder"] is None and parts["unet"] is network.clock


# -- groups


def test_networks_of_one_group_share_the_mask() -> None:
    unet = sd_unet()
    same, other = made(unet, mask_group_id="5"), made(unet, mask_group_id="6")
    latents, _, text = inputs()
    whole = unet(latents, 1, text).sample
    networks_of_5, both = torch.tensor([1.0, 0, 0, 0]), torch.zeros(DIM)
    same.set_timestep_mask(networks_of_5, 5)
    one = unet(latents, 1, text).sample
    assert not torch.equal(one, whole)
    other.set_timestep_mask(both, 5)  # any network of the process may say it
    none = unet(latents, 1, text).sample
    same.detach()
    torch.testing.assert_close(unet(latents, 1, text).sample, none)
    other.set_timestep_mask(both, 6)
    other_off = unet(latents, 1, text).sample
    other.detach()
    torch.testing.assert_close(unet(latents, 1, text).sample, other_off)
    for group in (5, 6):
        same.set_timestep_mask(None, group)


def test_a_mask_for_each_sample_by_hand() -> None:
    layer, x = single("linear"), make_input("linear")
    layer.adapter.clock.enter(TIMES[[1, 2]])
    wanted = layer.base(x)
    layer.adapter.clock.enter(None)
    layer.adapter.clock.set_mask(torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]]))
    assert_close(layer.base(x), wanted, "by hand")
    layer.adapter.clock.set_mask(torch.ones(DIM + 1))
    with pytest.raises(ValueError, match=r"the timestep mask is \(5,\), this layer has 4 ranks"):
        layer.base(x)


# -- how models are told the time


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_every_architecture_tells_the_time(arch: Any) -> None:
    *others, last = data_of(arch.name).forward.split()
    last, _, attribute = last.partition(".")
    names = [*others, last]
    function = f"def forward(self, {', '.join(names)}, more=None): pass"
    space: dict[str, Any] = {}
    exec(function, space)
    reader = time_reader(type("Model", (nn.Module,), {"forward": space["forward"]})(), arch.timestep)

    def read(args: list[Any], kwargs: dict[str, Any]) -> Any:
        if attribute:
            args, kwargs = [packed(one) for one in args], {name: packed(one) for name, one in kwargs.items()}
        return reader(args, kwargs)

    def packed(value: Any) -> Any:
        return value if value is None else SimpleNamespace(**{attribute: value})

    noisy, middle, clean = data_of(arch.name).times
    values, wanted = torch.tensor([noisy, middle, clean]), torch.tensor([0.0, 0.75, 1.0])
    for call in (([None] * (len(names) - 1) + [values], {}), ([], {names[-1]: values})):
        torch.testing.assert_close(read(*call), wanted[:1] if arch.timestep.shared else wanted)
    assert read([], {}) is None
    torch.testing.assert_close(read([], {names[-1]: noisy}), torch.tensor([0.0]))
    torch.testing.assert_close(read([], {names[-1]: torch.tensor(clean).bfloat16()}), torch.tensor([1.0]))
    frames = torch.tensor([[clean, middle, middle], [noisy, clean, middle]])
    noisiest = torch.tensor([0.0]) if arch.timestep.shared else torch.tensor([0.75, 0.0])
    torch.testing.assert_close(read([], {names[-1]: frames}), noisiest, msg="the noisiest frame")


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
def test_diffusers_classes_have_the_argument(arch: Any) -> None:
    import diffusers

    found = [getattr(diffusers, signature.cls, None) for signature in arch.signatures]
    for cls in filter(None, found):
        names = list(inspect.signature(cls.forward).parameters)
        assert next(name for name in arch.timestep.arguments if name in names) in ("timestep", "t")
    assert any(found) or not any(release.denoiser for release in arch.releases)


def test_a_model_that_is_told_no_time_is_refused() -> None:
    unet = sd_unet()
    network = networks.lora.create_network(1.0, DIM, 2, None, None, unet, algo="tlora")
    type(unet).forward, forward = (lambda self, x: x), type(unet).forward
    try:
        with pytest.raises(ValueError, match="UNet2DConditionModel is not told the timestep as timestep"):
            network.apply_to(None, unet, False, True)
    finally:
        type(unet).forward = forward


# -- files


def test_a_file_is_a_lora_and_trains_on(tmp_path: Path) -> None:
    """Every reader has the update of all ranks; with algo=tlora it is the same network at every time, also after a
    further step of training."""
    unet = sd_unet()
    network = made(unet)
    latents, _, text = inputs()
    times = torch.tensor([700, 20])
    wanted, whole = unet(latents, times, text).sample, unet(latents, 0, text).sample
    path = str(tmp_path / "a.safetensors")
    network.save_weights(path, None, {})
    tensors = load_file(path)
    assert {key.partition(".")[2] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert {float(t) for key, t in tensors.items() if key.endswith("alpha")} == {2 * 2.0}

    for algo, at_times in (("lora", None), ("tlora", wanted)):
        fresh = sd_unet()
        loaded, _ = networks.lycoris.create_network_from_weights(1.0, path, None, None, fresh, algo=algo)
        loaded.apply_to(None, fresh, False, True)
        assert {row.dim for row in loaded.plan.trained} == {2 * DIM if algo == "lora" else DIM}
        assert {row.scale for row in loaded.plan.trained} == {0.5}
        torch.testing.assert_close(fresh(latents, 0, text).sample, whole, atol=1e-5, rtol=1e-5)
        if at_times is not None:
            torch.testing.assert_close(fresh(latents, times, text).sample, at_times, atol=1e-5, rtol=1e-5)

    again_unet = sd_unet()
    again = made(again_unet)
    again.load_weights(path)
    for one, model in ((network, unet), (again, again_unet)):
        one.zero_grad()
        model(latents, times, text).sample.square().sum().backward()
    for (row, a), (_, b) in zip(network.layers, again.layers, strict=True):
        torch.testing.assert_close(a.adapter.q.grad, b.adapter.q.grad, atol=1e-4, rtol=1e-3, msg=row.dotted_name)
    again.save_weights(str(tmp_path / "b.safetensors"), None, {})
    for key, tensor in load_file(tmp_path / "b.safetensors").items():
        torch.testing.assert_close(tensor, tensors[key], atol=1e-5, rtol=1e-4)


def test_the_live_state_has_the_start() -> None:
    unet, other_unet = sd_unet(), sd_unet()
    network = made(unet, use_data_init="False")
    torch.manual_seed(77)
    other = made(other_unet, use_data_init="False")
    other.load_state_dict(network.state_dict())
    assert torch.equal(draw(unet), draw(other_unet))
    for a, b in zip(network.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_small_change_survives_few_bits(dtype: torch.dtype) -> None:
    """In files, and in networks that a host casts: factors in few bits would lose it in the difference to the start."""
    base = nn.Linear(96, 80)
    layer = AdaptedLayer("lora_unet_x", base, TLoRA(Geometry.of(base), DIM), SCALE)
    layer.attach()
    move(layer, 1e-4)
    exact = masked(layer.adapter.double(), DIM)
    layer.float()
    saved = codec.decode({key: t.to(dtype) for key, t in codec.encode([layer]).items()})[0]["lora_unet_x"]
    in_file = merged_weight(saved, torch.zeros(80, 96, dtype=torch.float64)) / SCALE
    assert float((in_file - exact).norm() / exact.norm()) < 1e-2
    layer.to(dtype)
    live = layer.new_weight(torch.zeros(80, 96, dtype=torch.float64)) / SCALE
    assert float((live - exact).norm() / exact.norm()) < 1e-2
    x = torch.randn(5, 96).to(dtype)
    product = layer.adapter.geometry.op(x.double(), exact)
    assert float((layer.update(x).double() / SCALE - product).norm() / product.norm()) < 2e-2


def test_the_plan_tells_of_start_and_files() -> None:
    plan = networks.lora.plan(4, 1, None, sd_unet(), algo="tlora")
    size = 4 * sum(row.parameters for row in plan.trained) / 2**20
    wanted = f"tlora on {len(plan.trained)} layers: the start is kept beside the parameters ({size:.1f} MiB), "
    assert wanted + "files are lora with 2 times the dim" in plan.notes


def test_refusals() -> None:
    unet = sd_unet()
    arguments: dict[str, Any] = {"algo": "tlora", "exclude_patterns": ".*(ff|time).*"}
    with pytest.raises(ValueError, match="min_rank=5 is above its dim 4"):
        networks.lora.plan(4, 1, None, unet, **arguments, min_rank="5")
    with pytest.raises(ValueError, match="bypass_mode=True has no effect with algo=tlora"):
        networks.lora.plan(4, 1, None, unet, **arguments, bypass_mode="True")
    with pytest.raises(ValueError, match="split_qkv=True has no effect with algo=tlora"):
        networks.lora.plan(4, 1, None, toy("flux")["dit"], algo="tlora", split_qkv="True")
    with pytest.raises(ValueError, match="sig_type=first .*principal"):
        networks.lora.plan(4, 1, None, unet, **arguments, sig_type="first")
    with pytest.raises(ValueError, match="min_rank has no effect: text encoders are told no timestep"):
        networks.lora.plan(4, 1, text_encoder(), unet, algo="tlora", min_rank="2", exclude_patterns=".*blocks?.*")
    odd = networks.lora.create_network(1.0, 3, 1, None, None, unet)
    with pytest.raises(ValueError, match="its rank 3 is odd: files of T-LoRA have twice its dim"):
        networks.lora.create_network_from_weights(
            1.0, None, None, None, unet, codec.encode(odd.adapted_layers), algo="tlora"
        )


# -- files of LyCORIS


def foreign(layer: nn.Module, scale: float = 0.05, **options: Any) -> Any:
    """LyCORIS' module on a layer, its factors moved from their start."""
    from lycoris.modules.tlora import TLoraModule as module

    theirs = module("lora_unet_x", layer, 1.0, DIM, 2.0, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * scale)
    return theirs


def keys_of(theirs: Any, name: str = "lora_unet_x") -> dict[str, Tensor]:
    return {f"{name}.{key}": t.detach().clone() for key, t in theirs.custom_state_dict().items()}


@pytest.mark.reference
@pytest.mark.parametrize("kind", ("linear", "conv_1x1"))
def test_files_of_lycoris(kind: str) -> None:
    base = make_layer(kind, torch.float32)
    theirs = foreign(base)
    x = make_input(kind, torch.float32)
    plain = base(x)
    wanted = theirs(x) if kind == "linear" else plain + theirs.bypass_forward_diff(x)
    saved = codec.decode(keys_of(theirs))[0]["lora_unet_x"]
    assert saved.algorithm is TLoRA and saved.describe(Geometry.of(base)) == (DIM, {})
    W = base.weight.detach()
    torch.testing.assert_close(base.forward(x), plain)
    new = merged_weight(saved, W)
    torch.testing.assert_close(Geometry.of(base).op(x, new - W), wanted - plain, atol=2e-4, rtol=1e-3)


@pytest.mark.reference
def test_files_of_lycoris_after_others_start_from_the_base(tmp_path: Path) -> None:
    """Merged second, in either way of merging."""
    base = make_layer("linear", torch.float32)
    W, name = base.weight.detach(), "lora_unet_x"
    other = AdaptedLayer(name, base, LoRA(Geometry.of(base), DIM), 1.0)
    move(other, 0.5)
    first, second = codec.encode([other]), keys_of(foreign(base))
    alone = [merged_weight(codec.decode(tensors)[0][name], W) - W for tensors in (first, second)]
    save_file({"x.weight": W}, tmp_path / "base.safetensors")
    files = []
    for i, tensors in enumerate((first, second)):
        save_file({key: t.contiguous() for key, t in tensors.items()}, tmp_path / f"{i}.safetensors")
        files.append(MergeInput.open(tmp_path / f"{i}.safetensors", 1.0))
    CheckpointMerge(Checkpoint(tmp_path / "base.safetensors"), files).write(tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")["x.weight"]
    torch.testing.assert_close(merged, W + alone[0] + alone[1], atol=1e-4, rtol=1e-4)
    trainer = ModuleType("lora_utils")
    exec(LORA_UTILS, vars(trainer))
    key_merge.extend(trainer)
    model = str(tmp_path / "base.safetensors")
    found = trainer.load_safetensors_with_lora_and_fp8(model, [first, second], [1.0, 1.0], False, torch.device("cpu"))
    torch.testing.assert_close(found["x.weight"], merged, atol=1e-4, rtol=1e-4)


@pytest.mark.reference
def test_files_of_lycoris_in_a_network(tmp_path: Path) -> None:
    unet = sd_unet()
    dotted = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    name = "lora_unet_" + dotted.replace(".", "_")
    theirs = foreign(unet.get_submodule(dotted))
    path = str(tmp_path / "theirs.safetensors")
    save_file(keys_of(theirs, name), path)
    latents, _, text = inputs()
    theirs.apply_to()
    wanted = unet(latents, 0, text).sample
    theirs.restore()
    for module in (networks.lora, networks.lycoris):
        network, _ = module.create_network_from_weights(1.0, path, None, None, unet)
        assert [row.algo for row in network.plan.trained] == ["tlora"]
        network.apply_to(None, unet, False, True)
        torch.testing.assert_close(unet(latents, 0, text).sample, wanted, atol=1e-4, rtol=1e-4)
        assert not torch.equal(unet(latents, 900, text).sample, unet(latents, 0, text).sample)
        network.detach()
    with pytest.raises(ValueError, match="lambda_layer without a start.*sig_type=principal"):
        networks.lycoris.create_network_from_weights(1.0, path, None, None, unet, algo="tlora", sig_type="last")


@pytest.mark.reference
@pytest.mark.parametrize("options", [{"use_data_init": False}, {"sig_type": "last"}], ids=str)
def test_files_of_lycoris_without_their_start_are_refused(options: dict[str, Any]) -> None:
    base = make_layer("linear", torch.float32)
    saved = codec.decode(keys_of(foreign(base, **options)))[0]["lora_unet_x"]
    with pytest.raises(ValueError, match="of its factors lie in the space of the first 4 singular vectors"):
        merged_weight(saved, base.weight.detach())


@pytest.mark.parametrize("arch", ["flux", "wan", "qwen_image", "lumina", "sd3"])
def test_models_of_every_kind_are_masked(arch: str) -> None:
    """Through the entries, on stand-ins: the noisiest time leaves one rank."""
    spec = next(spec for spec in ARCHS if spec.name == arch)
    model = toy(arch)[spec.denoiser.name].requires_grad_(False)
    network = networks.lycoris.create_arch_network(1.0, 2, 1, None, None, model, algo="tlora")
    network.apply_to(None, model, False, True)
    randomise(network)
    name = next(n for n in spec.timestep.arguments)
    outputs = [model(signal(), **{name: torch.full((2,), v)}) for v in (spec.timestep.noise, spec.timestep.clean)]
    network.set_timestep_mask(torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(model(signal()), outputs[0])
    network.set_timestep_mask(torch.ones(2))
    torch.testing.assert_close(model(signal()), outputs[1])
    assert not torch.equal(*outputs)
    network.set_timestep_mask(None)
