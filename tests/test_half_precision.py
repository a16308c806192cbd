"""What hosts cast to half precision: no number is lost that is not spoken of, and what was lost before still loads."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_numeric import ADDITIVE, assert_close, options_for, randomise
from safetensors.torch import load_file, save_file
from tiny_parts import draw, sd_unet
from torch import Tensor, nn
from toy_models import signal, toy

import networks.lora
import networks.lora_wan
from networks.algos import ALGOS
from networks.algos.additive import AdditiveParts
from networks.cli import show
from networks.files import codec
from networks.layers.adapted import AdaptedLayer
from networks.layers.runtime import Runtime
from networks.tensors.fused import unfused
from networks.tensors.geometry import Geometry
from networks.tensors.norms import layer_geometry

SIDES = ("output", "input")
DORA = [algo for algo in ADDITIVE if "use_dora" in ALGOS[algo].spec.features]
CASTS: dict[str, tuple[torch.dtype, Callable[[nn.Module], Any]]] = {
    "to": (torch.bfloat16, lambda module: module.to(torch.bfloat16)),
    "to_with_device": (torch.bfloat16, lambda module: module.to("cpu", torch.bfloat16, non_blocking=True)),
    "bfloat16": (torch.bfloat16, lambda module: module.bfloat16()),
    "half": (torch.float16, lambda module: module.half()),
    "type": (torch.float16, lambda module: module.type(torch.float16)),
    "around": (torch.bfloat16, lambda module: nn.ModuleDict({"network": module}).to(torch.bfloat16)),
    "twice": (torch.bfloat16, lambda module: module.half().bfloat16()),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layer_on(base: nn.Module, algo: str = "lora", side: str = "output", runtime: Runtime | None = None) -> AdaptedLayer:
    adapter = ALGOS[algo](Geometry.of(base), 4, options_for(algo, {}))
    return AdaptedLayer("x", base, adapter, 1.0, runtime=runtime, dora=side)


# -- magnitudes


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("algo", DORA)
def test_a_cast_network_starts_at_the_base_model_bit_for_bit(algo: str, side: str, cast: str) -> None:
    dtype, change = CASTS[cast]
    base = nn.Linear(48, 40).to(dtype).requires_grad_(False)
    x = torch.randn(7, 48, dtype=dtype)
    before = base(x)
    layer = layer_on(base, algo, side)
    layer.attach()
    lengths = layer.magnitude.clone()
    change(layer)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer.magnitude.dtype == torch.float32 and torch.equal(layer.magnitude, lengths)
    assert torch.equal(base(x), before)


def test_the_start_follows_wider_dtypes_and_devices() -> None:
    layer = layer_on(nn.Linear(48, 40).requires_grad_(False))
    start = layer.magnitude_start.clone()
    for change, dtype in (("double", torch.float64), ("bfloat16", torch.float32), ("float", torch.float32)):
        getattr(layer, change)()
        assert layer.magnitude_start.dtype == dtype and torch.equal(layer.magnitude_start.float(), start)
    layer.half().to("meta")
    assert layer.magnitude_start.is_meta and layer.magnitude_start.dtype == torch.float32
    layer.to_empty(device="cpu")
    assert layer.magnitude_start.device.type == "cpu" and layer.magnitude_start.dtype == torch.float32


def moved(side: str, pissa: bool = False, fp32: bool = False) -> dict[str, float]:
    """Kind of value -> share of the elements that a training of 40 steps at 1e-4 in bf16 has moved."""
    model = nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 96)).bfloat16().requires_grad_(False)
    x = torch.randn(32, 96).bfloat16()
    target = model(x).float() + 0.1 * torch.randn(32, 96)
    layers = []
    for base in (model[0], model[2]):
        layer = layer_on(base, "lora", side, Runtime(keeps_fp32=fp32))
        if pissa:
            layer.adapter.defer_init_(1.0)
        layer.attach()
        layers.append(layer.bfloat16())
    names, values = zip(*((n, p) for layer in layers for n, p in layer.named_parameters()), strict=True)
    starts, optimizer = copy.deepcopy(values), torch.optim.AdamW(values, lr=1e-4)
    for _ in range(40):
        (model(x).float() - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    counts: dict[str, list[int]] = {}
    for name, p, start in zip(names, values, starts, strict=True):
        found = counts.setdefault(name.rpartition(".")[2], [0, 0])
        found[0], found[1] = found[0] + int((p != start).sum()), found[1] + p.numel()
    return {kind: a / b for kind, (a, b) in counts.items()}


@pytest.mark.parametrize("side", SIDES)
def test_magnitudes_move_as_the_factors_do(side: str) -> None:
    """0 of 3040 elements did when a magnitude was learnt as a whole."""
    shares = moved(side)
    assert shares["magnitude_change"] > 0.99 and shares["up"] > 0.99


def test_factors_with_a_start_from_the_base_weight_move() -> None:
    """Half of them did as whole factors."""
    shares = moved("", pissa=True)
    assert shares["down"] > 0.99 and shares["up"] > 0.99


def test_fp32_adapters_move_every_value() -> None:
    assert set(moved("output", fp32=True).values()) == {1.0}


# -- live states of earlier versions


class Whole(nn.Module):
    """DoRA by its definition, with parameters in the order and of the shapes which earlier versions had."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, start: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.W, self.b = base.weight.clone(), base.bias.clone()
        self.start = start
        if start is None:
            self.magnitude = nn.Parameter(self.W.norm(dim=1, keepdim=True))
        self.down, self.up = nn.Parameter(down.clone()), nn.Parameter(up.clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.start is not None:
            return F.linear(x, self.W + self.up @ self.down - self.start[1] @ self.start[0], self.b)
        whole = self.W + self.up @ self.down
        return F.linear(x, whole * (self.magnitude / whole.norm(dim=1, keepdim=True).detach()), self.b)

    def state(self) -> dict[str, Tensor]:
        """As a network of such a layer had it."""
        tensors = {"x.adapter.down": self.down, "x.adapter.up": self.up, "x.live_scale": torch.tensor(1.0).double()}
        if self.start is None:
            return tensors | {"x.magnitude": self.magnitude}
        return tensors | {"x.adapter.start_down": self.start[0], "x.adapter.start_up": self.start[1]}


@pytest.mark.parametrize("walk", ("network", "torch"))
@pytest.mark.parametrize("kind", ("dora", "pissa"))
def test_an_earlier_live_state_goes_on_where_it_was(kind: str, walk: str) -> None:
    """With the moments of its optimizer, which go by order: the next steps are those of the definition."""
    base = nn.Linear(24, 20).double().requires_grad_(False)
    down = torch.randn(4, 24, dtype=torch.float64)
    up = torch.zeros(20, 4, dtype=torch.float64) if kind == "dora" else torch.randn(20, 4, dtype=torch.float64)
    theirs = Whole(base, down, up, None if kind == "dora" else (down.clone(), up.clone()))
    x, target = torch.randn(9, 24, dtype=torch.float64), torch.randn(9, 20, dtype=torch.float64)

    def step(model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer) -> None:
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        step(theirs, reference)
    state, moments = copy.deepcopy(theirs.state()), copy.deepcopy(reference.state_dict())
    ours = layer_on(base, "lora", "output" if kind == "dora" else "").double()
    if kind == "pissa":
        ours.adapter.defer_init_(1.0)
    ours.attach()
    if walk == "network":  # copied by name, as Network does
        ours.renew_state(state, "x.")
        own = {f"x.{name}": tensor for name, tensor in ours.state_dict(keep_vars=True).items()}
        assert own.keys() == state.keys()
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
        ours.see_state(state["x.live_scale"])
    else:
        nn.ModuleDict({"x": ours}).load_state_dict(state, strict=True)
    if kind == "dora":
        assert torch.equal(ours.magnitude, theirs.magnitude)
    assert_close(base(x), theirs(x), "after loading")
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2, weight_decay=0.0)
    optimizer.load_state_dict(moments)
    for _ in range(3):
        step(base, optimizer)
        step(theirs, reference)
    assert_close(base(x), theirs(x), "three steps later")
    assert not torch.allclose(base(x), F.linear(x, base.weight, base.bias))


