"""Start values: `init=` and `init_seed=`."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_numeric import FACTORED, FORMS, assert_close, forced, make_input, make_layer
from quantised_layers import FORMS as STORED
from quantised_layers import quantised
from safetensors.torch import load_file
from tiny_parts import draw, sd_unet
from torch import Tensor, nn
from toy_models import signal, toy

import networks.lora
from networks.algos import ALGOS
from networks.files import codec, reader
from networks.files.merge import merged_weight
from networks.layers.adapted import AdaptedLayer
from networks.layers.dropout import Dropouts
from networks.layers.max_norm import limit_norms, update_norm
from networks.layers.perturbation import Perturbation
from networks.layers.runtime import Runtime
from networks.tensors.geometry import Geometry
from networks.tensors.low_rank import singular
from networks.tensors.seeding import seed_of, seeded

ORTHOGONAL = [
    algo for algo, cls in ALGOS.items() if "init" in cls.spec.features and "orthogonal" not in cls.spec.no_starts
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def network_on(unet: nn.Module, **kwargs: str) -> Any:
    return networks.lora.create_network(1.0, 4, 2, None, None, unet, **kwargs)


def values(network: nn.Module) -> dict[str, Tensor]:
    return {
        name: t.detach().clone() for name, t in itertools.chain(network.named_parameters(), network.named_buffers())
    }


# -- init_seed


@pytest.mark.parametrize("algo", FACTORED)
def test_start_values_depend_on_name_and_seed_alone(algo: str) -> None:
    """Not on what was drawn before, nor on which other layers are trained or in which order."""
    kwargs = {"algo": algo, "conv_dim": "2", "init_seed": "5"}
    whole = values(network_on(sd_unet(), **kwargs))
    torch.manual_seed(1234)
    torch.randn(7)
    again = values(network_on(sd_unet(), **kwargs))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    few = values(network_on(sd_unet(), **kwargs, only_patterns=".*mid_block.*(to_[vq]|conv1)"))
    assert 0 < len(few) < len(whole) / 3
    assert all(torch.equal(whole[name], few[name]) for name in few)
    other = values(network_on(sd_unet(), **{**kwargs, "init_seed": "6"}))
    random = [name for name in whole if whole[name].unique().numel() > 1]
    assert random and not any(torch.equal(whole[name], other[name]) for name in random)
    layers = {name.split(".")[0] for name in random}
    assert len({float(whole[name].double().sum()) for name in random}) == len(random) >= len(layers)


def test_modules_in_another_order_start_alike() -> None:
    unet = sd_unet()
    first = values(network_on(unet, init_seed="5"))
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention._modules = dict(reversed(attention._modules.items()))
    second = values(network_on(unet, init_seed="5"))
    assert list(first) != list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_a_seed_leaves_the_generator_as_it_was() -> None:
    unet = sd_unet()
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    network_on(unet, init_seed="5", init="orthogonal")
    assert torch.equal(torch.randn(4), expected)
    with seeded(1):
        a = torch.randn(3)
    with seeded(1):
        assert torch.equal(torch.randn(3), a)
    assert len({seed_of(name, seed) for name in "ab" for seed in (0, 1)}) == 4
    assert all(0 <= seed_of("x", seed) < 2**63 for seed in range(50))


def test_without_a_seed_the_trainers_decides() -> None:
    torch.manual_seed(3)
    first = values(network_on(sd_unet()))  # the model is made at a seed of its own
    second = values(network_on(sd_unet()))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_plan_and_a_network_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = toy("flux")["dit"]
        network = networks.lora.create_network(1.0, 4, 2, None, None, model, init_seed="5", init="orthogonal")
    assert all(p.is_meta for p in network.parameters())
    made = networks.lora.create_network(1.0, 4, 2, None, None, model, init_seed="5", init="orthogonal")
    assert not any(p.is_meta for p in made.parameters())


# -- orthogonal


def orthonormal(p: Tensor) -> bool:
    flat = p.flatten(1).double()
    small = flat @ flat.T if flat.shape[0] <= flat.shape[1] else flat.T @ flat
    return bool((small - torch.eye(len(small), dtype=torch.float64)).abs().max() < 1e-5)


@pytest.mark.parametrize("algo", ORTHOGONAL)
def test_orthogonal_factors_and_a_start_at_the_base(algo: str) -> None:
    unet = sd_unet()
    before = draw(unet)
    network = network_on(unet, algo=algo, init="orthogonal", conv_dim="2")
    network.apply_to(None, unet, False, True)
    assert torch.equal(draw(unet), before)
    for layer in network.adapted_layers:
        random = {name: p for name, p in layer.adapter.named_parameters() if bool(p.any())}
        assert random and all(orthonormal(p) for p in random.values()), layer.lora_name
    plain = network_on(sd_unet(), algo=algo, conv_dim="2")
    assert not all(orthonormal(p) for p in plain.parameters() if bool(p.any()))


def test_orthogonal_with_a_scalar_tucker_and_split_parts() -> None:
    network = network_on(sd_unet(), init="orthogonal", use_scalar="True", use_tucker="True", conv_dim="2")
    assert all(orthonormal(p) for p in network.parameters() if p.dim() > 1)
    assert not any(p.item() for p in network.parameters() if p.dim() == 0)
    split = networks.lora.create_network(1.0, 2, 1, None, None, toy("flux")["dit"], init="orthogonal", split_qkv="True")
    assert all(orthonormal(p) for p in split.parameters() if bool(p.any()))


def test_more_ranks_than_columns_have_orthonormal_columns() -> None:
    adapter = ALGOS["lora"](Geometry.of(nn.Linear(6, 9)), 8)
    adapter.orthogonal_()
    assert orthonormal(adapter.down) and adapter.down.shape == (8, 6)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"algo": "loha", "init": "orthogonal"}, "a Hadamard product has no orthogonal rows"),
        ({"algo": "loha", "init": "pissa"}, "the difference of two Hadamard products is none"),
        ({"algo": "lokr", "init": "pissa"}, "the difference of two Kronecker products is none"),
        ({"algo": "glora", "init": "pissa"}, "from a start at 0"),
        ({"algo": "loha", "init": "milora"}, "the difference of two Hadamard products is none"),
        ({"algo": "lokr", "init": "urae"}, "init=milora does not go with algo=lokr: the difference of two Kronecker"),
        ({"algo": "glora", "init": "milora"}, "from a start at 0"),
        ({"algo": "dylora", "init": "milora"}, "no nested ranks"),
        ({"algo": "tlora", "init": "milora"}, "start values of its own"),
        ({"init": "milora", "use_tucker": "True", "conv_dim": "2"}, "no core for a part of a kernel"),
        ({"algo": "dylora", "init": "pissa"}, "no nested ranks"),
        ({"algo": "boft", "init": "orthogonal"}, "init"),
        ({"init": "ortogonal"}, "did you mean orthogonal"),
        ({"algo": "ia3", "init_seed": "1"}, "init_seed"),
    ],
    ids=str,
)
def test_refused_with_the_reason(kwargs: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        networks.lora.plan(48, 1, None, sd_unet(), **kwargs)


# -- PiSSA


def pissa_layer(
    base: nn.Module,
    algo: str = "lora",
    dim: int = 4,
    scale: float = 0.75,
    moved: float = 0.3,
    init: str = "pissa",
    **kwargs: Any,
) -> AdaptedLayer:
    """An attached layer in float64 that has started from its base weight, and has trained since if `moved`."""
    adapter = ALGOS[algo](Geometry.of(base), dim).double()
    adapter.defer_init_(scale, init)
    layer = AdaptedLayer("lora_unet_x", base, adapter, scale, runtime=Runtime(0.7), **kwargs).double()
    layer.attach()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if moved and name.rpartition(".")[2] not in adapter.spec.frozen:
                p.add_(torch.randn_like(p) * moved)
    return layer


def product(layer: AdaptedLayer) -> Tensor:
    """B A of the whole factors, of which the parameters are what has changed since the start."""
    a = layer.adapter
    return torch.einsum("or,r...->o...", (a.up0 + a.up).flatten(1), a.down0 + a.down)


def definition(layer: AdaptedLayer) -> Tensor:
    """s (B A - B0 A0), the start by torch's own SVD of W."""
    W, R = layer.base.weight, layer.adapter.dim
    u, s, vh = torch.linalg.svd(W.flatten(1), full_matrices=False)
    return layer.scale * product(layer) - ((u[:, :R] * s[:R]) @ vh[:R]).reshape(W.shape)


