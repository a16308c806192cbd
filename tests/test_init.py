"""Start values: `init=` and `init_seed=`."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers_numeric import ADDITIVE
from tiny_parts import draw, sd_unet
from torch import Tensor, nn
from toy_models import toy

import networks.lora
from networks.algos import ALGOS
from networks.tensors.geometry import Geometry
from networks.tensors.seeding import seed_of, seeded

ORTHOGONAL = ("lora", "lokr", "dylora", "lora_fa", "glora")


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


@pytest.mark.parametrize("algo", ADDITIVE)
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
