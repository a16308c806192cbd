"""ema_decay: the average against its recursion written apart, one step for each of the optimizer; files and samples."""

from __future__ import annotations

import copy
import json
import logging
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from registry import data_of
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_parts import draw, sd_unet, text_encoder
from torch import Tensor, nn
from toy_models import signal, toy

import networks.lora
import networks.lora_wan
from networks import api
from networks.algos import ALGOS
from networks.files.explain import explain
from networks.layers.adapted import AdaptedLayer
from networks.network import average
from networks.network.watching import Watch
from networks.tensors.geometry import Geometry

DECAY = 0.3  # above those of the second and third step, 2/11 and 3/12, below that of the fifth


def recursion(values: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """From the second step on: the first takes the values as they are."""
    found = values[0]
    for n, new in enumerate(values[1:], 1):
        d = min(DECAY, (1 + n) / (10 + n))
        found = {key: d * value + (1 - d) * new[key] for key, value in found.items()}
    return found


class Run:
    """A network on a small stand-in, trained as the trainers do: on_step_start in each pass."""

    def __init__(self, dim: int = 2, dtype: torch.dtype = torch.float32, **arguments: str) -> None:
        torch.manual_seed(0)
        self.model = toy("wan", blocks=1)["dit"].requires_grad_(False).to(dtype)
        arguments = {"ema_decay": str(DECAY), "only_patterns": r"blocks\.0\.self_attn\..*", **arguments}
        self.network = networks.lora_wan.create_arch_network(1.0, dim, 1, None, None, self.model, **arguments)
        self.network.apply_to(None, self.model, False, True)
        groups, _ = self.network.prepare_optimizer_params(1e-2)
        self.network.to(dtype).train()
        self.optimizer = torch.optim.AdamW(groups, eps=1e-8 if dtype.itemsize > 2 else 1e-4)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=dtype.itemsize > 2)
        self.values: list[dict[str, np.ndarray]] = []  # after each step of the optimizer, in float64

    def own(self) -> dict[str, Tensor]:
        return {key: p.detach().clone() for key, p in self.network.named_parameters()}

    def step(self, passes: int = 1, skipped: bool = False) -> None:
        """One step of the optimizer, or one that the scaler of fp16 leaves out."""
        for _ in range(passes):
            self.network.on_step_start()
            out = self.model(signal().to(next(self.model.parameters()).dtype))
            self.scaler.scale(out.float().square().mean()).backward()
        if skipped:
            next(p for p in self.network.parameters() if p.grad is not None).grad.fill_(float("inf"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if not skipped:
            self.values.append({key: p.double().numpy() for key, p in self.own().items()})

    def wanted(self) -> dict[str, np.ndarray]:
        return recursion(self.values)

    def save(self, folder: Path, name: str = "a", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        self.network.save_weights(str(folder / f"{name}.safetensors"), dtype, {"ss_network_dim": "2"})
        return load_file(folder / f"{name}.safetensors")


def of_file(file: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The factors of a LoRA file under the names of the parameters."""
    names = {".lora_down.weight": ".adapter.down", ".lora_up.weight": ".adapter.up"}
    return {
        key.replace(end, own): value.double().numpy()
        for key, value in file.items()
        for end, own in names.items()
        if end in key
    }


def check(found: dict[str, Any], wanted: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        np.testing.assert_allclose(np.asarray(value), wanted[key], rtol=tolerance, atol=tolerance * 1e-2, err_msg=key)


def ema_of(path: Path) -> dict[str, Any] | None:
    with safe_open(path, "pt") as opened:
        text = (opened.metadata() or {}).get("networks_ema")
    return None if text is None else json.loads(text)


# -- the recursion


def test_files_hold_the_average_of_the_optimizers_steps(tmp_path: Path) -> None:
    """Accumulated over 4 passes, two steps left out by the scaler, a limit of the norms after each pass: none of them
    counts, and the last step counts before the trainer's next pass."""
    run = Run()
    assert ema_of_saved(run, tmp_path) is None  # before the first step there is nothing to average
    for number in range(9):
        run.step(passes=4, skipped=number in (2, 5))
        for limit in (1e-3,) * 3:  # as often as the host calls it
            run.network.apply_max_norm_regularization(limit)
        if number not in (2, 5):
            run.values[-1] = {key: p.double().numpy() for key, p in run.own().items()}
    check(of_file(run.save(tmp_path)), run.wanted())
    assert ema_of(tmp_path / "a.safetensors") == {"decay": DECAY, "steps": 7}
    assert explain(tmp_path / "a.safetensors")["origin"]["average of the training (EMA)"].startswith('{"decay"')
    check({key: p.double() for key, p in run.own().items()}, run.values[-1])
    run.network.on_step_start()
    check(of_file(run.save(tmp_path)), run.wanted())
    with pytest.raises(AssertionError):
        check(of_file(run.save(tmp_path)), run.values[-1])


def ema_of_saved(run: Run, folder: Path) -> dict[str, Any] | None:
    run.save(folder)
    return ema_of(folder / "a.safetensors")


def averages(network: Any) -> dict[str, Tensor]:
    """As a state has them."""
    found = average.split_state(network.state_dict())[1]
    return {
        key.removeprefix(average.STATE): value.clone()
        for key, value in found.items()
        if "." in key[len(average.STATE) :]
    }


@pytest.mark.parametrize("algo", [name for name, algo in ALGOS.items() if algo.spec.family == Geometry.family])
def test_every_algorithm(algo: str, tmp_path: Path) -> None:
    """What it trains is averaged, magnitudes, too, and the file is that of a network with these values."""
    dora = {"use_dora": "True"} if "use_dora" in ALGOS[algo].spec.takes else {}
    run = Run(max(2, data_of(algo).least_dim), algo=algo, **dora)
    for _ in range(3):
        run.step()
    parameters = [*run.network.parameters()]
    file, found, wanted = run.save(tmp_path), averages(run.network), run.wanted()
    assert all(p is own for p, own in zip(run.network.parameters(), parameters, strict=True))
    frozen = {key for key in wanted if key.rpartition(".")[2] in ALGOS[algo].spec.frozen}
    check(found, {key: value for key, value in wanted.items() if key not in frozen})
    with torch.no_grad():
        for key, p in run.network.named_parameters():
            p.copy_(found.get(key, p))
    run.network.average = average.Average()
    again = run.save(tmp_path, "b")
    assert file.keys() == again.keys() and all(torch.equal(file[key], again[key]) for key in file)


class Bitsandbytes(torch.optim.SGD):
    """It writes to memory, where autograd does not count."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.data.sub_(0.01 * p.grad)


def fused(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


@pytest.mark.parametrize("make", [fused, Bitsandbytes], ids=lambda make: make.__name__)
def test_optimizers_with_kernels_of_their_own(make: Callable[[Any], torch.optim.Optimizer], tmp_path: Path) -> None:
    """They change values behind autograd's count; a fused one is called for a step, too, that the scaler leaves out."""
    run = Run(diagnose_steps="50")
    run.optimizer = make([p for p in run.network.parameters() if p.requires_grad])
    for number in range(6):
        run.step(passes=2, skipped=number == 3)
    check(of_file(run.save(tmp_path)), run.wanted())
    assert run.network.average.steps == 5
    run.network.on_step_start()
    assert run.network.diagnosis.steps == 5
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0).step()  # of others
    run.network.on_step_start()
    assert run.network.average.steps == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["adapter", "cpu"])
def test_it_has_more_digits_than_the_adapter(dtype: torch.dtype, device: str, tmp_path: Path) -> None:
    run = Run(dtype=dtype, ema_device=device)
    for _ in range(4):
        run.step()
    check(averages(run.network), run.wanted())
    check(of_file(run.save(tmp_path, dtype=torch.float32)), run.wanted())
    assert {t.dtype for key, t in run.save(tmp_path).items() if "alpha" not in key} == {dtype}
    assert {p.dtype for p in run.network.parameters()} == {dtype}


# -- states


def go_on(run: Run, state: dict[str, Any], how: str, **arguments: str) -> Run:
    """Another run with the state, loaded as our trainer does it, or through a wrapper as data-parallel and compile have
    one."""
    other = Run(**arguments)
    with torch.no_grad():
        for p in other.network.parameters():
            p.add_(1.0)  # as a seed of its own would
    if how == "plain":
        other.network.load_state_dict(state)
    else:
        wrapper = nn.ModuleDict({"module": torch.compile(other.network)})
        keys = {f"module._orig_mod.{key}": value for key, value in state.items()}
        assert wrapper.load_state_dict(keys) == nn.modules.module._IncompatibleKeys([], [])
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    return other


@pytest.mark.parametrize("how", ["plain", "wrapped"])
@pytest.mark.parametrize("files", ["only", "off"])
def test_a_run_goes_on_bit_for_bit(how: str, files: str, tmp_path: Path) -> None:
    run = Run(ema_save=files)
    for _ in range(3):
        run.step()
    state = {key: value.clone() for key, value in run.network.state_dict().items()}
    other = go_on(run, state, how, ema_save=files)
    assert other.network.average.steps == 3
    for one in (run, other):
        for _ in range(3):
            one.step(passes=2)
    mine, theirs = run.network.state_dict(), other.network.state_dict()
    assert mine.keys() == theirs.keys() == state.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    check(averages(run.network), run.wanted())
    one, two = run.save(tmp_path), other.save(tmp_path, "b")
    assert all(torch.equal(one[key], two[key]) for key in one)
    if files == "off":
        check(of_file(one), run.values[-1])


@pytest.mark.parametrize("how", ["plain", "wrapped"])
def test_a_state_of_the_other_kind_of_run(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is loaded, and said: without an average it begins there, with one that nobody wants that is gone."""
    caplog.set_level(logging.INFO)
    plain = Run(ema_decay="0")
    plain.step()
    other = go_on(plain, plain.network.state_dict(), how)
    assert "the state has no average" in caplog.text
    for _ in range(3):
        other.step()
    check(averages(other.network), other.wanted())
    other = go_on(other, other.network.state_dict(), how, ema_decay="0")
    assert "give ema_decay to keep it" in caplog.text and not averages(other.network)


# -- samples


def test_samples_are_drawn_with_the_average_and_nothing_else_is(tmp_path: Path) -> None:
    """A pass without gradients between forward and backward, in inference mode, nested, or broken off: training sees
    the same values, counts and gradients."""
    run = Run()
    for _ in range(4):
        run.step()
    own, wanted = run.own(), run.wanted()
    versions = [p._version for p in run.network.parameters()]
    plain = Run(ema_decay="0", diagnose_steps="0")
    with torch.no_grad():
        for key, p in plain.network.named_parameters():
            p.copy_(torch.from_numpy(wanted[key]))
    for grad in (torch.no_grad, torch.inference_mode):
        with grad():
            torch.testing.assert_close(run.model(signal()), plain.model(signal()))
    run.network.on_step_start()
    loss = run.model(signal()).square().mean()
    with torch.no_grad():
        drawn = run.model(signal())
    with torch.no_grad():
        for key, p in plain.network.named_parameters():
            p.copy_(own[key])
    assert not torch.allclose(plain.model(signal()), drawn)
    loss.backward()
    plain.model(signal()).square().mean().backward()
    for (key, p), q in zip(run.network.named_parameters(), plain.network.parameters(), strict=True):
        assert torch.equal(p, own[key]) and torch.equal(p.grad, q.grad), key
    assert versions == [p._version for p in run.network.parameters()]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_a_pass_that_is_broken_off(error: type[BaseException], tmp_path: Path) -> None:
    """Whatever comes next, the parameters have their own values: hooks are not told of Ctrl-C."""

    def fail(*_: Any) -> None:
        raise error

    run = Run(ema_save="also")
    for _ in range(2):
        run.step()
    own, last = run.own(), run.network.adapted_layers[-1].base
    steps: tuple[Callable[[], Any], ...] = (
        run.network.on_step_start,
        run.network.state_dict,
        lambda: run.save(tmp_path),
        lambda: run.model(signal()),
    )
    for then in steps:
        handle = last.register_forward_hook(fail)
        with pytest.raises(error), torch.no_grad():
            run.model(signal())
        handle.remove()
        then()
        assert not run.network.average.in_use
        assert all(torch.equal(p, own[key]) for key, p in run.network.named_parameters())
    check(of_file(run.save(tmp_path)), run.values[-1])


def test_a_compiled_model() -> None:
    """Its graph breaks where values change, in training nowhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    adapter = ALGOS["lora"](Geometry.of(model[0]), 2)
    layer, mean, x = AdaptedLayer("x", model[0], adapter, 1.0), average.Average(DECAY), torch.ones(1, 4)
    layer.attach()
    row: Any = SimpleNamespace(parameters=16)
    mean.is_told = True
    Watch(layer.runtime, average=mean).hook(model)
    torch._dynamo.reset()
    call, whole = torch.compile(model, backend="eager"), torch.compile(model, backend="eager", fullgraph=True)
    for change in (1.0, 3.0):
        mean.follow([(row, layer)])
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(change)
        mean.follow([(row, layer)])
        assert torch.equal(whole(x), model(x))
        with torch.no_grad():
            drawn = call(x)
            assert torch.equal(drawn, model(x))
    assert not torch.equal(drawn, model(x)) and torch.equal(whole(x), model(x))
    torch._dynamo.reset()


# -- files


def test_both_files(tmp_path: Path) -> None:
    """ema_save=also: NAME has the newest values, NAME-ema the average, each in every form; and it goes with NAME."""
    run = Run(algo="dylora", unit="1", ema_save="also", save_also="comfyui", save_dims="1")
    for _ in range(2):
        run.step()
    check(of_file(run.save(tmp_path, "1")), run.values[-1])
    check(of_file(load_file(tmp_path / "1-ema.safetensors")), run.wanted())
    forms = {"", "-comfyui", "-0001", "-ema", "-ema-comfyui", "-ema-0001"}
    assert {path.stem for path in tmp_path.iterdir()} == {f"1{form}" for form in forms}
    assert {form: ema_of(tmp_path / f"1{form}.safetensors") is not None for form in forms} == {
        form: "-ema" in form for form in forms
    }
    own, mean = (load_file(tmp_path / f"1{form}-comfyui.safetensors") for form in ("", "-ema"))
    assert any(not torch.equal(own[key], mean[key]) for key in own)
    (tmp_path / "1.safetensors").unlink()
    run.save(tmp_path, "2")
    assert {path.stem for path in tmp_path.iterdir() if path.stem[0] == "1"} == {"1-0001", "1-ema-0001"}


def test_what_is_trained_at_no_rate_has_no_average(tmp_path: Path) -> None:
    run = Run(network_reg_lrs=r".*\.k=0")
    for _ in range(2):
        run.step()
    found = averages(run.network)
    assert found and not any("_k." in key for key in found)
    check(of_file(run.save(tmp_path)), run.wanted())


# -- the call


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    """Through networks.api, where nothing is called at the start of a pass."""
    torch.manual_seed(0)
    model = toy("wan", blocks=1)["dit"].requires_grad_(False)
    network = api.apply(model, dim=2, ema_decay=DECAY, only_patterns=[r"blocks\.0\.self_attn\..*"])
    optimizer, values = torch.optim.AdamW(network.optimizer_groups(1e-2)), []
    for number in range(8):
        model(signal()).square().mean().backward()
        with torch.no_grad():
            model(signal())
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
            values.append({key: p.detach().double().numpy() for key, p in network.named_parameters()})
    api.save(network, tmp_path / "a.safetensors")
    check(of_file(load_file(tmp_path / "a.safetensors")), recursion(values))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ema_decay": "1"}, "ema_decay=1 "),
        ({"ema_decay": "-0.1"}, "ema_decay=-0.1 "),
        ({"ema_decay": "0", "ema_save": "also"}, "ema_save has no effect without ema_decay"),
        ({"ema_decay": "0", "ema_device": "cpu"}, "ema_device has no effect without ema_decay"),
        ({"ema_save": "both"}, "ema_save=both is none of only, also, off"),
    ],
    ids=str,
)
def test_mistakes(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Run(**arguments)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer_type": "AdamWScheduleFree"},
        {"optimizer_type": "prodigyplus.ProdigyPlusScheduleFree"},
        {"optimizer_type": "AdamW", "optimizer_schedulefree_wrapper": True},
        {"self_flow": True},
    ],
    ids=str,
)
def test_who_has_an_average_of_his_own(options: dict[str, Any]) -> None:
    """It is put into the parameters and taken out again, and each would count as a step."""
    Run(ema_decay="0").network.prepare_network(Namespace(**options))
    with pytest.raises(ValueError, match="leave ema_decay out"):
        Run().network.prepare_network(Namespace(**options))