def test_an_earlier_live_state_of_a_network() -> None:
    """Through `load_state_dict`, before and after the network is applied; the state itself is left as it is."""
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 4, 2, None, None, unet, use_dora="True")
    network.apply_to(None, unet, False, True)
    randomise(network)
    wanted = draw(unet).detach()
    state = network.state_dict()
    for layer in network.adapted_layers:
        state[f"{layer.lora_name}.magnitude"] = layer.magnitude.detach()
        del state[f"{layer.lora_name}.magnitude_start"], state[f"{layer.lora_name}.magnitude_change"]
    keys = list(state)
    network.detach()
    for first in (True, False):
        again = networks.lora.create_network(1.0, 4, 2, None, None, unet, use_dora="True")
        if first:
            again.load_state_dict(state)
        again.apply_to(None, unet, False, True)
        if not first:
            again.load_state_dict(state)
        assert torch.equal(draw(unet), wanted) and list(state) == keys
        again.detach()


def test_an_earlier_live_state_of_split_parts() -> None:
    adapter = AdditiveParts(ALGOS["lora"], Geometry.of(nn.Linear(8, 12)), 2, (8, 4), {})
    adapter.defer_init_(1.0)
    today = {f"a.{name}": torch.randn_like(tensor) for name, tensor in adapter.state_dict().items()}
    then = dict(today)
    for part in ("a.parts.0.", "a.parts.1."):
        for name in ("down", "up"):
            then[f"{part}start_{name}"] = then.pop(f"{part}{name}0")
            then[part + name] = then[part + name] + then[f"{part}start_{name}"]
    adapter.renew_state(then, "a.")
    assert then.keys() == today.keys()
    for name, tensor in today.items():
        torch.testing.assert_close(then[name], tensor)
    adapter.renew_state(then, "a.")  # one of today stays
    assert all(torch.equal(then[name], tensor) for name, tensor in then.items())