PISSA_KINDS = ("linear", "linear_no_bias", "conv1d", "conv_3x3", "conv_grouped", "conv3d")


@pytest.mark.parametrize("kind", PISSA_KINDS)
def test_the_start_is_the_base_and_its_principal_part(kind: str) -> None:
    base = make_layer(kind)
    weight, x = base.weight.clone(), make_input(kind)
    before = base(x)
    layer = pissa_layer(base, moved=0)
    assert torch.equal(base.weight, weight) and torch.equal(base(x), before)
    assert torch.equal(layer.new_weight(weight), weight)
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    assert_close(layer.scale * product(layer).flatten(1), (u[:, :4] * s[:4]) @ vh[:4], "scale * up . down")


@pytest.mark.parametrize("kind", PISSA_KINDS)
def test_forward_merge_gradients_and_file_are_the_difference_from_the_start(kind: str) -> None:
    base = make_layer(kind)
    plain, x = copy.deepcopy(base), make_input(kind)
    layer = pissa_layer(base)
    W, dW = base.weight, definition(layer)
    assert_close(layer.new_weight(W) - W, 0.7 * dW, "new_weight")
    probe = torch.randn_like(plain(x))
    wanted_y = torch.func.functional_call(plain, {"weight": W + 0.7 * dW}, x)
    wanted = torch.autograd.grad((wanted_y * probe).sum(), (layer.adapter.down, layer.adapter.up))
    for form in FORMS:
        with forced(form, layer):
            y = base(x)
            assert_close(y - plain(x), wanted_y - plain(x), f"forward ({form})")
            found = torch.autograd.grad((y * probe).sum(), (layer.adapter.down, layer.adapter.up))
            for ours, theirs in zip(found, wanted, strict=True):
                assert_close(ours, theirs, f"gradient ({form})")
    t = {key.partition(".")[2]: value for key, value in codec.encode([layer]).items()}
    assert t.keys() == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert t["lora_down.weight"].shape[0] == t["lora_up.weight"].shape[1] == 8 and float(t["alpha"]) == 0.75 * 8
    read = 0.75 * torch.einsum("or,r...->o...", t["lora_up.weight"].flatten(1), t["lora_down.weight"])
    assert_close(read, dW, "what a plain reader computes")
    assert layer.adapter.refactor_error is not None and layer.adapter.refactor_error < 1e-12
    lengths = t["lora_up.weight"].flatten(1).norm(dim=0), t["lora_down.weight"].flatten(1).norm(dim=1)
    assert_close(*lengths, "factors of equal length")


