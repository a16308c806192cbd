"""GLoRA where it differs from the other additive algorithms: its update depends on the base weight."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers_numeric import FORMS, Case, Zoo, assert_close, forced, layers_of, make_input, make_network, randomise
from quantised_layers import IN, OUT, quantised
from safetensors.torch import load_file, save_file
from tiny_parts import draw, sd_unet
from torch import Tensor, nn

import networks.lora
import networks.lycoris
from networks.algos import ALGOS
from networks.files import codec
from networks.files.checkpoint import Checkpoint
from networks.files.merge import CheckpointMerge, MergeInput, merged_weight
from networks.layers.adapted import AdaptedLayer
from networks.layers.runtime import Runtime
from networks.layers.site import Site
from networks.tensors.geometry import Geometry

KINDS = ("linear", "conv1d", "conv_3x3", "conv_strided_dilated", "conv3d")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def on(base: nn.Module, multiplier: float = 0.7, dtype: torch.dtype = torch.float64, dim: int = 4) -> AdaptedLayer:
    """An attached, randomised GLoRA of scale 0.75."""
    adapter = ALGOS["glora"](Geometry.of(base), dim).to(dtype)
    randomise(adapter)
    layer = AdaptedLayer("lora_unet_x", base, adapter, 0.75, runtime=Runtime(multiplier))
    layer.attach()
    return layer


def pair() -> tuple[Zoo, AdaptedLayer]:
    model = Zoo(("linear",))
    return model, on(model.linear)


# -- readers


@pytest.mark.parametrize("rs_lora", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_other_programs_compute_the_same_from_the_file(kind: str, rs_lora: bool) -> None:
    """ComfyUI's formula: alpha / R, W a1 a2 on the channels and b1 b2 on the flattened weight."""
    model = Zoo((kind,))
    network = make_network(Case("glora", rs_lora=rs_lora), model, multiplier=1.0)
    randomise(network)
    layer = layers_of(network)[kind]
    t = {key.rpartition("x.")[2].split(".", 1)[1]: value for key, value in codec.encode([layer]).items()}
    W = model.get_submodule(kind).weight
    scale = float(t["alpha"]) / t["a2.weight"].shape[0]
    A = t["a1.weight"].flatten(1) @ t["a2.weight"].flatten(1)
    B = (t["b1.weight"].flatten(1) @ t["b2.weight"].flatten(1)).reshape(W.shape)
    theirs = scale * (torch.einsum("oi...,ij->oj...", W, A) + B)
    assert_close(layer.new_weight(W) - W, theirs, kind)


def test_a_file_of_the_layout_before_2024_is_refused() -> None:
    base = nn.Linear(8, 12)
    a, b, c, d = torch.randn(2, 8), torch.randn(8, 2), torch.randn(2, 8), torch.randn(12, 2)
    old = {"x.a1.weight": a, "x.a2.weight": b, "x.b1.weight": c, "x.b2.weight": d, "x.alpha": torch.tensor(2.0)}
    with pytest.raises(ValueError, match="before 2024"):
        merged_weight(codec.decode(old)[0]["x"], base.weight)


# -- W, as it is below the adapter


@pytest.mark.parametrize("kind", ("linear", "conv_3x3"))
@pytest.mark.parametrize("order", (("lora", "glora"), ("glora", "lokr"), ("glora", "glora")), ids=str)
def test_several_networks_on_one_layer_are_files_merged_one_after_the_other(
    kind: str, order: tuple[str, str], tmp_path: Path
) -> None:
    """The upper one's W is what the lower one has made of the weight."""
    model = Zoo((kind,))
    plain, x = copy.deepcopy(model), make_input(kind)
    weight = plain.get_submodule(kind).weight
    networks_ = []
    for algo in order:
        network = make_network(Case(algo), model)
        randomise(network)
        network.attach()
        networks_.append(network)
        saved = codec.decode({k: v.detach() for k, v in codec.encode(network.adapted_layers).items()})[0]
        weight = merged_weight(saved[f"lora_unet_{kind}"], weight, 0.7)
    with torch.no_grad():
        plain.get_submodule(kind).weight.copy_(weight)
        expected = plain.get_submodule(kind)(x)
        for form in FORMS:
            with forced(form, *networks_):
                assert_close(model.get_submodule(kind)(x), expected, form)
    y = model.get_submodule(kind)(x)
    y.square().sum().backward()
    assert all(p.grad is not None for network in networks_ for p in network.parameters())
    for network in networks_:
        network.detach()
        network.merge()
    assert_close(model.get_submodule(kind)(x), expected, "merged")