def test_what_a_file_holds_is_where_training_goes_on() -> None:
    """Not a bit of it is lost, in a network that is cast before or after."""
    lengths = torch.rand(40, 1) * 30 + 1e-3
    for first in (True, False):
        layer = layer_on(nn.Linear(48, 40).requires_grad_(False))
        if first:
            layer.bfloat16()
        layer.load_magnitude(lengths)
        layer.bfloat16()
        layer.attach()
        assert torch.equal(layer.magnitude, lengths)


# -- files


LENGTHS = {  # arguments -> ends of the keys that stay in fp32
    "portable": ({"use_dora": "True"}, {"dora_scale"}),
    "input": ({"use_dora": "True", "wd_on_output": "False"}, {"dora_scale"}),
    "blissful": ({"use_dora": "True", "save_format": "blissful"}, {"dora_layer.weight"}),
    "comfyui": ({"use_dora": "True", "save_format": "comfyui"}, {"dora_scale"}),
    "diffusers": ({"use_dora": "True", "save_format": "diffusers"}, {"lora_magnitude_vector.weight"}),
    "oft": ({"algo": "diag-oft", "rescaled": "True"}, {"rescale"}),
    "boft": ({"algo": "boft", "rescaled": "True"}, {"rescale"}),
}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("form", LENGTHS)
def test_lengths_are_saved_in_fp32(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    arguments, wide = LENGTHS[form]
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 16, 2, None, None, unet, preset="attn-only", **arguments)
    network.apply_to(None, unet, False, True)
    randomise(network)
    network.save_weights(str(tmp_path / "a.safetensors"), dtype, {})
    tensors = load_file(tmp_path / "a.safetensors")
    lengths = {key for key in tensors if any(key.endswith(f".{end}") for end in wide)}
    assert len(lengths) >= len(network.adapted_layers)
    for key, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if key in lengths or key.endswith(".alpha") else dtype), key
    if form in ("portable", "input"):
        for layer in network.adapted_layers:
            assert torch.equal(tensors[f"{layer.lora_name}.dora_scale"], layer.magnitude)


