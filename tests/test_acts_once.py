"""A network acts once, in the forward pass or in the base weights, in whatever order it is attached and merged."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers_numeric import (
    Case,
    Zoo,
    assert_close,
    dense_bias,
    dense_update,
    make_input,
    make_network,
    randomise,
    with_weight,
)
from tiny_parts import inputs, sd_unet
from torch import nn

import networks.lora
from networks.files import codec
from networks.hosts.contract import HostNetwork
from networks.hosts.sd_compat import LoRAInfModule
from networks.network.network import Network

START = 0.7
STRENGTHS = {"at 0.5": 0.5, "at 0": 0.0, "at -2": -2.0}
CALLS = {
    "attach": lambda network: network.attach(),
    "detach": lambda network: network.detach(),
    "merge": lambda network: network.merge(),
    "pre_calculation": lambda network: network.pre_calculation(),
    "restore": lambda network: network.restore_weights(),
    "backup": lambda network: network.backup_weights(),
} | {name: lambda network, value=value: network.set_multiplier(value) for name, value in STRENGTHS.items()}


@dataclass
class Expected:
    """One network as it should be, by the rule written down once more.

    Attributes:
        held: the multiplier at which the weights have it.
        kept: the same for the weights of the backup.
    """

    multiplier: float = START
    attached: bool = False
    held: float | None = None
    kept: float | None = None

    @property
    def acts_at(self) -> float:
        return self.held if self.held is not None else self.multiplier if self.attached else 0.0


class Shared:
    """Networks on the same modules, and their one backup."""

    def __init__(self, count: int) -> None:
        self.networks = [Expected() for _ in range(count)]
        self.backup = False

    def take(self) -> None:
        if not self.backup:
            self.backup = True
            for one in self.networks:
                one.kept = one.held

    def do(self, index: int, call: str) -> bool:
        """Whether the call is allowed."""
        one = self.networks[index]
        if call in STRENGTHS:
            one.multiplier = STRENGTHS[call]
        elif call == "detach":
            one.attached = False
        elif call == "backup":
            self.take()
        elif call == "restore":
            for each in self.networks if self.backup else ():
                each.held = each.kept
            self.backup = False
        elif call == "attach":
            if one.held is not None and not self.backup:
                return False
            one.attached = True
        elif call == "merge" and one.held is not None:
            return False
        elif one.held is not None and one.held != one.multiplier:
            return False
        else:
            if call == "pre_calculation":
                self.take()
            one.held = one.multiplier
        return True


def play(kind: str, algos: tuple[str, ...], calls: list[tuple[int, str]]) -> None:
    """Make the calls; after each, the model is the base with every network's update as often as it should be."""
    torch.manual_seed(0)
    model = Zoo((kind,))
    x, base = make_input(kind), copy.deepcopy(getattr(model, kind))
    networks = [make_network(Case(algo), model) for algo in algos]
    updates, shifts = [], []
    for network in networks:
        randomise(network)
        (layer,) = network.adapted_layers
        updates.append(dense_update(layer, 1.0).detach())
        bias = dense_bias(layer, 1.0)
        shifts.append(None if bias is None else bias.detach() - base.bias)
    shared = Shared(len(networks))
    done = []
    for index, call in calls:
        done.append(f"{call} of {algos[index]}")
        allowed = shared.do(index, call)
        if allowed:
            CALLS[call](networks[index])
        else:
            with pytest.raises(ValueError, match="is in the base weights already"):
                CALLS[call](networks[index])
        strengths = [one.acts_at for one in shared.networks]
        weight = base.weight + sum(m * update for m, update in zip(strengths, updates, strict=True))
        shift = sum(m * shift for m, shift in zip(strengths, shifts, strict=True) if shift is not None)
        wanted = with_weight(base, weight, None if base.bias is None else base.bias + shift)
        assert_close(model({kind: x})[kind], wanted(x), ", ".join(done))


