"""Multiplicative algorithms: OFT, BOFT, IA3 against their definitions and lycoris-lora, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_numeric import assert_close, assert_start, definition, values_of, with_weight
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.ia3 import IA3Module
from tiny_parts import draw, sd_unet
from tiny_parts import randomise as randomise_network
from torch import Tensor, nn

import networks.lora
from networks.algos import ALGOS, Multiplicative, make_adapter
from networks.files import codec, reader
from networks.files.merge import merged_weight
from networks.layers.adapted import AdaptedLayer
from networks.layers.dropout import Dropouts
from networks.layers.max_norm import limit_norms, update_norm
from networks.layers.runtime import Runtime
from networks.layers.site import Site
from networks.tensors import base_weight
from networks.tensors.geometry import Geometry

KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(20, 48), (2, 5, 20)),
    "linear_no_bias": (lambda: nn.Linear(20, 48, bias=False), (6, 20)),
    "conv1d": (lambda: nn.Conv1d(20, 48, 3, stride=2), (2, 20, 9)),
    "conv_1x1": (lambda: nn.Conv2d(20, 48, 1), (2, 20, 3, 4)),
    "conv_3x3": (lambda: nn.Conv2d(20, 48, 3, padding=1), (2, 20, 4, 5)),
    "conv_grouped": (lambda: nn.Conv2d(40, 48, 3, groups=2), (2, 40, 4, 5)),
}
MULTIPLICATIVE = [algo for algo, cls in ALGOS.items() if issubclass(cls, Multiplicative)]
NEEDED = dict.fromkeys(("dim_is_size", "block_share"), {"train_on_input": True})  # beside an option
CASES: list[tuple[str, dict[str, Any]]] = [
    (algo, options)
    for algo in MULTIPLICATIVE
    for options in (
        {},
        *({**NEEDED.get(o, {}), o: v} for o in sorted(ALGOS[algo].spec.options) for v in values_of(ALGOS[algo], o)),
    )
]
CASES.append(("diag-oft", {"train_on_input": True, "constraint": 2**-7, "dim_is_count": True}))
CASES.append(("diag-oft", {"train_on_input": True, "dim_is_size": True, "block_share": True}))


def has_form(kind: str, algo: str, options: dict[str, Any]) -> bool:
    """Whether the algorithm is for such layers: some would mix the groups of a convolution."""
    try:
        ALGOS[algo].layout(Geometry.of(KINDS[kind][0]()), 6, **options)
    except ValueError as error:
        assert "groups of a convolution" in str(error)
        return False
    return True


every_case = pytest.mark.parametrize(("algo", "options"), CASES, ids=str)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def single(kind: str, algo: str, options: dict[str, Any], multiplier: Any = 0.7) -> tuple[AdaptedLayer, Tensor]:
    make, shape = KINDS[kind]
    base = make().double().requires_grad_(False)
    adapter = ALGOS[algo](Geometry.of(base), 6, options).double()
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.3)
    layer = AdaptedLayer("lora_unet_x", base, adapter, 1.0, runtime=Runtime(multiplier))
    return layer, torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "algo", "options"),
    [(kind, *case) for kind in KINDS for case in CASES if has_form(kind, *case)],
    ids=str,
)
def test_forward_merge_and_file_are_the_definition(kind: str, algo: str, options: dict[str, Any]) -> None:
    layer, x = single(kind, algo, options)
    base = layer.base
    plain, W = copy.deepcopy(base), base.weight.clone()
    expected = (W + 0.7 * (definition(layer.adapter, W) - W)).detach()
    assert_close(layer.new_weight(W) - W, expected - W, "new_weight")
    layer.attach()
    y = base(x)
    assert_close(y - plain(x), with_weight(plain, expected)(x) - plain(x), "forward")
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    assert_close(update_norm(layer), (definition(layer.adapter, W) - W).norm().detach(), "norm")
    layer.detach()
    saved = codec.decode({k: v.clone() for k, v in codec.encode([layer]).items()})[0]["lora_unet_x"]
    assert saved.algorithm.spec.name == algo
    assert_close(merged_weight(saved, W, 0.7) - W, expected - W, "merge from the file")
    layer.merge()
    assert torch.equal(base.weight, layer.new_weight(W))


@every_case
def test_gradients_are_those_of_the_definition(algo: str, options: dict[str, Any]) -> None:
    layer, x = single("conv_3x3", algo, options)
    x.requires_grad_()
    W, bias = layer.base.weight, layer.base.bias
    values = list(layer.parameters())
    wanted_y = layer.adapter.geometry.op(x, W + 0.7 * (definition(layer.adapter, W) - W)) + bias.reshape(-1, 1, 1)
    upstream = torch.randn_like(wanted_y)
    wanted = torch.autograd.grad(wanted_y, (x, *values), upstream)
    layer.attach()
    for a, b in zip(torch.autograd.grad(layer.base(x), (x, *values), upstream), wanted, strict=True):
        assert_close(a, b, algo)


@every_case
def test_no_base_weight_is_read_in_training(
    algo: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a quantised base needs no decoding; but for rotations of columns with factors behind them."""
    layer, x = single("linear", algo, options)
    layer.attach()
    read, times = base_weight.read, []
    monkeypatch.setattr(base_weight, "read", lambda *args: times.append(1) or read(*args))
    layer.base(x).sum().backward()
    assert bool(times) == (layer.adapter.side == "columns")