@pytest.mark.parametrize("moved", (1e-1, 1e-3))
def test_half_precision_files_hold_the_difference(moved: float) -> None:
    """[B, -B0] in half precision would round the principal part, and lose a small difference in that."""
    base = make_layer("linear")
    layer = pissa_layer(base, moved=moved)
    dW = definition(layer)
    layer.float()
    a, t = layer.adapter, codec.encode([layer])
    for dtype, bound in ((torch.float16, 1e-3), (torch.bfloat16, 5e-3)):
        low = {key: value.to(dtype) if "lora" in key.partition(".")[2] else value for key, value in t.items()}
        update = merged_weight(codec.decode(low)[0]["lora_unet_x"], base.weight) - base.weight
        error = float((update - dW).norm() / dW.norm())
        stacked = [torch.cat(pair, i).to(dtype).double() for i, pair in
                   ((1, (a.up0 + a.up, a.up0)), (0, (a.down0 + a.down, -a.down0)))]  # fmt: skip
        naive = float((0.75 * stacked[0] @ stacked[1] - dW).norm() / dW.norm())
        assert error < bound and naive > (1 if moved > 0.01 else 20) * error
    assert a.refactor_error < 1e-4 and a.up.dtype == torch.float32


@pytest.mark.parametrize("form", ("bnb_nf4", "bnb_int8", "scaled_block", "torchao_int8"))
def test_quantised_bases_start_from_what_they_stand_for(form: str) -> None:
    base = quantised(form)
    layer = AdaptedLayer("lora_unet_x", base, ALGOS["lora"](Geometry.of(base), 4), 0.5)
    layer.adapter.defer_init_(0.5)
    x = torch.randn(3, base.in_features)
    with torch.no_grad():
        before = base(x)
        layer.attach()
        assert torch.equal(base(x), before)
    u, s, vh = torch.linalg.svd(STORED[form].dense(base), full_matrices=False)
    assert_close(0.5 * product(layer).double(), (u[:, :4] * s[:4]) @ vh[:4], form, 1e-5)


def test_directions_in_which_the_weight_has_nothing_still_learn() -> None:
    """Zero-initialised output layers are common."""
    base = nn.Linear(12, 9).double()
    with torch.no_grad():
        base.weight.zero_()
        base.weight[:2] = torch.randn(2, 12)
    layer = pissa_layer(base, moved=0)
    a, x = layer.adapter, torch.randn(5, 12, dtype=torch.float64)
    base(x).square().sum().backward()
    assert bool((a.up.grad.norm(dim=0) + a.down.grad.norm(dim=1) > 0).all())
    base = nn.Linear(12, 9, bias=False).double()
    with torch.no_grad():
        base.weight.zero_()
    layer = pissa_layer(base, moved=0)
    (base(x) - 1).square().sum().backward()
    assert bool((layer.adapter.up.grad.norm(dim=0) > 0).all()) and not bool(layer.adapter.up0.any())


@pytest.mark.parametrize("side", ("output", "input"))
def test_dora_on_it(side: str) -> None:
    base = make_layer("linear")
    plain, x = copy.deepcopy(base), make_input("linear")
    layer = pissa_layer(base, moved=0, dora=side)
    assert_close(base(x), plain(x), "start")
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.rand_like(p) * 0.2)
    whole = base.weight + definition(layer)
    norms = whole.norm(dim=1 if side == "output" else 0, keepdim=True)
    W = base.weight + 0.7 * (whole * layer.magnitude / norms - base.weight)
    assert_close(base(x), torch.nn.functional.linear(x, W, base.bias), "forward")
    saved = codec.decode({k: v.detach() for k, v in codec.encode([layer]).items()})[0]["lora_unet_x"]
    assert_close(merged_weight(saved, base.weight, 0.7), W.detach(), "file")