@pytest.mark.parametrize("algo", ["lora", "lokr", "diag-oft"])
def test_every_order_of_calls(algo: str) -> None:
    """All orders of three, and random ones of ten."""
    calls = ["attach", "detach", "merge", "pre_calculation", "restore", "backup", "at 0.5"]
    chance = random.Random(algo)
    orders = [*itertools.product(calls, repeat=3)] if algo == "lora" else []
    for order in [*orders, *(chance.choices(calls, k=10) for _ in range(60))]:
        play("linear", (algo,), [(0, call) for call in order])


@pytest.mark.parametrize(
    "kind,algos", [("linear", ("lora", "lokr")), ("conv_3x3", ("loha", "full")), ("layer_norm", ("norm", "norm"))]
)
def test_two_networks_on_one_layer(kind: str, algos: tuple[str, str]) -> None:
    """Random orders: what one restores goes from the weights for both."""
    chance = random.Random(kind)
    for _ in range(25):
        play(kind, algos, [(chance.randrange(2), chance.choice([*CALLS])) for _ in range(12)])


def test_hosts_that_switch_a_network_off_do_not_switch_its_merge_on() -> None:
    """A teacher's pass between two of generation."""
    torch.manual_seed(0)
    model = Zoo(("linear",))
    x, base = make_input("linear"), copy.deepcopy(model.linear)
    network = make_network(Case("lora"), model)
    randomise(network)
    update = dense_update(network.adapted_layers[0], START).detach()
    network.attach()
    network.pre_calculation()
    for is_on in (False, True):
        network.runtime.enabled = is_on
        assert_close(model({"linear": x})["linear"], with_weight(base, base.weight + update)(x), f"enabled={is_on}")
    network.runtime.enabled = False
    network.restore_weights()
    assert_close(model({"linear": x})["linear"], base(x), "off, and restored")


def test_a_network_above_another_finds_its_update_once() -> None:
    """With DoRA, whose lengths are those of the weight below: in the forward pass or in the weights, it is the same."""
    torch.manual_seed(0)
    model = Zoo(("linear",))
    x = make_input("linear")
    below, above = make_network(Case("lora"), model), make_network(Case("lokr"), model)
    for network in (below, above):
        randomise(network)
        network.attach()
    for network in (above, below):
        layer = network.adapted_layers[0]
        site = layer.sites[0]
        alone = site.read()
        both = site.weight()
        other = dense_update(below.adapted_layers[0], START).detach()
        assert_close(both - alone + other, other * (2 if network is above else 1), "below in the forward pass")
    before = model({"linear": x})["linear"]
    below.pre_calculation()
    layer = above.adapted_layers[0]
    assert torch.equal(layer.sites[0].weight(), layer.sites[0].read())
    assert_close(model({"linear": x})["linear"], before, "below in the weights")


# -- the calls of the trainers


def draw(unet: nn.Module) -> torch.Tensor:
    sample, timesteps, states = inputs()
    with torch.no_grad():
        return unet(sample.double(), timesteps, states.double()).sample


def made(tmp_path: Path) -> tuple[nn.Module, str, torch.Tensor, torch.Tensor]:
    """A UNet, a file for it, and what the UNet draws without and with it."""
    unet = sd_unet().double()
    base = draw(unet)
    network = networks.lora.create_network(1.0, 4, 1, None, None, unet)
    randomise(network)
    file = str(tmp_path / "a.safetensors")
    network.save_weights(file, None, {})
    network, _ = loaded(file, unet)
    network.apply_to(None, unet)
    drawn = draw(unet)
    network.detach()
    return unet, file, base, drawn


def loaded(file: str, unet: nn.Module, multiplier: float = 0.7) -> tuple[HostNetwork, Mapping[str, torch.Tensor]]:
    """The network of a file, in float64, and its tensors."""
    create = networks.lora.create_network_from_weights
    network, weights = create(multiplier, file, None, None, unet, for_inference=True)
    return network.double(), weights