@every_case
def test_start_is_the_base_and_multiplier_0_is_bit_exact(algo: str, options: dict[str, Any]) -> None:
    base = nn.Linear(20, 48).requires_grad_(False)
    x, plain = torch.randn(5, 20), copy.deepcopy(base)
    layer = AdaptedLayer("x", base, ALGOS[algo](Geometry.of(base), 6, options), 1.0)
    layer.attach()
    assert_start(base(x), plain(x), algo, "start")
    for p in layer.parameters():
        nn.init.normal_(p)
    layer.runtime.multiplier = 0.0
    assert torch.equal(base(x), plain(x))


@every_case
def test_one_multiplier_per_sample_and_module_dropout(algo: str, options: dict[str, Any]) -> None:
    values = torch.tensor([0.25, -0.5], dtype=torch.float64)
    layer, x = single("conv_3x3", algo, options, values)
    plain = copy.deepcopy(layer.base)
    layer.attach()
    y = layer.base(x)
    for i, value in enumerate(values.tolist()):
        wanted = with_weight(plain, layer.new_weight(plain.weight, value).detach())(x[i : i + 1])
        assert_close(y[i : i + 1], wanted, f"sample {i}")
    layer.runtime.multiplier, layer.dropouts = 1.0, Dropouts(module_dropout=0.5)
    kept = [not torch.allclose(layer.base(x), plain(x)) for _ in range(20)]
    assert any(kept) and not all(kept)


@every_case
def test_several_modules_are_the_fused_layer(algo: str, options: dict[str, Any]) -> None:
    layer, x = single("linear", algo, options)
    whole = layer.base
    pieces = ((0, 20), (20, 30), (30, 48))
    modules = []
    for start, stop in pieces:
        module = nn.Linear(20, stop - start).double().requires_grad_(False)
        module.weight.copy_(whole.weight[start:stop])
        module.bias.copy_(whole.bias[start:stop])
        modules.append(module)
    sites = [Site(module, (piece,)) for module, piece in zip(modules, pieces, strict=True)]
    several = AdaptedLayer("x", sites, layer.adapter, 1.0, runtime=Runtime(0.7))
    layer.attach()
    wanted = whole(x)
    several.attach()
    assert_close(torch.cat([module(x) for module in modules], -1), wanted, "forward")
    several.detach()
    several.merge()
    assert_close(torch.cat([module(x) for module in modules], -1), wanted, "merged")


@every_case
def test_max_norm(algo: str, options: dict[str, Any]) -> None:
    layer, _ = single("linear", algo, options)
    before = float(update_norm(layer))
    count, mean, largest = limit_norms([layer], before * 0.3)
    assert count == 1 and mean == largest == pytest.approx(before * 0.3)
    assert float(update_norm(layer)) <= before * 0.3 * (1 + 1e-5)
    assert limit_norms([layer], before)[0] == 0


LYCORIS = {"diag-oft": DiagOFTModule, "boft": ButterflyOFTModule, "ia3": IA3Module}