def test_dropouts_act_on_the_difference() -> None:
    """Which is 0 at the start: the principal part itself is never dropped. The mean stays the update."""
    for dropouts in (Dropouts(dropout=0.3), Dropouts(rank_dropout=0.3)):
        base = make_layer("linear")
        plain, x = copy.deepcopy(base), make_input("linear")[:1]
        layer = pissa_layer(base, moved=0, dropouts=dropouts).train()
        assert torch.equal(base(x), plain(x))
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(torch.randn_like(p) * 0.3)
            mean = layer.update(x.expand(2000, *x.shape[1:])).mean(0)
            update = layer.eval().update(x)[0]
        assert float((mean - update).norm() / update.norm()) < 0.1


def test_max_norm_goes_back_towards_the_start() -> None:
    base = make_layer("linear")
    layer = pissa_layer(base)
    before = float(update_norm(layer))
    assert before == pytest.approx(float(definition(layer).norm()))
    count, _, largest = limit_norms([layer], before * 0.3)
    assert count == 1 and largest == pytest.approx(before * 0.3, rel=1e-5)
    assert float(definition(layer).norm()) <= before * 0.3 * (1 + 1e-5)
    assert limit_norms([layer], before)[0] == 0


def test_lora_fa_takes_the_directions_and_keeps_its_rank() -> None:
    base = make_layer("linear")
    x = make_input("linear")
    before = base(x)
    layer = pissa_layer(base, "lora_fa", moved=0)
    assert torch.equal(base(x), before)
    _, s, vh = torch.linalg.svd(base.weight, full_matrices=False)
    down = layer.adapter.down
    assert_close(down.norm(dim=1), (s[:4] / 0.75).sqrt(), "lengths")
    assert_close((down / down.norm(dim=1, keepdim=True) @ vh[:4].T).abs(), torch.eye(4).double(), "directions")
    t = codec.encode([layer])
    assert t["lora_unet_x.lora_down.weight"].shape[0] == 4 and layer.adapter.down0 is None


# -- PiSSA through the entries


def trained(unet: nn.Module, steps: int = 3, **kwargs: str) -> tuple[Any, Any, list[float]]:
    network = networks.lora.create_network(1.0, 4, 2, None, None, unet, init="pissa", **kwargs)
    network.apply_to(None, unet, False, True)
    optimizer = torch.optim.AdamW(network.prepare_optimizer_params(None, 1e-3, 1e-3)[0])
    return network, optimizer, train(unet, optimizer, steps)