def test_several_modules_are_the_fused_layer() -> None:
    """With rows in another order than the modules; DoRA on both sides."""
    for side in ("", "output", "input"):
        torch.manual_seed(1)
        whole = nn.Linear(20, 48).double().requires_grad_(False)
        order = ((20, 30), (0, 20), (30, 48))
        modules = []
        for start, stop in order:
            module = nn.Linear(20, stop - start).double().requires_grad_(False)
            module.weight.copy_(whole.weight[start:stop])
            module.bias.copy_(whole.bias[start:stop])
            modules.append(module)
        adapter = ALGOS["glora"](Geometry.of(whole), 3).double()
        randomise(adapter)
        one = AdaptedLayer("x", whole, adapter, 0.5, runtime=Runtime(0.7), dora=side).double()
        sites = [Site(module, (piece,)) for module, piece in zip(modules, order, strict=True)]
        several = AdaptedLayer("x", sites, adapter, 0.5, runtime=Runtime(0.7), dora=side).double()
        if side:
            magnitude = torch.rand_like(one.magnitude) + 0.5
            one.load_magnitude(magnitude)
            several.load_magnitude(magnitude)
        x = torch.randn(2, 5, 20, dtype=torch.float64)
        one.attach()
        y = whole(x)
        several.attach()
        for module, (start, stop) in zip(modules, order, strict=True):
            assert_close(module(x), y[..., start:stop], f"rows {start} to {stop}, DoRA {side}")
        gradients = torch.autograd.grad(sum(m(x).square().sum() for m in modules), list(adapter.parameters()))
        for ours, theirs in zip(
            gradients, torch.autograd.grad(y.square().sum(), list(adapter.parameters())), strict=True
        ):
            assert_close(ours, theirs, "gradient")
        several.detach()
        several.merge()
        for module, (start, stop) in zip(modules, order, strict=True):
            assert_close(module(x), y[..., start:stop], f"merged {start} to {stop}")


def test_the_base_runs_once_on_its_own_input() -> None:
    """Its bias counts once, and hosts that count or hook calls see what they would see without an adapter."""
    base = nn.Linear(16, 24).double()
    own, seen = base.forward, []
    base.forward = lambda x: seen.append(x) or own(x)  # type: ignore[method-assign]
    layer, x = on(base), torch.randn(3, 16, dtype=torch.float64)
    y = base(x)
    assert len(seen) == 1 and seen[0] is x
    W = layer.new_weight(base.weight)
    assert_close(y, x @ W.T + base.bias, "forward")


@pytest.mark.parametrize("mixed", (False, True))
def test_small_updates_survive_half_precision(mixed: bool) -> None:
    """A x of a thousandth of x would be rounded away in x + A x."""
    base = nn.Linear(256, 192).to(torch.bfloat16).requires_grad_(False)
    layer = on(base, 1.0, torch.float32)
    with torch.no_grad():
        layer.adapter.b1.zero_()
        A = layer.adapter.a1 @ layer.adapter.a2
        layer.adapter.a1.mul_(1e-3 * 16 / float(A.norm()))  # |A x| is about |x| / 1000
        A = (layer.adapter.a1 @ layer.adapter.a2).double() * layer.scale
        x = torch.randn(64, 256, dtype=torch.bfloat16)
        exact = x.double() @ A.T @ base.weight.double().T
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            update = layer.update(x)
        rounded = (x + (x.double() @ A.T).to(torch.bfloat16) - x).double() @ base.weight.double().T
    assert float((update.double() - exact).norm() / exact.norm()) < 0.01
    assert float((rounded - exact).norm() / exact.norm()) > 0.3