TOLD = {torch.bfloat16: 0.0039, torch.float16: 0.00049}  # the largest error, in parts of the value


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_lengths_in_half_precision_are_told_of_others_files(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = torch.linspace(1, 2, 2001)[:, None]
    names = {"portable": "lora_unet_x.dora_scale", "peft": "transformer.x.lora_magnitude_vector"}
    for form, key in names.items():
        a, b = ("lora_A", "lora_B") if form == "peft" else ("lora_down", "lora_up")
        name = key.rpartition(".")[0]
        factors = {f"{name}.{a}.weight": torch.zeros(2, 8), f"{name}.{b}.weight": torch.zeros(2001, 2)}
        for stored in (dtype, torch.float32):
            values = lengths.flatten() if form == "peft" else lengths
            save_file({**factors, key: values.to(stored)}, path := tmp_path / f"{form}.safetensors")
            assert show.main([str(path)]) == 0
            lines = [line for line in capsys.readouterr().out.splitlines() if "magnitudes are in" in line]
            assert len(lines) == (stored is dtype)
        worst = float(((lengths.to(dtype).float() - lengths) / lengths).abs().max())
        assert 0.9 * TOLD[dtype] < worst <= TOLD[dtype] * 1.001
    save_file({**factors, key: lengths.flatten().to(dtype)}, path)
    show.main([str(path)])
    assert f"  1 magnitudes are in {str(dtype)[6:]}, rounded by up to {TOLD[dtype]:.2%}" in capsys.readouterr().out


# -- adapter_dtype


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("algo", [*ALGOS, "pissa"])
def test_every_value_stays_in_fp32(algo: str, cast: str) -> None:
    """Bit for bit, buffers too: none passes through fewer bits."""
    base = nn.LayerNorm(48) if algo == "norm" else nn.Linear(48, 48)
    side = "output" if algo in DORA else ""
    adapter = ALGOS["lora" if algo == "pissa" else algo](layer_geometry(base), 6)
    if algo == "pissa":
        adapter.defer_init_(1.0)
    layer = AdaptedLayer("x", base.requires_grad_(False), adapter, 1.0, runtime=Runtime(keeps_fp32=True), dora=side)
    layer.attach()
    adapter.mark_initialised_()
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.detach().normal_()
    before = copy.deepcopy(dict(layer.state_dict()))
    CASTS[cast][1](layer)
    after = layer.state_dict()
    assert after.keys() == before.keys() and {t.dtype for t in (*layer.parameters(), *layer.buffers())} == {
        torch.float32
    }
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(
        t.is_meta and t.dtype == torch.float32 for t in (*layer.half().to("meta").parameters(), *layer.buffers())
    )


def wan(**arguments: str) -> tuple[Any, nn.Module]:
    """A small stand-in in bf16 with a network on it, cast as a trainer does."""
    model = toy("wan", blocks=1)["dit"].to(torch.bfloat16).requires_grad_(False)
    network = networks.lora_wan.create_arch_network(1.0, 4, 4, None, None, model, **arguments)
    network.apply_to(None, model, False, True)
    return network.train(), model


def step(network: Any, model: nn.Module, autocast: bool = False) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(signal().bfloat16())
    out.float().square().mean().backward()
    return out.detach()


@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("algo", ("lora", "loha", "lokr", "tlora", "full", "diag-oft"))
def test_it_trains_merges_saves_and_resumes(algo: str, autocast: bool, tmp_path: Path) -> None:
    more = {"use_dora": "True"} if algo in DORA else {}
    network, model = wan(algo=algo, adapter_dtype="fp32", **more)
    network.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(network.prepare_optimizer_params(1e-4)[0])
    start = {name: p.clone() for name, p in network.named_parameters()}
    for _ in range(3):
        step(network, model, autocast)
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.dtype == torch.float32 and not torch.equal(p, start[name]) for name, p in network.named_parameters())
    path = tmp_path / "a.safetensors"
    network.save_weights(str(path), None, {})
    assert {t.dtype for t in load_file(path).values()} == {torch.float32}
    again, other = wan(algo=algo, adapter_dtype="fp32", **more)
    again.bfloat16()
    again.load_state_dict(network.state_dict())
    assert all(torch.equal(p, value) for p, value in zip(again.parameters(), network.parameters(), strict=True))
    assert torch.equal(step(again, other), step(network, model))
    weights = [layer.new_weight(layer.whole_weight()).detach() for layer in network.adapted_layers]
    network.detach()
    network.merge_to(None, model, None, torch.bfloat16, "cpu")
    for layer, wanted in zip(network.adapted_layers, weights, strict=True):
        assert torch.equal(layer.base.weight, wanted.bfloat16())