@torch.no_grad()
def lycoris_weight(layer: AdaptedLayer, kind: str, strength: float) -> Tensor:
    """What lycoris-lora makes of the file."""
    base, W = KINDS[kind][0](), layer.base.weight  # its own matrices are fp32
    base.weight.copy_(W)
    saved = {key: t.float() for key, t in codec.encode([layer]).items()}
    alpha = saved.pop("lora_unet_x.alpha")
    t = {key.rpartition(".")[2]: value for key, value in saved.items()}
    cls = LYCORIS[layer.adapter.spec.name]
    if cls is IA3Module:
        module = IA3Module("x", base, 1.0, train_on_input=bool(t["on_input"]))
        module.weight.data.copy_(t["weight"].reshape(module.weight.shape))
    else:
        module = cls.make_module_from_state_dict("x", base, t["oft_blocks"], t.get("rescale"), alpha)
        module.oft_blocks.data.copy_(t["oft_blocks"])
    return module.get_merged_weight(strength)[0].detach().reshape(W.shape)


@pytest.mark.parametrize("kind", ["linear", "conv_1x1", "conv_3x3"])
@pytest.mark.parametrize(
    ("algo", "options"),
    [c for c in CASES if c[0] in LYCORIS and (c[0] == "ia3" or c[1].keys() <= {"constraint", "rescaled"})],
    ids=str,
)
def test_lycoris_reads_the_same_weight(algo: str, options: dict[str, Any], kind: str) -> None:
    """At strength 1; at others, too, where it is in proportion there: not in stages, and not with factors by row."""
    layer, _ = single(kind, algo, options)
    W = layer.base.weight
    for strength in (1.0, 0.5):
        wanted = layer.new_weight(W, strength).detach() - W
        theirs = lycoris_weight(layer, kind, strength) - W
        if strength == 1 or not (algo == "boft" or options.get("rescaled")):
            assert_close(theirs, wanted, algo, 1e-5)
        else:
            assert float((theirs - wanted).norm() / wanted.norm()) > 0.02


@pytest.mark.parametrize("algo", MULTIPLICATIVE)
def test_a_network_trains_and_its_file_loads(algo: str, tmp_path: Path) -> None:
    unet = sd_unet()
    kwargs = {"constraint": "0.03125"} if algo == "diag-oft" else {}
    network = networks.lora.create_network(1.0, 16, 1, None, None, unet, algo=algo, conv_dim="16", **kwargs)
    network.apply_to(None, unet, False, True)
    groups, _ = network.prepare_optimizer_params(None, 1e-2, 1e-2)
    optimizer = torch.optim.SGD(groups)
    goal, losses = draw(unet).detach() * 0.9, []
    for _ in range(4):
        loss = (draw(unet) - goal).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    randomise_network(network)
    wanted, file = draw(unet).detach(), str(tmp_path / "a.safetensors")
    network.save_weights(file, torch.float32, {})
    if algo == "diag-oft":
        alphas = {float(t) for k, t in reader.read_tensors(file)[0].items() if k.endswith("alpha")}
        assert alphas == {0.03125}
    network.detach()
    loaded, weights = networks.lora.create_network_from_weights(1.0, file, None, None, unet)
    loaded.apply_to(None, unet)
    torch.testing.assert_close(draw(unet), wanted)
    loaded.detach()
    loaded.merge_to(None, unet, weights, torch.float32, "cpu")
    torch.testing.assert_close(draw(unet), wanted, atol=1e-4, rtol=1e-4)


def test_what_does_not_go_together() -> None:
    for kwargs, message in (
        ({"algo": "diag-oft", "use_dora": "True"}, "use_dora"),
        ({"algo": "boft", "ggpo_sigma": "0.1", "ggpo_beta": "0.1"}, "ggpo_sigma"),
        ({"algo": "lora", "constraint": "0.1"}, "constraint"),
    ):
        with pytest.raises(ValueError, match=message):
            networks.lora.plan(16, 1, None, sd_unet(), **kwargs)
    (told,) = networks.lora.plan(16, 1, None, sd_unet(), algo="ia3", dropout="0.1").warnings
    assert "dropout" in told and "no trained layer has a rank activation" in told
    with pytest.raises(ValueError, match="boft has no blocks of up to 4 for .* use network_dim="):
        networks.lora.plan(4, 1, None, unet_of_48(), algo="boft")