def test_apply_to_and_merge_to(tmp_path: Path) -> None:
    unet, file, _, drawn = made(tmp_path)
    network, weights = loaded(file, unet)
    network.apply_to(None, unet)
    network.merge_to(None, unet, weights, torch.float32, "cpu")
    torch.testing.assert_close(draw(unet), drawn, rtol=1e-9, atol=1e-9)
    for again in (lambda: network.merge_to(None, unet, weights), lambda: network.apply_to(None, unet)):
        with pytest.raises(ValueError, match="would act twice: .* make another network"):
            again()
    torch.testing.assert_close(draw(unet), drawn, rtol=1e-9, atol=1e-9)
    network.detach()
    torch.testing.assert_close(draw(unet), drawn, rtol=1e-9, atol=1e-9)


def test_a_second_file_is_not_taken_by_a_merged_network(tmp_path: Path) -> None:
    """Refused before anything of it is in the network."""
    unet, file, _, _ = made(tmp_path)
    network, weights = loaded(file, unet)
    network.merge_to(None, unet, weights)
    kept = {key: tensor.clone() for key, tensor in codec.encode(network.adapted_layers).items()}
    with pytest.raises(ValueError, match="already"):
        network.merge_to(None, unet, {key: 2 * tensor for key, tensor in weights.items()})
    assert all(torch.equal(tensor, kept[key]) for key, tensor in codec.encode(network.adapted_layers).items())


def test_one_network_for_each_file_as_the_trainers_make_them(tmp_path: Path) -> None:
    """The same file twice, on purpose: two networks, two updates."""
    unet, file, _, _ = made(tmp_path)
    layers = {name: module.weight.clone() for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
    for multiplier in (0.7, 0.3):
        network, weights = loaded(file, unet, multiplier)
        network.merge_to(None, unet, weights, torch.float32, "cpu")
    changed = 0
    for name, weight in layers.items():
        module, saved = unet.get_submodule(name), f"lora_unet_{name.replace('.', '_')}"
        if f"{saved}.alpha" in weights:
            up, down = (weights[f"{saved}.lora_{part}.weight"].double() for part in ("up", "down"))
            wanted = weight + up @ down / 4  # alpha 1, dim 4, strengths 0.7 + 0.3
            torch.testing.assert_close(module.weight, wanted, rtol=1e-9, atol=1e-9)
            changed += 1
    assert changed > 10


def test_the_generators_order_of_calls(tmp_path: Path) -> None:
    """gen_img.py with --network_pre_calc, over batches at changing strengths."""
    unet, file, base, drawn = made(tmp_path)
    network, weights = loaded(file, unet)
    network.apply_to(None, unet)
    network.load_state_dict(weights, False)
    network.backup_weights()
    for multiplier, wanted in ((0.7, drawn), (0.7, drawn), (0.0, base), (0.7, drawn)):
        network.set_multiplier(multiplier)
        network.restore_weights()
        network.pre_calculation()
        network.pre_calculation()
        torch.testing.assert_close(draw(unet), wanted, rtol=1e-9, atol=1e-9)


def test_a_strength_that_comes_too_late_is_told(caplog: pytest.LogCaptureFixture) -> None:
    network: Network = make_network(Case("lora"), Zoo(("linear",)))
    network.merge()
    network.set_multiplier(START)
    assert not caplog.records
    network.set_multiplier(0.5)
    assert "strength cannot be changed any more" in caplog.text
    caplog.clear()
    other = make_network(Case("lora"), Zoo(("linear",)))
    other.pre_calculation()
    other.set_multiplier(0.5)  # as the hosts do, before they restore
    assert not caplog.records


def test_a_single_layer_of_a_host_acts_once() -> None:
    torch.manual_seed(0)
    base = nn.Linear(8, 6).double()
    x, weight = torch.randn(3, 8).double(), base.weight.detach().clone()
    module = LoRAInfModule("lora_unet_x", base, 0.5, 2, 1).double()
    up, down = torch.randn(6, 2).double(), torch.randn(2, 8).double()
    module.apply_to()
    module.merge_to({"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(1.0)}, None, None)
    wanted = torch.nn.functional.linear(x, weight + 0.5 * 0.5 * up @ down, base.bias)
    torch.testing.assert_close(base(x), wanted, rtol=1e-9, atol=1e-9)