def test_under_accelerate_and_compile() -> None:
    from accelerate import Accelerator

    network, model = wan(use_dora="True", adapter_dtype="fp32")
    randomise(network)
    optimizer = torch.optim.AdamW(network.prepare_optimizer_params(1e-4)[0])
    prepared, optimizer = Accelerator(cpu=True, mixed_precision="bf16").prepare(network.to(torch.bfloat16), optimizer)
    assert all(t.dtype == torch.float32 for t in (*prepared.parameters(), *prepared.buffers()))
    step(network, model)
    optimizer.step()
    torch._dynamo.reset()
    base = network.adapted_layers[0].base
    x = torch.randn(3, base.in_features).bfloat16()
    with unfused():
        wanted = base(x)
    assert torch.equal(torch.compile(base, fullgraph=True, backend="eager")(x), wanted)


# -- what is said


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "adapter_dtype=fp32 keeps" in record.getMessage()]


def test_half_precision_is_spoken_of_once(caplog: pytest.LogCaptureFixture) -> None:
    network, _ = wan()
    with caplog.at_level(logging.WARNING, logger="networks"):
        network.prepare_network(SimpleNamespace(full_bf16=False, full_fp16=False))
        network.to("cpu").float()
        assert not warnings(caplog)
        network.prepare_network(SimpleNamespace(full_bf16=True, full_fp16=False))
        network.to(torch.bfloat16)
        (said,) = warnings(caplog)
    assert said.startswith("--full_bf16: bf16 has two to three digits") and "values above 0.1 stay" in said
    for cast, words in ((torch.bfloat16, "casts the network to bfloat16"), (torch.float16, "NaN of the first step")):
        caplog.clear()
        network, _ = wan()
        with caplog.at_level(logging.WARNING, logger="networks"):
            network.to(cast)
            network.to(cast)
        (said,) = warnings(caplog)
        assert words in said


def test_nothing_is_said_where_nothing_is_rounded(caplog: pytest.LogCaptureFixture) -> None:
    """An fp32 adapter, and networks that only generate."""
    network, model = wan(adapter_dtype="fp32")
    tensors = codec.encode(network.adapted_layers)
    with caplog.at_level(logging.WARNING, logger="networks"):
        network.prepare_network(SimpleNamespace(full_bf16=True))
        network.to(torch.bfloat16)
        made = networks.lora_wan.create_arch_network_from_weights(1.0, tensors, unet=model, for_inference=True)
        made.to(torch.bfloat16)
        networks.lora_wan.create_arch_network_from_weights(1.0, tensors, unet=model).eval().half()
    assert not warnings(caplog)
