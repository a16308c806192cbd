"""networks.lycoris in place of lycoris.kohya: every example of its document, its defaults, its numbers."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import lycoris.kohya
import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.wrapper import network_module_dict
from tiny_parts import draw, inputs, randomise, sd_unet, sdxl_unet, text_encoder
from torch import nn
from toy_models import toy

import networks.lokr
import networks.lora
import networks.lycoris
from networks.algos import ALGOS
from networks.algos.lokr import LoKr
from networks.args import presets
from networks.args.parse import Problems, parse
from networks.args.table import BY_NAME, TABLE
from networks.tensors.geometry import Geometry

# LyCORIS' document, entry by entry: what it says to write, on models with convolutions.
EXAMPLES: list[dict[str, str]] = [
    {"algo": "lora"},
    {"algo": "locon", "preset": "full"},
    {"algo": "loha", "preset": "attn-mlp"},
    {"algo": "lokr", "preset": "attn-only"},
    {"algo": "dylora"},
    {"algo": "diag-oft", "constraint": "1e-4"},
    {"algo": "diag-oft", "rescaled": "True"},
    {"algo": "boft", "network_dim": "48"},
    {"algo": "ia3"},
    {"algo": "tlora"},
    {"algo": "tlora", "sig_type": "last", "use_data_init": "True", "mask_group_id": "0"},
    {"algo": "tlora", "sig_type": "middle", "use_data_init": "False", "mask_group_id": "3"},
    {"conv_dim": "2"},
    {"conv_dim": "2", "conv_alpha": "1.0"},
    {"algo": "lokr", "network_dim": "10000"},
    {"dropout": "0.1", "rank_dropout": "0.1", "module_dropout": "0.1"},
    {"rank_dropout": "0.1", "rank_dropout_scale": "True"},
    {"algo": "lokr", "factor": "8"},
    {"algo": "lokr", "factor": "-1"},
    {"algo": "lokr", "decompose_both": "True", "network_dim": "1"},
    {"algo": "lokr", "full_matrix": "True"},
    {"algo": "lokr", "unbalanced_factorization": "True"},
    {"algo": "dylora", "block_size": "2"},
    {"use_tucker": "True"},
    {"algo": "loha", "use_cp": "True"},
    {"use_scalar": "True"},
    {"algo": "loha", "dora_wd": "True"},
    {"algo": "lokr", "dora_wd": "True", "wd_on_output": "False", "bypass_mode": "True"},
    {"bypass_mode": "True"},
    {"train_norm": "True"},
    {"algo": "lokr", "train_norm": "True"},
    {"algo": "diag-oft", "train_norm": "True", "constrain": "1e-4"},
    {"algo": "lora", "use_conv_cp": "True", "conv_dim": "2"},
    {"bypass_mode": "False", "use_tucker": "False", "rs_lora": "True"},
]


def models(name: str) -> tuple[Any, nn.Module]:
    if name == "flux":
        found = toy("flux", blocks=1)
        return [found["text_encoder1"], None], found["dit"]
    if name == "sdxl":
        return [text_encoder(), text_encoder(projection=True)], sdxl_unet()
    return text_encoder(), sd_unet()


@pytest.mark.sweep(3)
@pytest.mark.parametrize("model", ["sd", "sdxl", "flux"])
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: ",".join(f"{k}={v}" for k, v in e.items()))
def test_examples_of_the_document(example: dict[str, str], model: str) -> None:
    arguments = dict(example)
    dim = int(arguments.pop("network_dim", 4))
    if model == "flux":  # the stand-in has no convolutions and no norms: what speaks of them alone is told so
        if arguments.keys() & {"conv_dim", "use_tucker", "use_cp", "train_norm"} and "False" not in arguments.values():
            lines = networks.lycoris.plan(dim, 1, *models(model), **arguments).warnings
            assert len([line for line in lines if "without effect here, so not used: " in line]) == 1
            return
    encoders, denoiser = models(model)
    for create in (networks.lycoris.create_network, networks.lycoris.create_arch_network):
        network = create(1.0, dim, 1, None, encoders, denoiser, **arguments)
        assert network.plan.trained
    algo = {"locon": "lora"}.get(arguments.get("algo", "lora"), arguments.get("algo", "lora"))
    assert {row.algo for row in network.plan.trained} == {algo, *(["norm"] if "train_norm" in arguments else [])}


def test_defaults() -> None:
    rows = networks.lycoris.plan(4, 2, None, sd_unet()).trained
    assert {(row.algo, row.dim, row.alpha) for row in rows} == {("lora", 4, 2.0)}
    assert any(row.kind == "Conv2d 3x3" for row in rows) and any(row.dotted_name == "conv_in" for row in rows)
    row = networks.lycoris.plan(8, 1, None, sd_unet(), algo="dylora").trained[0]
    assert row.options["block_size"] == 4
    assert BY_NAME["block_size"].default == 1


# -- numbers


@pytest.mark.reference
@pytest.mark.parametrize(
    "arguments",
    [
        {"algo": "lora"},
        {"algo": "locon", "conv_dim": "2", "conv_alpha": "1", "use_tucker": "True"},
        {"algo": "loha", "rs_lora": "True"},
        {"algo": "lokr", "factor": "4", "use_scalar": "True"},
        {"algo": "lokr", "full_matrix": "True", "network_dim": "4"},
    ],
    ids=str,
)
@pytest.mark.parametrize("preset", ["attn-mlp", "unet-transformer-only", "unet-convblock-only"])
def test_same_numbers_as_lycoris(arguments: dict[str, str], preset: str) -> None:
    """The same call of both, the same factors: the same layers, names, and output."""
    arguments = {name: value for name, value in arguments.items() if name != "network_dim"}
    if preset != "unet-convblock-only":  # without kernels, so these would be errors
        arguments = {n: v for n, v in arguments.items() if n not in ("conv_dim", "conv_alpha", "use_tucker")}
    ours_unet, their_unet = sd_unet(), sd_unet()
    ours = networks.lycoris.create_network(0.7, 4, 2, None, None, ours_unet, preset=preset, **arguments)
    ours.apply_to(None, ours_unet, False, True)
    theirs = lycoris.kohya.create_network(0.7, 4, 2, None, None, their_unet, preset=preset, **arguments)
    theirs.apply_to(None, their_unet, False, True)
    randomise(ours, 0.3)
    modules = {module.lora_name: module for module in theirs.unet_loras}
    # Its TimestepEmbedding is among the classes of every preset for transformers.
    layers = {layer.lora_name: layer for layer in ours.adapted_layers}
    extra = modules.keys() - layers.keys()
    assert layers.keys() <= modules.keys() and all("time_embedding" in name for name in extra)
    with torch.no_grad():
        for name, layer in layers.items():
            own = dict(modules[name].named_parameters())
            assert len(own) == len(list(layer.adapter.named_parameters()))
            for short, p in layer.adapter.named_parameters():
                own["scalar" if short == "scalar" else layer.adapter.spec.keys[short]].copy_(p)
        expected = draw(their_unet)
        torch.testing.assert_close(draw(ours_unet), expected)
        assert not torch.allclose(draw(sd_unet()), expected, atol=1e-3)


# -- arguments of its own


def watch(monkeypatch: pytest.MonkeyPatch, cls: type, name: str, calls: list[str]) -> None:
    """Note every call of a method."""
    original = getattr(cls, name)

    def method(self: Any, *args: Any) -> Any:
        calls.append(name)
        return original(self, *args)

    monkeypatch.setattr(cls, name, method)


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr", "dylora"])
def test_bypass_mode_is_a_form_not_another_network(algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is shown in the plan, decides which form runs, and changes no number; DoRA stays."""
    outputs, calls = [], []
    for value in ("True", "False"):
        unet = sd_unet().double()
        network = networks.lora.create_network(
            1.0, 4, 2, None, None, unet, algo=algo, preset="full", bypass_mode=value, dora_wd="True"
        ).double()
        assert any(f"bypass_mode={value}" in note for note in network.plan.notes)
        network.apply_to(None, unet, False, True)
        randomise(network)
        counted: list[str] = []
        watch(monkeypatch, ALGOS[algo], "apply_delta", counted)
        watch(monkeypatch, ALGOS[algo], "update", counted)
        latents, times, text = inputs()
        outputs.append(unet(latents.double(), times, text.double()).sample.detach())
        calls.append({name: counted.count(name) for name in ("apply_delta", "update")})
        monkeypatch.undo()
    assert calls[0]["apply_delta"] == calls[0]["update"] > 0
    assert calls[1]["apply_delta"] == 0 < calls[1]["update"]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-12)
    # Command lines of LyCORIS have False without asking for the dearer form.
    for value, factored in (("True", True), ("False", None)):
        made = networks.lycoris.create_network(1.0, 4, 2, None, None, sd_unet(), algo=algo, bypass_mode=value)
        assert made.runtime.factored is factored