def test_a_divided_adapter_is_refused() -> None:
    run = Run()
    run.network.adapted_layers[0].adapter.down.data = torch.empty(0)  # as ZeRO 3 and FSDP leave it
    with pytest.raises(ValueError, match="ema_decay does not go with an adapter that is divided over processes"):
        run.network.on_step_start()


def test_the_plan_has_its_bytes() -> None:
    for device, where in (("adapter", ""), ("cpu", " on the CPU")):
        plan = Run(ema_device=device).network.plan
        totals = plan.to_json()["totals"]
        assert totals["average_bytes"] == 4 * totals["learning"] > 0
        assert f" more{where} for the average of what is trained" in plan.to_text()
    assert Run(ema_decay="0").network.plan.to_json()["totals"]["average_bytes"] == 0


def test_text_encoders_and_normalisations(tmp_path: Path) -> None:
    """All parts are averaged, and a pass of each draws with the average."""
    torch.manual_seed(0)
    unet, encoder = sd_unet(), text_encoder()
    network = networks.lora.create_network(1.0, 2, 1, None, encoder, unet, ema_decay="0.5", train_norm="True")
    network.apply_to(encoder, unet, True, True)
    groups, _ = network.prepare_optimizer_params([1e-2], 1e-2, 1e-2)
    network.train()
    optimizer, tokens = torch.optim.AdamW(groups), torch.arange(4)[None]
    for _ in range(2):
        network.on_step_start()
        (draw(unet).square().mean() + encoder(tokens).last_hidden_state.square().mean()).backward()
        optimizer.step()
    found = averages(network)
    assert {key for key, p in network.named_parameters() if p.requires_grad} == found.keys()
    own = {key: p.detach().clone() for key, p in network.named_parameters()}
    with torch.no_grad():
        drawn = draw(unet), encoder(tokens).last_hidden_state
        for key, p in network.named_parameters():
            p.copy_(found[key])
    network.eval()
    for one, other in zip(drawn, (draw(unet), encoder(tokens).last_hidden_state), strict=True):
        assert torch.equal(one, other)
    assert any(not torch.equal(own[key], found[key]) for key in own)