def train(unet: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = (draw(unet) - 0.1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("rs_lora", ("False", "True"))
def test_a_file_is_plain_lora_of_twice_the_dim(rs_lora: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unet = sd_unet()
    weights, start = {n: p.clone() for n, p in unet.named_parameters()}, draw(unet)
    with caplog.at_level(logging.INFO, logger="networks"):
        network, _, losses = trained(unet, conv_dim="2", rs_lora=rs_lora, init_seed="3")
        assert losses[-1] < losses[0] and losses[0] == float((start - 0.1).square().mean())
        assert all(torch.equal(p, weights[n]) for n, p in unet.named_parameters())
        network.save_weights(tmp_path / "a.safetensors", torch.float32, {})
    assert "at twice their dim" in caplog.text
    tensors, metadata = reader.read_tensors(tmp_path / "a.safetensors")
    told = json.loads(metadata["networks_init"])
    assert told["init"] == ["pissa"] and told["init_seed"] == 3 and told["ranks"] == "2 x dim"
    assert told["refactored_layers"] == len(network.adapted_layers) and told["largest_relative_error"] < 1e-4
    assert {key.partition(".")[2] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert {t.shape[0] for key, t in tensors.items() if "lora_down" in key} == {4, 8}
    wanted = draw(unet).detach()
    network.detach()
    loaded, given = networks.lora.create_network_from_weights(
        1.0, str(tmp_path / "a.safetensors"), None, None, unet, init="pissa", init_seed="3"
    )
    assert any(note.startswith("init, init_seed: not used, the file decides") for note in loaded.plan.notes)
    loaded.apply_to(None, unet)
    torch.testing.assert_close(draw(unet), wanted, atol=1e-5, rtol=1e-4)
    # Further training, as with --dim_from_weights.
    optimizer = torch.optim.AdamW(loaded.prepare_optimizer_params(None, 1e-3, 1e-3)[0])
    more = train(unet, optimizer, 3)
    assert more[-1] < more[0] < losses[0]
    loaded.detach()
    loaded.merge_to(None, unet, given, torch.float32, "cpu")
    torch.testing.assert_close(draw(unet), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("before_apply", (False, True))
def test_resuming_is_lossless(before_apply: bool) -> None:
    """The live state has the start, too: a model that has changed since would give another one."""
    unet = sd_unet()
    network, optimizer, _ = trained(unet)
    state, moments = copy.deepcopy(network.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = train(unet, optimizer, 2)
    network.detach()
    again = networks.lora.create_network(1.0, 4, 2, None, None, unet, init="pissa")
    if before_apply:
        again.load_state_dict(state)
    again.apply_to(None, unet, False, True)
    if not before_apply:
        again.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    optimizer = torch.optim.AdamW(again.prepare_optimizer_params(None, 1e-3, 1e-3)[0])
    optimizer.load_state_dict(moments)
    assert train(unet, optimizer, 2) == expected
    plain = networks.lora.create_network(1.0, 4, 2, None, None, unet)
    with pytest.raises(RuntimeError, match="down0"):
        plain.load_state_dict(state)


def test_files_into_a_network_that_would_start_from_the_weights(tmp_path: Path) -> None:
    """A file is all there is: no start is subtracted, before and after the network is applied. Its own doubled file
    does not fit, and the message names the way."""
    unet = sd_unet()
    plain = network_on(unet)
    plain.apply_to(None, unet, False, True)
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    plain.save_weights(tmp_path / "plain.safetensors", None, {})
    wanted = draw(unet).detach()
    plain.detach()
    for first in (True, False):
        network = networks.lora.create_network(1.0, 4, 1, None, None, unet, init="pissa")
        if first:
            network.load_weights(str(tmp_path / "plain.safetensors"))
        network.apply_to(None, unet, False, True)
        if not first:
            network.load_weights(str(tmp_path / "plain.safetensors"))
        torch.testing.assert_close(draw(unet), wanted, atol=1e-6, rtol=1e-5)
        network.save_weights(tmp_path / "again.safetensors", None, {})
        assert {t.shape[0] for k, t in load_file(tmp_path / "again.safetensors").items() if "lora_down" in k} == {4}
        network.detach()
    network, _, _ = trained(unet)
    network.save_weights(tmp_path / "own.safetensors", None, {})
    with pytest.raises(ValueError, match="--dim_from_weights"):
        network.load_weights(str(tmp_path / "own.safetensors"))


def test_with_reparametrised_lora_plus_and_split_parts(tmp_path: Path) -> None:
    """The same file whichever way the ratio acts; parts start from their own rows."""
    files = []
    for mode in ("lr", "reparam"):
        model = toy("flux")["dit"].requires_grad_(False)
        kwargs = {
            "loraplus_lr_ratio": "8",
            "loraplus_mode": mode,
            "split_qkv": "True",
            "init": "pissa",
            "init_seed": "1",
        }
        network = networks.lora.create_network(1.0, 2, 3, None, None, model, **kwargs)
        start = model(signal())
        network.apply_to(None, model, False, True)
        assert torch.equal(model(signal()), start)
        optimizer = torch.optim.Adam(network.prepare_optimizer_params(None, 1e-3)[0], eps=1e-40)
        for _ in range(3):
            (model(signal()) - 0.3).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        network.save_weights(tmp_path / f"{mode}.safetensors", None, {})
        files.append({k: layer.new_weight(layer.whole_weight()).detach() for k, (_, layer) in network._layers.items()})
        wanted = model(signal()).detach()
        network.detach()
        for split in ("True", "False"):
            loaded, _ = networks.lora.create_network_from_weights(
                1.0, str(tmp_path / f"{mode}.safetensors"), None, None, model, split_qkv=split
            )
            loaded.apply_to(None, model)
            torch.testing.assert_close(model(signal()), wanted, atol=1e-5, rtol=1e-4)
            loaded.detach()
    for name, weight in files[0].items():
        torch.testing.assert_close(files[1][name], weight, atol=1e-5, rtol=1e-4)


def test_weights_that_come_between_creation_and_apply_count_and_missing_ones_are_an_error() -> None:
    unet = sd_unet()
    network = network_on(unet, init="pissa")
    with torch.no_grad():
        for p in unet.parameters():
            p.mul_(2.0)
    before = draw(unet)
    network.apply_to(None, unet, False, True)
    assert torch.equal(draw(unet), before)
    layer = network.adapted_layers[0]
    _, s, _ = torch.linalg.svd(layer.base.weight.flatten(1), full_matrices=False)
    start = layer.adapter.up0.flatten(1) @ layer.adapter.down0.flatten(1)
    found = torch.linalg.matrix_norm(layer.scale * start, 2)
    assert float(found) == pytest.approx(float(s[0]), rel=1e-4)
    with torch.device("meta"):
        model = toy("flux")["dit"]
    networks.lora.plan(4, 2, None, model, init="pissa")
    network = networks.lora.create_network(1.0, 4, 2, None, None, model, init="pissa")
    with pytest.raises(ValueError, match="load the model before"):
        network.apply_to(None, model, False, True)


def test_the_plan_tells_what_it_costs() -> None:
    notes = networks.lora.plan(4, 2, None, sd_unet(), init="pissa").notes
    assert any("init=pissa on 48 layers" in note and "twice the dim" in note for note in notes), notes
    with pytest.raises(ValueError, match="use_tucker has no core"):
        networks.lora.plan(4, 2, None, sd_unet(), init="pissa", use_tucker="True", conv_dim="2")
    with pytest.raises(ValueError, match="use_scalar would start it at 0"):
        networks.lora.plan(4, 2, None, sd_unet(), init="pissa", use_scalar="True")


def test_a_cast_network_still_starts_at_the_base() -> None:
    """Hosts cast networks to half precision after they are applied: start and values are rounded alike."""
    base = nn.Linear(64, 48).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    before = base(x)
    layer = AdaptedLayer("x", base, ALGOS["lora"](Geometry.of(base), 4), 0.5)
    layer.adapter.defer_init_(0.5)
    layer.attach()
    assert torch.equal(base(x), before)
    layer.to(torch.bfloat16)
    assert torch.equal(base(x), before)
    base(x).float().square().sum().backward()
    assert all(bool(p.grad.any()) for p in layer.parameters())


def test_ggpo_sees_the_difference() -> None:
    base = make_layer("linear")
    layer = pissa_layer(base, perturbation=Perturbation(0.5, 0.25))
    base(make_input("linear")).square().sum().backward()
    noise, before = layer.perturbation, definition(layer).detach()
    noise.see_gradients(layer)
    noise.see_weights(layer)
    torch.testing.assert_close(noise.weight_norms, before.norm(dim=1))
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(p.grad, alpha=1e-7)
    change = (definition(layer).detach() - before) / 1e-7
    torch.testing.assert_close(noise.gradient_norms, change.norm(dim=1), rtol=1e-4, atol=1e-6)


def test_it_compiles_in_one_graph() -> None:
    base, x = make_layer("linear"), make_input("linear")
    layer = pissa_layer(base)
    torch._dynamo.reset()
    compiled = torch.compile(base, fullgraph=True, backend="eager")
    assert_close(compiled(x), base(x), "compiled")
    compiled(x).square().sum().backward()
    assert all(bool(p.grad.any()) for p in layer.parameters())
    torch._dynamo.reset()


@pytest.mark.parametrize("dim", (3, 4, 8))
def test_a_dim_near_or_above_the_full_rank(dim: int) -> None:
    """A file has twice the dim still, with empty ranks; above the full rank the others start as by default."""
    base = nn.Linear(6, 5).double().requires_grad_(False)
    plain, x = copy.deepcopy(base), torch.randn(7, 6, dtype=torch.float64)
    layer = pissa_layer(base, dim=dim, moved=0)
    assert torch.equal(base(x), plain(x))
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    t = {key: value.detach() for key, value in codec.encode([layer]).items()}
    assert t["lora_unet_x.lora_down.weight"].shape == (2 * dim, 6)
    merged = merged_weight(codec.decode(t)[0]["lora_unet_x"], base.weight, 0.7)
    assert_close(base(x), torch.nn.functional.linear(x, merged, base.bias), "file")
    assert_close(merged - base.weight, 0.7 * definition(layer).detach(), "definition")


# -- MiLoRA (2406.09044): the same with the smallest singular values


def minor_part(weight: Tensor, rank: int) -> Tensor:
    """By torch's own SVD, in float64."""
    u, s, vh = torch.linalg.svd(weight.detach().double().flatten(1), full_matrices=False)
    return ((u[:, -rank:] * s[-rank:]) @ vh[-rank:]).reshape(weight.shape)


@pytest.mark.parametrize("kind", PISSA_KINDS)
def test_milora_starts_at_the_base_from_its_minor_part(kind: str) -> None:
    base = make_layer(kind)
    weight, x = base.weight.clone(), make_input(kind)
    before = base(x)
    layer = pissa_layer(base, moved=0, init="milora")
    assert torch.equal(base.weight, weight) and torch.equal(base(x), before)
    minor = minor_part(weight, 4)
    assert_close(layer.scale * product(layer), minor, "scale * up . down")
    assert_close(layer.adapter.down0.flatten(1).norm(dim=1), layer.adapter.up0.flatten(1).norm(dim=0), "shared evenly")
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    dW = layer.scale * product(layer) - minor
    assert_close(layer.new_weight(weight) - weight, 0.7 * dW, "W' - W")
    t = {key.partition(".")[2]: value for key, value in codec.encode([layer]).items()}
    assert t["lora_down.weight"].shape[0] == 8 and float(t["alpha"]) == 0.75 * 8
    read = 0.75 * torch.einsum("or,r...->o...", t["lora_up.weight"].flatten(1), t["lora_down.weight"])
    assert_close(read, dW, "what a plain reader computes")


def test_milora_of_a_weight_without_some_directions() -> None:
    """There is nothing to start from in them: they learn from the default start."""
    base = nn.Linear(12, 9).double()
    with torch.no_grad():
        base.weight[7:] = base.weight[:2]
    layer = pissa_layer(base, moved=0, init="milora")
    s = torch.linalg.svdvals(base.weight)
    assert_close((layer.scale * product(layer)).norm(), s[5:7].norm(), "two directions of four")
    base(torch.randn(5, 12, dtype=torch.float64)).square().sum().backward()
    a = layer.adapter
    assert bool((a.up.grad.norm(dim=0) > 1e-3).all()) and int((a.up0.norm(dim=0) > 1e-6).sum()) == 2


@pytest.mark.parametrize("shape", ((600, 640), (640, 600)))
def test_smallest_singular_values_of_a_large_weight(shape: tuple[int, int]) -> None:
    """Without a full SVD: orthonormal vectors, in which the weight is as small as in any others."""
    weight = torch.randn(shape)
    u, s, vh = singular(weight, 8, "last")
    wanted = torch.linalg.svdvals(weight.double())[-8:]
    torch.testing.assert_close(s.double(), wanted, rtol=0.01, atol=0)
    assert orthonormal(u) and orthonormal(vh) and s.dtype == weight.dtype
    torch.testing.assert_close(
        ((u.T.double() @ weight.double()) @ vh.T.double()).diagonal(), s.double(), rtol=1e-3, atol=0
    )
    exact = singular(weight, 8, "last", exact=True)
    assert float((u.T @ exact[0]).norm()) == pytest.approx(8**0.5, rel=0.01)
    low = singular(weight[:, :40] @ weight[:40, :40] @ weight[:40], 8, "last") if shape[0] < shape[1] else None
    assert low is None or float(low[1].max()) < 1e-3 * float(weight.norm())
    assert not bool(singular(torch.zeros(600, 600), 8, "last")[1].any())


def test_milora_through_an_entry(tmp_path: Path) -> None:
    """The base at first, a file of twice the dim, and a resumed run that is the same one."""
    unet = sd_unet()
    start = draw(unet)
    network = network_on(unet, init="milora", conv_dim="2", only_patterns=".*mid_block.*")
    network.apply_to(None, unet, False, True)
    assert torch.equal(draw(unet), start)
    assert any("init=milora on" in note and "twice the dim" in note for note in network.plan.notes)
    for row, layer in network.layers:
        start_part = layer.scale * layer.adapter.up0.flatten(1) @ layer.adapter.down0.flatten(1)
        minor = minor_part(layer.base.weight, row.dim).flatten(1)
        assert float((start_part - minor).norm()) < 1e-3 * float(minor.norm()), row.shown_name
    optimizer = torch.optim.AdamW(network.prepare_optimizer_params(None, 1e-3, 1e-3)[0])
    losses = train(unet, optimizer, 1)
    state, moments = copy.deepcopy(network.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = train(unet, optimizer, 1)
    assert expected != losses
    network.save_weights(tmp_path / "a.safetensors", None, {})
    tensors, metadata = reader.read_tensors(tmp_path / "a.safetensors")
    assert json.loads(metadata["networks_init"])["init"] == ["milora"]
    assert {t.shape[0] for key, t in tensors.items() if "lora_down" in key} == {4, 8}
    network.detach()
    again = network_on(unet, init="urae", conv_dim="2", only_patterns=".*mid_block.*")
    again.apply_to(None, unet, False, True)
    again.load_state_dict(state)
    optimizer = torch.optim.AdamW(again.prepare_optimizer_params(None, 1e-3, 1e-3)[0])
    optimizer.load_state_dict(moments)
    assert train(unet, optimizer, 1) == expected


def test_lora_fa_takes_the_smallest_directions() -> None:
    base = make_layer("linear")
    layer = pissa_layer(base, "lora_fa", moved=0, init="milora")
    _, s, vh = torch.linalg.svd(base.weight, full_matrices=False)
    down = layer.adapter.down
    assert_close(down.norm(dim=1), (s[-4:] / 0.75).sqrt(), "lengths")
    assert_close((down / down.norm(dim=1, keepdim=True) @ vh[-4:].T).abs(), torch.eye(4).double(), "directions")


# -- SimpleTuner's perturbed normal start of LoKr: init_lokr_norm


@pytest.mark.parametrize("kind", ("linear", "conv_3x3"))
def test_perturbed_start_is_its_formula(kind: str) -> None:
    """w1 = 1; w2 has n times the mean and the standard deviation of W, and what is left of it is normal."""
    base = make_layer(kind)
    W, x = base.weight.detach().clone(), make_input(kind)
    before = base(x)
    adapter = ALGOS["lokr"](Geometry.of(base), 4, {"factor": 2, "full_matrix": True}).double()
    adapter.fold_plus_(8.0)
    adapter.perturb_(0.01)
    layer = AdaptedLayer("lora_unet_x", base, adapter, 1.0)
    torch.manual_seed(99)  # the numbers were decided when the adapter was made
    layer.attach()
    w1, w2 = 8.0 * adapter.w1.detach(), adapter.w2.detach()
    assert torch.equal(w1, torch.ones_like(w1)) and torch.equal(base.weight, W)
    n = w2.numel()
    mean, deviation = W.sum() / W.numel(), ((W - W.mean()).square().sum() / (W.numel() - 1)).sqrt()
    assert_close(w2.sum() / n, 0.01 * mean, "mean")
    assert_close(((w2 - w2.mean()).square().sum() / (n - 1)).sqrt(), 0.01 * deviation, "standard deviation")
    blocks = w2.repeat(w1.shape[0], w1.shape[1], *[1] * (w2.dim() - 2))  # kron of ones
    assert_close(layer.new_weight(W) - W, blocks, "update")
    assert_close(base(x) - before, layer.update(x), "forward")
    assert adapter.start_size == pytest.approx(float(blocks.norm() / W.norm())) == pytest.approx(0.01, rel=0.1)


def test_perturbed_start_through_an_entry(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Told in log, plan and file; the same by a seed, kept by a resume, and gone where a file is loaded."""
    unet = sd_unet()
    start = draw(unet)
    kwargs = {"algo": "lokr", "full_matrix": "True", "init_lokr_norm": "1e-3", "only_patterns": ".*mid_block.*"}
    network = network_on(unet, **kwargs, init_seed="3")
    with caplog.at_level(logging.INFO, logger="networks"):
        network.apply_to(None, unet, False, True)
    sizes = [float(layer.adapter.start_size) for layer in network.adapted_layers]
    assert sizes == pytest.approx([1e-3] * len(sizes), rel=0.05)
    for layer, size in zip(network.adapted_layers, sizes, strict=True):
        W = layer.whole_weight()
        assert size == pytest.approx(float((layer.new_weight(W) - W).norm() / W.norm()), rel=1e-3)
    told = f"{len(sizes)} layers start with an update of relative size {min(sizes):.3g} to {max(sizes):.3g}"
    assert told in caplog.text
    assert any("init_lokr_norm on" in note and "0.001 of their size" in note for note in network.plan.notes)
    assert 0 < float((draw(unet) - start).norm() / start.norm()) < 1e-2
    first = values(network)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    told = json.loads(reader.read_tensors(tmp_path / "a.safetensors")[1]["networks_init"])
    assert told["largest_relative_start"] == pytest.approx(1e-3, rel=0.05)
    optimizer = torch.optim.AdamW(network.prepare_optimizer_params(None, 1e-3, 1e-3)[0])
    train(unet, optimizer, 1)
    state, moments = copy.deepcopy(network.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = train(unet, optimizer, 1)
    network.detach()
    again = network_on(unet, **kwargs, init_seed="3")
    again.apply_to(None, unet, False, True)
    assert all(torch.equal(value, first[name]) for name, value in values(again).items())
    again.load_state_dict(state)
    optimizer = torch.optim.AdamW(again.prepare_optimizer_params(None, 1e-3, 1e-3)[0])
    optimizer.load_state_dict(moments)
    assert train(unet, optimizer, 1) == expected
    again.detach()
    for before_apply in (True, False):
        loaded = network_on(unet, **kwargs)
        if before_apply:
            loaded.load_weights(str(tmp_path / "a.safetensors"))
        loaded.apply_to(None, unet, False, True)
        if not before_apply:
            loaded.load_weights(str(tmp_path / "a.safetensors"))
        assert all(torch.equal(value, first[name]) for name, value in values(loaded).items()), before_apply
        assert not any(layer.adapter.start_size for layer in loaded.adapted_layers)
        loaded.detach()
    found, _ = networks.lora.create_network_from_weights(
        1.0, str(tmp_path / "a.safetensors"), None, None, unet, **kwargs
    )
    assert any("init_lokr_norm" in note and "not used, the file decides" in note for note in found.plan.notes)


def test_a_perturbed_start_of_a_weight_of_zeros_learns() -> None:
    base = nn.Linear(12, 8)
    nn.init.zeros_(base.weight)
    adapter = ALGOS["lokr"](Geometry.of(base), 4, {"full_matrix": True})
    adapter.perturb_(0.01)
    layer = AdaptedLayer("lora_unet_x", base, adapter, 1.0)
    layer.attach()
    assert adapter.start_size == 0.0 and not bool(layer.new_weight(base.weight).any())
    base(torch.randn(3, 12)).square().sum().backward()
    assert bool(adapter.w2.grad.any())


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({}, "init_lokr_norm: it is for whole factors, and one is a product: full_matrix=True \\("),
        ({"full_matrix": "True", "use_scalar": "True"}, "use_scalar would start it at 0 times that"),
        ({"full_matrix": "True", "init": "orthogonal"}, "init=orthogonal and init_lokr_norm are two starts"),
        ({"algo": "lora"}, "init_lokr_norm=0.001 has no effect with algo=lora; it works with lokr"),
        ({"init_lokr_norm": "-1"}, "is too small"),
    ],
    ids=str,
)
def test_a_perturbed_start_is_refused_with_the_reason(kwargs: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        networks.lora.plan(4, 1, None, sd_unet(), **{"algo": "lokr", "init_lokr_norm": "1e-3", **kwargs})