def test_rank_dropout_scale() -> None:
    """False leaves the kept values as they are."""
    outputs = {}
    for value in ("True", "False"):
        unet = sd_unet()
        network = networks.lycoris.create_network(
            1.0, 4, 4, None, None, unet, preset="attn-only", rank_dropout="0.5", rank_dropout_scale=value
        )
        network.apply_to(None, unet, False, True)
        randomise(network)
        network.train()
        layer, x = network.adapted_layers[0], torch.randn(64, 3, 16, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(5)
        outputs[value] = layer.update(x).detach()
    torch.testing.assert_close(outputs["True"], 2 * outputs["False"])
    for entry, usual, other in ((networks.lora, "True", "False"), (networks.lycoris, "False", "True")):
        entry.plan(4, 1, None, sd_unet(), rank_dropout_scale=usual)
        if entry is networks.lycoris:
            told = entry.plan(4, 1, None, sd_unet(), rank_dropout_scale=other).warnings
            assert any(f"rank_dropout_scale={other} (without rank_dropout)" in line for line in told)
            continue
        with pytest.raises(ValueError, match=f"rank_dropout_scale={other} has no effect without rank_dropout"):
            entry.plan(4, 1, None, sd_unet(), rank_dropout_scale=other)


# Defaults that differ from LyCORIS', and why.
OTHER_DEFAULTS = {
    "bypass_mode": (None, False),  # whichever form is cheaper: the same numbers
    "mask_group_id": (None, 0),  # each network has a time of its own, unless a group is asked for
}


@pytest.mark.reference
def test_defaults_are_those_of_lycoris(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parser's where it passes them on, else those of its modules; under its name for the argument or for ours."""
    found: dict[str, Any] = {}
    for module in set(network_module_dict.values()):
        for parameter in inspect.signature(module.__init__).parameters.values():
            if parameter.default is not inspect.Parameter.empty:
                found[parameter.name] = parameter.default
    with monkeypatch.context() as patch:
        passed: dict[str, Any] = {}
        patch.setattr(lycoris.kohya, "LycorisNetworkKohya", Recorder(passed))
        lycoris.kohya.create_network(1.0, 16, 8.0, None, None, sd_unet())
    found |= passed
    theirs = {
        "conv_dim": found.pop("conv_lora_dim"),
        "use_dora": found.pop("weight_decompose"),
        "wd_on_output": found.pop("wd_on_out"),
        "algo": found.pop("network_module"),
        **found,
    }
    ours = parse({}, "lora", Problems("x"), "sd_scripts", {"network_dim": 16, "network_alpha": 8.0}, "lycoris")
    known = {name: getattr(ours, name) for name in theirs if name in BY_NAME and BY_NAME[name].name == name}
    assert len(known) >= 24 and {"rank_dropout_scale", "block_size", "factor", "constraint", "sig_type"} <= known.keys()
    known["train_norm"] = known["train_norm"] == "true"
    differing = {name: (value, theirs[name]) for name, value in known.items() if value != theirs[name]}
    assert differing == OTHER_DEFAULTS
    preset = inspect.getsource(lycoris.kohya.create_network)
    assert 'kwargs.get("preset", "full")' in preset and ours.preset == presets.load("full")


@pytest.mark.reference
def test_what_lycoris_takes_whatever_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not read the argument, so that its modules have their default, or any text is True to it."""
    rows = {arg.name: (arg, value) for arg in TABLE for entry, value in arg.elsewhere if entry == "lycoris"}
    assert {"train_on_input", "rank_dropout_scale", "decompose_both", "sig_type"} <= rows.keys()
    given = {name: "last" if arg.choices else str(not value) for name, (arg, value) in rows.items()}
    passed: dict[str, Any] = {}
    monkeypatch.setattr(lycoris.kohya, "LycorisNetworkKohya", Recorder(passed))
    lycoris.kohya.create_network(1.0, 4, 1.0, None, None, sd_unet(), **given)
    for name, (_, value) in rows.items():
        takers = [inspect.signature(module.__init__).parameters for module in set(network_module_dict.values())]
        defaults = {p[name].default for p in takers if name in p}
        assert (bool(passed[name]) if name in passed else defaults.pop()) == value and len(defaults) < 2, name


class Recorder:
    """In place of LyCORIS' network: keeps the keywords."""

    def __init__(self, passed: dict[str, Any]) -> None:
        self.passed = passed

    def apply_preset(self, preset: Any) -> None:
        pass

    def __call__(self, *models: Any, **keywords: Any) -> None:
        self.passed |= keywords


@pytest.mark.reference
def test_rank_dropout_trains_as_strong_an_update_as_lycoris() -> None:
    """Half of the saved one at 0.5. There whole rows go, one choice for the batch; here rank indices of each sample."""
    base = nn.Linear(32, 64)
    theirs = LoConModule("x", copy.deepcopy(base), 1.0, 4, 4, rank_dropout=0.5, rank_dropout_scale=False)
    unet = sd_unet()
    network = networks.lycoris.create_network(1.0, 4, 4, None, None, unet, preset="attn-only", rank_dropout="0.5")
    layer = network.adapted_layers[0].train()
    with torch.no_grad():
        for p in (*theirs.parameters(), *layer.adapter.parameters()):
            p.normal_()
        whole = theirs.eval().make_weight()
        drawn = [theirs.train().make_weight() for _ in range(400)]
        kept = torch.stack([(one != 0).float().mean(1) for one in drawn])
        assert set(kept.unique().tolist()) == {0.0, 1.0}  # whole rows
        assert float((sum(drawn) * whole).sum() / 400 / whole.square().sum()) == pytest.approx(0.5, abs=0.02)
        x = torch.randn(1, 1, layer.base.in_features).expand(4000, -1, -1)
        update = layer.update(x)
        saved = layer.eval().update(x[:1])
    assert float((update.mean(0) * saved[0]).sum() / saved.square().sum()) == pytest.approx(0.5, abs=0.05)
    assert update.flatten(1).unique(dim=0).shape[0] <= 2**4  # one of the sets of rank indices for each sample


def test_lokr_dim_above_5120_is_a_whole_second_factor() -> None:
    """On every width, and the plan names the open way to say so."""
    wide = Geometry.of(nn.Linear(1, 262144, device="meta"))
    assert wide is not None
    for dim, whole in ((5120, False), (5121, True)):
        shapes = LoKr.layout(wide, dim, factor=2).shapes
        assert ("w2" in shapes) is whole, dim
    plan = networks.lokr.plan(10000, 1, None, sd_unet(), factor="4")
    assert any("give it a dim of at most" in line and "or full_matrix=True" in line for line in plan.warnings)
    for features in (3, 127, 640, 8960):
        shapes = LoKr.layout(Geometry.of(nn.Linear(features, features, device="meta")), 1, full_matrix=True).shapes
        assert shapes.keys() == {"w1", "w2"}


def test_a_file_decides_over_the_preset(tmp_path: Path) -> None:
    unet = sd_unet()
    network = networks.lycoris.create_network(1.0, 4, 1, None, None, unet, preset="attn-only", algo="lokr")
    network.apply_to(None, unet, False, True)
    network.save_weights(tmp_path / "x.safetensors", None, None)
    loaded, _ = networks.lycoris.create_network_from_weights(
        1.0, str(tmp_path / "x.safetensors"), None, None, sd_unet(), preset="full"
    )
    assert {row.saved_name for row in loaded.plan.trained} == {row.saved_name for row in network.plan.trained}
    assert any("preset: not used" in note for note in loaded.plan.notes)


@pytest.mark.parametrize("algo", ALGOS)
def test_loraplus_has_a_factor_to_act_on_or_says_so(algo: str) -> None:
    arguments = {"algo": algo, "preset": "attn-mlp", "loraplus_lr_ratio": "4"}
    if not ALGOS[algo].spec.plus:
        told = "\n".join(networks.lycoris.plan(16, 1, None, sd_unet(), **arguments).warnings)
        assert f"without effect here, so not used: loraplus_lr_ratio (with {algo}: such layers have no pair" in told
        return
    network = networks.lycoris.create_network(1.0, 16, 1, None, None, sd_unet(), **arguments)
    network.apply_to(None, sd_unet(), False, True)
    groups, _ = network.prepare_optimizer_params(None, 1e-3)
    names = {name for layer in network.adapted_layers for name in layer.adapter.laid_out.shapes}
    only_plus = names <= ALGOS[algo].spec.plus | ALGOS[algo].spec.frozen  # of lora_fa the up factor
    assert {group["lr"] for group in groups} == ({4e-3} if only_plus else {4e-3, 1e-3})


@pytest.mark.parametrize("mode", ["lr", "reparam"])
def test_loraplus_beside_layers_without_a_pair_is_counted(mode: str, tmp_path: Path) -> None:
    """A preset with `full` on some layers, and norm layers: they stay at the one rate and have no unit."""
    preset = tmp_path / "mixed.toml"
    preset.write_text('unet_target_module = ["*"]\n[module_algo_map.FeedForward]\nalgo = "full"\n', encoding="utf-8")
    arguments = {"preset": str(preset), "loraplus_lr_ratio": "16", "loraplus_mode": mode, "train_norm": "True"}
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 4, 1, None, None, unet, **arguments)
    network.apply_to(None, unet, False, True)
    pairs = [row for row in network.plan.trained if row.algo == "lora"]
    others = [row for row in network.plan.trained if row.algo != "lora"]
    assert {row.algo for row in others} == {"full", "norm"} and pairs
    note = f"loraplus_lr_ratio acts on {len(pairs)} of {len(network.plan.trained)} layers, not on full, norm"
    assert any(text.startswith(note) for text in network.plan.notes)
    assert {(row.plus_ratio, row.plus_unit) for row in others} == {(1.0, 1.0)}
    groups, _ = network.prepare_optimizer_params(None, 1e-3)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for row, layer in network.layers:
        for name, p in layer.adapter.named_parameters():
            fast = mode == "lr" and row.algo == "lora" and name == "up"
            assert rates[id(p)] == pytest.approx(16e-3 if fast else 1e-3)
            assert layer.adapter.plus_gain == (16.0 if mode == "reparam" and row.algo == "lora" else 1.0)