@pytest.mark.parametrize("form", ("scaled_block_bf16", "bnb_nf4", "bnb_int8", "torchao_int8", "float8_e4m3fn"))
def test_nothing_of_the_weights_size_is_kept_for_backward(form: str) -> None:
    """A quantised weight is decoded again in the backward pass."""
    base = quantised(form)
    layer = on(base, 1.0, torch.float32, dim=2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer.update(torch.randn(3, IN))
    wide = [t for t in kept if t.numel() >= OUT * IN and t.is_floating_point() and t.itemsize > 1]
    assert not wide, f"{form}: {[t.shape for t in wide]}"
    y.square().sum().backward()
    assert layer.adapter.a1.grad is not None and bool(layer.adapter.a1.grad.any())


def test_copies_of_an_adapter_have_no_base() -> None:
    """Or casting one for a merge would copy the model."""
    _, layer = pair()
    layer.update(make_input("linear"))
    assert layer.adapter._on.mine.base is not None
    assert copy.deepcopy(layer.adapter)._on.mine.base is None


# -- through the entries


def test_a_network_trains_and_its_file_gives_the_same_model(tmp_path: Path) -> None:
    unet = sd_unet()
    network = networks.lycoris.create_network(
        1.0, 4, 2, None, None, unet, algo="glora", conv_dim="2", use_scalar="True", loraplus_lr_ratio="4"
    )
    network.apply_to(None, unet, False, True)
    groups, names = network.prepare_optimizer_params(None, 1e-2, 1e-2)
    assert sorted(names) == ["unet", "unet plus"]
    plus = {id(p) for group in groups if group["lr"] == 4e-2 for p in group["params"]}
    assert plus == {id(p) for name, p in network.named_parameters() if name.endswith(("a1", "b1"))}
    optimizer = torch.optim.Adam(groups)
    goal, losses = draw(unet).detach() * 0.9, []
    for _ in range(6):
        loss = (draw(unet) - goal).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    network.eval()
    wanted, file = draw(unet).detach(), str(tmp_path / "a.safetensors")
    network.save_weights(file, torch.float32, {})
    network.detach()
    loaded, weights = networks.lora.create_network_from_weights(1.0, file, None, None, unet)
    loaded.apply_to(None, unet)
    torch.testing.assert_close(draw(unet), wanted, atol=1e-5, rtol=1e-4)
    loaded.detach()
    loaded.merge_to(None, unet, weights, torch.float32, "cpu")
    torch.testing.assert_close(draw(unet), wanted, atol=1e-4, rtol=1e-3)


def test_checkpoints_are_merged_file_after_file(tmp_path: Path) -> None:
    """scripts/merge.py, and what the trainers call for each weight that they load."""
    weight = torch.randn(12, 8, dtype=torch.float64)
    save_file({"blocks.0.q.weight": weight}, tmp_path / "m.safetensors")
    expected, file = weight, {}
    for name in ("a", "b"):
        f = {n: torch.randn(*s, dtype=torch.float64) for n, s in
             (("a1", (8, 2)), ("a2", (2, 8)), ("b1", (12, 2)), ("b2", (2, 8)))}  # fmt: skip
        file = {f"lora_unet_blocks_0_q.{n}.weight": t for n, t in f.items()}
        file["lora_unet_blocks_0_q.alpha"] = torch.tensor(1.0)
        save_file(file, tmp_path / f"{name}.safetensors")
        last = expected
        expected = expected + 0.7 * 0.5 * (expected @ f["a1"] @ f["a2"] + f["b1"] @ f["b2"])
    adapters = [MergeInput.open(tmp_path / f"{name}.safetensors", 0.7) for name in ("a", "b")]
    CheckpointMerge(Checkpoint(tmp_path / "m.safetensors"), adapters).write(tmp_path / "o.safetensors")
    assert_close(load_file(tmp_path / "o.safetensors")["blocks.0.q.weight"], expected, "merge script")
    keys = set(file)
    merged = networks.lycoris.merge_weights_to_tensor(last, "lora_unet_blocks_0_q", file, keys, 0.7, "cpu")
    assert_close(merged, expected, "weight by weight")
    assert not keys