@pytest.mark.parametrize(("algo", "dim"), [("boft", 6), ("diag-oft", 4)])
def test_rows_of_different_groups_are_not_mixed(algo: str, dim: int) -> None:
    """A row reads the inputs of its own group: turning it into another group's has no weight of this shape."""
    with pytest.raises(ValueError, match="mix the 2 groups of a convolution"):
        ALGOS[algo](Geometry.of(nn.Conv2d(40, 36, 3, groups=2)), dim)


def unet_of_48() -> nn.Module:
    """A UNet whose layers have 48 = 6 * 2^3 outputs."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(48, 48), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


@pytest.mark.parametrize("algo", ["diag-oft", "boft"])
def test_a_small_rotation_is_not_lost_in_bf16(algo: str) -> None:
    """T y - y would keep the digits of y only, which are 2^-8 apart; (T - 1) y keeps its own."""
    base = nn.Linear(20, 48, bias=False).to(torch.bfloat16).requires_grad_(False)
    adapter = ALGOS[algo](Geometry.of(base), 6)
    for p in adapter.parameters():
        nn.init.normal_(p, std=1e-4)
    y = torch.randn(64, 48).to(torch.bfloat16)
    exact = adapter.double().change(y.double(), -1).detach()
    assert_close(adapter.change(y, -1).detach().double(), exact, "change", 2e-2)
    assert float(exact.norm() / y.double().norm()) < 2e-3


def test_boft_compiles_whole() -> None:
    base = nn.Linear(20, 48).requires_grad_(False)
    layer = AdaptedLayer("x", base, ALGOS["boft"](Geometry.of(base), 6, {"rescaled": True}), 1.0)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.1)
    layer.attach()
    x = torch.randn(5, 20)
    wanted = torch.autograd.grad(base(x).square().sum(), list(layer.parameters()))
    compiled = torch.compile(lambda x: base(x).square().sum(), backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(x), list(layer.parameters())), wanted, strict=True):
        assert_close(a, b, "gradient", 1e-5)


def test_a_file_of_the_input_side(tmp_path: Path) -> None:
    """Saved under keys of its own, loaded, merged, and refused where the output is rotated."""
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 4, 1, None, None, unet, algo="diag-oft", train_on_input="True")
    network.apply_to(None, unet, False, True)
    randomise_network(network)
    wanted, file = draw(unet).detach(), str(tmp_path / "a.safetensors")
    network.save_weights(file, None, {})
    assert {key.partition(".")[2] for key in reader.read_tensors(file)[0]} == {"oft_R.weight"}
    network.detach()
    loaded, tensors = networks.lora.create_network_from_weights(1.0, file, None, None, unet)
    loaded.apply_to(None, unet)
    torch.testing.assert_close(draw(unet), wanted)
    loaded.detach()
    other = networks.lora.create_network(1.0, 4, 1, None, None, unet, algo="diag-oft")
    with pytest.raises(ValueError, match="the file has train_on_input=True, this network has the other"):
        other.load_weights(file)
    loaded.merge_to(None, unet, tensors, torch.float32, "cpu")
    torch.testing.assert_close(draw(unet), wanted, atol=1e-4, rtol=1e-4)


# -- factors by row are learnt as differences from 1


def rotation(algo: str, rescaled: bool = True) -> Any:
    base = nn.Linear(20, 48)
    if algo == "split":
        return make_adapter(ALGOS["diag-oft"], Geometry.of(base), 6, {"rescaled": rescaled}, (12, 12, 24))
    return ALGOS[algo](Geometry.of(base), 6, {"rescaled": rescaled})


def times_rows(adapter: Any, algo: str, rows: Tensor, W: Tensor) -> Tensor:
    """r T W, with T of a rotation without factors that has the same blocks."""
    plain = rotation(algo, rescaled=False).double()
    blocks = [p for name, p in adapter.named_parameters() if name.endswith("blocks")]
    with torch.no_grad():
        for p, own in zip(plain.parameters(), blocks, strict=True):
            p.copy_(own)
    return rows.double().reshape(-1, 1) * plain.new_weight(W).detach()


every_rotation = pytest.mark.parametrize("algo", ["diag-oft", "boft", "split"])


@every_rotation
def test_factors_by_row_move_in_bf16(algo: str) -> None:
    """The 1 itself has neighbours 2^-8 and 2^-7 away there: no step of 1e-4 would reach them."""
    base = nn.Linear(20, 48).to(torch.bfloat16).requires_grad_(False)
    layer = AdaptedLayer("x", base, rotation(algo).to(torch.bfloat16), 1.0)
    x, plain = torch.randn(32, 20).to(torch.bfloat16), copy.deepcopy(base)
    layer.attach()
    assert torch.equal(base(x), plain(x)), "step 0"
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4)
    for _ in range(10):
        (base(x) - plain(x) * 1.5).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = layer.adapter.pack()["rescale"].flatten()
    assert len(rows) == 48 and rows.dtype == torch.float32
    assert bool(((rows > 1.0005) & (rows < 1.0015)).all()), "10 steps of the learning rate towards the goal"


@every_rotation
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_live_state_with_factors_of_an_earlier_version_goes_on(algo: str, dtype: torch.dtype) -> None:
    """It had the factors themselves, in the place where an optimizer now finds their differences from 1."""
    adapter = rotation(algo).to(dtype)
    whole = {"blocks": "blocks", "rescale_change": "rescale"}
    prefixes = [f"parts.{i}." for i in range(3)] if algo == "split" else [""]
    assert [name for name, _ in adapter.named_parameters()] == [prefix + own for prefix in prefixes for own in whole]
    base = nn.Linear(20, 48).double().requires_grad_(False)
    layer = AdaptedLayer("x", base, adapter, 1.0)
    older, rows = {"live_scale": torch.tensor(1.0, dtype=torch.float64)}, []
    for prefix in prefixes:
        for own, was in whole.items():
            like = adapter.get_parameter(prefix + own)
            older[f"adapter.{prefix}{was}"] = torch.randn_like(like).mul_(0.1).add_(was == "rescale").detach()
        rows.append(older[f"adapter.{prefix}rescale"].flatten())
    layer.load_state_dict(copy.deepcopy(older))
    assert torch.equal(adapter.pack()["rescale"].flatten().to(dtype), torch.cat(rows)), "not a digit is lost"
    W = base.weight
    assert_close(adapter.double().new_weight(W).detach(), times_rows(adapter, algo, torch.cat(rows), W), "weight")


@every_rotation
def test_factors_by_row_in_a_file(algo: str) -> None:
    """They stand there as they act; a limit of the norm brings them back towards 1."""
    adapter = rotation(algo).double()
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.2)
    W = nn.Linear(20, 48).double().weight.detach()
    saved = {key: t.clone() for key, t in adapter.pack().items()}
    assert_close(adapter.new_weight(W).detach(), times_rows(adapter, algo, saved["rescale"], W), "weight")
    other = rotation(algo).double()
    other.unpack_(saved)
    for a, b in zip(adapter.parameters(), other.parameters(), strict=True):
        assert_close(b.detach(), a.detach(), "unpacked")
    adapter.shrink_(0.5)
    assert_close(adapter.pack()["rescale"] - 1, (saved["rescale"] - 1) / 2, "shrunk")


@pytest.mark.parametrize("algo", ["diag-oft", "boft"])
def test_a_network_takes_such_a_state(algo: str, caplog: pytest.LogCaptureFixture) -> None:
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 16, 1, None, None, unet, algo=algo, rescaled="True")
    network.apply_to(None, unet, False, True)
    randomise_network(network)
    wanted, state = draw(unet).detach(), {}
    for key, tensor in network.state_dict().items():
        change = key.endswith(".rescale_change")
        state[key.removesuffix("_change")] = tensor.clone() + change
    randomise_network(network, 0.2)
    with caplog.at_level("INFO"):
        assert str(network.load_state_dict(state)) == "<All keys matched successfully>"
    assert any("of an earlier version" in record.message for record in caplog.records)
    torch.testing.assert_close(draw(unet), wanted)
