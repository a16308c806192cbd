"""Presets: what each selects on each architecture, LyCORIS' schema, different algorithms in one network."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_parts import draw, randomise, sd_unet, text_encoder
from toy_models import signal, toy

import networks.lokr
import networks.lora
import networks.lycoris
from networks.archs import ARCHS
from networks.args import presets
from networks.files import codec, reader
from networks.plan.plan import Plan

BY_ARCH = {arch.name: arch for arch in ARCHS}
NAMES = presets.names()
LYCORIS_PRESETS = {
    "full", "full-lin", "attn-mlp", "attn-only", "unet-only", "unet-transformer-only", "unet-convblock-only", "ia3"
}  # fmt: skip
# Layers of LyCORIS 4.1.3 on these models where it is right, and the trainers' where it is not (see the comments).
COUNTS = {
    ("sd", "full"): (282, 72),  # it stops: "duplicated lora name"; 192 + 88 convolutional + 2 of the time embedding
    ("sd", "attn-mlp"): (192, 72),
    ("sd", "attn-only"): (128, 48),
    ("sd", "unet-convblock-only"): (88, 0),
    ("sdxl", "full"): (792, 264),  # it misses the four layers whose names the trainer has changed: 788
    ("sdxl", "attn-mlp"): (722, 264),
    ("sdxl", "attn-only"): (560, 176),
    ("sdxl", "sdxl-style"): (102, 0),
    ("flux", "full"): (304, 72),
    ("flux", "attn-only"): (76, 48),
    ("flux", "single-blocks"): (114, 0),
    ("flux", "no-mod"): (228, 0),
    ("flux_2", "full"): (160, 0),
    ("flux_2", "attn-only"): (32, 0),
    ("sd3", "attn-only"): (121, 176),
    ("wan", "cross-attn-only"): (240, 0),
    ("qwen_image", "likeness"): (360, 0),
    ("zimage", "style"): (105, 0),
}


small = lru_cache(toy)  # plans change no model


def planned(arch: str, blocks: int = 2, **kwargs: Any) -> Plan:
    spec, models = BY_ARCH[arch], small(arch, blocks=blocks)
    encoders = [models.get(part.name) for part in spec.text_encoders]
    if kwargs.get("preset") == "ia3":  # its options are of that algorithm
        kwargs["algo"] = "ia3"
    return networks.lora.plan(4, 1, encoders, models[spec.denoiser.name], **kwargs)


def by_part(plan: Plan, arch: str) -> tuple[int, int]:
    inside = sum(row.part == BY_ARCH[arch].denoiser.name for row in plan.trained)
    return inside, len(plan.trained) - inside


def meant_for(name: str) -> tuple[str, ...]:
    return presets.load(name).architectures or tuple(BY_ARCH)


@pytest.fixture
def preset_file(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def trained(path: str, **kwargs: Any) -> dict[str, tuple[str, int]]:
    """Dotted name -> (algorithm, dim) on a small UNet."""
    plan = networks.lora.plan(4, 1, None, sd_unet(), preset=path, **kwargs)
    return {row.dotted_name: (row.algo, row.dim) for row in plan.trained}


# -- the presets that come with the package


def test_lycoris_presets_are_all_there() -> None:
    assert set(NAMES) >= LYCORIS_PRESETS
    assert all(presets.load(name).description for name in NAMES)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "arch, name", [(arch, name) for name in NAMES for arch in meant_for(name)], ids=lambda value: value
)
def test_matches_something_where_it_is_meant(arch: str, name: str) -> None:
    """Each of its parts: a preset that has only a part of its patterns would train less than it says."""
    plan = planned(arch, blocks=100, preset=name)
    inside, outside = by_part(plan, arch)
    assert inside > 0
    encoders = by_part(planned(arch, blocks=100), arch)[1] > 0
    assert (outside > 0) == (encoders and presets.load(name).text_encoder.modules != ()) or name == "ia3"
    assert not plan.warnings


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", NAMES)
def test_every_pattern_is_used_somewhere(name: str) -> None:
    preset, unused = presets.load(name), set(presets.load(name).patterns)
    for arch in meant_for(name):
        for row in planned(arch, blocks=100).rows:
            part = next(p for p in BY_ARCH[arch].parts if p.name == row.part)
            names = (row.dotted_name, part.trainer_name(row.dotted_name))
            unused -= {pattern for pattern in unused if preset.matches(pattern, names)}
    assert not {p for p in unused if "norm" not in p}, "norm: diffusers' names of modulation, see below"


@pytest.mark.parametrize("arch, name", COUNTS)
def test_counts(arch: str, name: str) -> None:
    assert by_part(planned(arch, blocks=100, preset=name), arch) == COUNTS[arch, name]


@pytest.mark.parametrize("name", [name for name in NAMES if presets.load(name).architectures])
def test_refused_elsewhere(name: str) -> None:
    other = next(arch for arch in BY_ARCH if arch not in meant_for(name))
    with pytest.raises(ValueError, match=f"preset={name} is for {meant_for(name)[0]}.*; this model is "):
        planned(other, preset=name)


def test_no_modulation_in_any_layout() -> None:
    for arch in BY_ARCH:
        for row in planned(arch, preset="no-mod").trained:
            assert not re.search(r"mod\.|modulation|norm\d?(_context)?\.linear", row.dotted_name), row.dotted_name


@pytest.mark.sweep(3)
@pytest.mark.parametrize("arch", BY_ARCH)
def test_trains_and_loads_back(arch: str, tmp_path: Path) -> None:
    """A network of a preset, with layers outside the containers and another algorithm, is the same from its file."""
    spec, models = BY_ARCH[arch], toy(arch)
    encoders, denoiser = [models.get(part.name) for part in spec.text_encoders], models[spec.denoiser.name]
    network = networks.lycoris.create_network(1.0, 4, 1, None, encoders, denoiser, algo="loha")
    network.apply_to(encoders, denoiser, True, True)
    randomise(network)
    network.save_weights(tmp_path / "x.safetensors", None, None)
    expected = denoiser(signal())
    fresh = toy(arch)
    encoders, denoiser = [fresh.get(part.name) for part in spec.text_encoders], fresh[spec.denoiser.name]
    loaded, _ = networks.lycoris.create_network_from_weights(
        1.0, str(tmp_path / "x.safetensors"), None, encoders, denoiser
    )
    loaded.apply_to(encoders, denoiser, True, True)
    torch.testing.assert_close(denoiser(signal()), expected)
    assert not torch.allclose(toy(arch)[spec.denoiser.name](signal()), expected)


# -- the schema


def test_module_and_name_targets(preset_file: Any) -> None:
    path = preset_file('unet_target_module = ["ResnetBlock2D"]\nunet_target_name = ["conv_in"]\n')
    found = trained(path)
    assert "conv_in" in found and "down_blocks.0.resnets.0.time_emb_proj" in found
    assert all(name == "conv_in" or ".resnets." in name for name in found)
    path = preset_file('unet_target_module = ["ResnetBlock2D"]\nenable_conv = false\n')
    assert all(name.endswith(("time_emb_proj", "conv_shortcut")) for name in trained(path))


def test_names_match_as_in_lycoris_and_by_their_end(preset_file: Any) -> None:
    everything = trained(preset_file('unet_target_module = ["*"]\n'))
    for pattern, wanted in (
        ("down_blocks.0", lambda name: name.startswith("down_blocks.0")),  # from the beginning of the path
        ("to_k", lambda name: name.endswith(".to_k")),  # or its last components
        ("down_blocks.0.attentions.0.proj_in", lambda name: name == "down_blocks.0.attentions.0.proj_in"),
    ):
        found = trained(preset_file(f'unet_target_module = []\nunet_target_name = ["{pattern}"]\n'))
        inside = {name for name in found if name in everything}
        assert inside == {name for name in everything if wanted(name)}, pattern
    found = trained(preset_file('unet_target_module = []\nuse_fnmatch = true\nunet_target_name = ["*attn1.to_?"]\n'))
    assert found and all(re.search(r"attn1\.to_[kqv]$", name) for name in found)


def test_exclude_goes_first(preset_file: Any) -> None:
    path = preset_file('unet_target_name = ["conv_in"]\nexclude_name = ["conv_in", ".*attn2.*"]\n')
    found = trained(path)
    assert found and not any(name == "conv_in" or "attn2" in name for name in found)


def test_text_encoder_targets(preset_file: Any) -> None:
    path = preset_file('text_encoder_target_module = ["CLIPMLP"]\n')
    plan = networks.lora.plan(4, 1, text_encoder(), sd_unet(), preset=path)
    found = [row.dotted_name for row in plan.trained if row.part == "text_encoder"]
    assert len(found) == 4 and all(".mlp." in name for name in found)


def test_algorithms_and_dims_by_module_and_name(preset_file: Any) -> None:
    """The innermost class wins, a name before it, the command line's expression before both."""
    path = preset_file(
        "enable_conv = false\n"
        '[module_algo_map.Transformer2DModel]\nalgo = "loha"\n'
        '[module_algo_map.Attention]\nalgo = "lokr"\ndim = 2\nfactor = 2\n'
        '[name_algo_map."to_q"]\nalgo = "lora"\ndim = 3\nalpha = 6\n'
    )
    plan = networks.lora.plan(4, 1, None, sd_unet(), preset=path, network_reg_dims=".*attn2.to_q=1")
    rows = {row.dotted_name.partition("transformer_blocks.0.")[2] or row.dotted_name: row for row in plan.trained}
    assert (rows["ff.net.2"].algo, rows["ff.net.2"].dim) == ("loha", 4)
    assert (rows["attn1.to_k"].algo, rows["attn1.to_k"].dim, rows["attn1.to_k"].options["factor"]) == ("lokr", 2, 2)
    assert (rows["attn1.to_q"].algo, rows["attn1.to_q"].dim, rows["attn1.to_q"].scale) == ("lora", 3, 2.0)
    assert (rows["attn2.to_q"].algo, rows["attn2.to_q"].dim) == ("lora", 1)
    assert Counter(row.algo for row in plan.trained).keys() == {"lora", "loha", "lokr"}


def test_mixed_network_trains_saves_and_loads(preset_file: Any, tmp_path: Path) -> None:
    path = preset_file(
        '[module_algo_map.Attention]\nalgo = "lokr"\nfactor = 2\ndora_wd = true\n'
        '[module_algo_map.ResnetBlock2D]\nalgo = "loha"\nuse_tucker = true\ndim = 2\n'
    )
    unet = sd_unet()
    network = networks.lycoris.create_network(1.0, 4, 1, None, None, unet, preset=path)
    network.apply_to(None, unet, False, True)
    randomise(network)
    assert any(".magnitude" in name for name, _ in network.named_parameters())
    draw(unet).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    network.save_weights(tmp_path / "x.safetensors", None, None)
    other = sd_unet()
    loaded, _ = networks.lora.create_network_from_weights(1.0, str(tmp_path / "x.safetensors"), None, None, other)
    loaded.apply_to(None, other, False, True)
    torch.testing.assert_close(draw(other), draw(unet))


def test_convolutions_follow_enable_conv(preset_file: Any) -> None:
    """With it convolutions have the dim and alpha of the network, unless given; without it they are left out."""
    for entry in (networks.lora, networks.lycoris):
        rows = entry.plan(4, 2, None, sd_unet(), preset="full").trained
        assert {(row.dim, row.alpha) for row in rows} == {(4, 2.0)} and any("3x3" in row.kind for row in rows)
    rows = networks.lora.plan(4, 2, None, sd_unet(), preset="full", conv_dim="2", conv_alpha="1").trained
    assert {(row.dim, row.alpha) for row in rows if "3x3" in row.kind} == {(2, 1.0)}
    rows = networks.lora.plan(4, 2, None, sd_unet(), preset="full", conv_dim="0").trained
    assert not any("3x3" in row.kind for row in rows)
    told = networks.lora.plan(4, 2, None, sd_unet(), preset="full-lin", conv_dim="2").warnings
    assert any("without effect here, so not used: conv_dim (" in line for line in told)


@pytest.mark.parametrize(
    "text, message",
    [
        ("enable_cov = true", "no key is called enable_cov; did you mean enable_conv"),
        ('enable_conv = "yes"', "enable_conv is not a boolean"),
        ('unet_target_module = "Attention"', "unet_target_module is not a list"),
        ('exclude_name = ["(("]', r"the regular expression '\(\(' is wrong"),
        ("[module_algo_map]\nAttention = 3", "module_algo_map is not a table of tables"),
        ('[module_algo_map.Attention]\nalgo = "lokrr"', "module_algo_map has Attention.algo = 'lokrr', which is none"),
        ("[module_algo_map.Attention]\ndin = 3", "Attention.din, which is no option of a single layer; did you mean"),
        ('[name_algo_map.to_k]\nalgo = "lora"\nfactor = 4', "to_k.factor, which has no effect with algo = lora"),
        ("[name_algo_map.to_k]\nfactor = 4", "factor has no effect with algo=lora"),
        ('lora_prefix = "lora_te"', "lora_prefix = 'lora_te' is no beginning of saved names"),
        ('lora_prefix = "my.net"', "lora_prefix = 'my.net' is no beginning of saved names"),
        ("a = ", "which is no TOML"),
        ("unet_target_module = []", "no layer is left to train; the reasons: not in the preset"),
    ],
)
def test_mistakes(preset_file: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained(preset_file(text))


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="preset=attn-onyl is no preset and no TOML file.*did you mean attn-only"):
        trained("attn-onyl")


def test_patterns_without_a_layer_are_told(preset_file: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = preset_file('exclude_name = ["no_such_layer"]\nlora_prefix = "lora_unet"\n')
    networks.lora.create_network(1.0, 4, 1, None, None, sd_unet(), preset=path)
    assert "['no_such_layer'] decide no layer of this model" in caplog.text


@pytest.mark.parametrize("prefix", ["lycoris", "my_style"])
def test_lora_prefix_names_the_layers_of_the_denoiser(prefix: str, preset_file: Any, tmp_path: Path) -> None:
    """Written, and read back: by every entry for LyCORIS' own, else by a network with the same preset."""
    path = preset_file(f'lora_prefix = "{prefix}"\n')
    unet, encoder = sd_unet(), text_encoder()
    network = networks.lora.create_network(1.0, 4, 1, None, encoder, unet, preset=path)
    assert any(f"files name these layers {prefix}_" in note for note in network.plan.notes)
    network.apply_to(encoder, unet, True, True)
    randomise(network)
    wanted = draw(unet).detach()
    file = str(tmp_path / "a.safetensors")
    network.save_weights(file, None, {})
    network.detach()
    names = {key.partition(".")[0] for key in reader.read_tensors(file)[0]}
    starts = {f"{prefix}_down", f"{prefix}_mid", f"{prefix}_up", "lora_te_text"}
    assert {next(s for s in starts if n.startswith(s)) for n in names} == starts
    calls = [{"preset": path}, {}] if prefix == "lycoris" else [{"preset": path}]
    for options in calls:
        loaded, tensors = networks.lora.create_network_from_weights(1.0, file, None, encoder, unet, **options)
        loaded.apply_to(encoder, unet)
        loaded.load_state_dict(tensors, strict=True)
        assert torch.equal(draw(unet), wanted)
        loaded.detach()
    again = networks.lora.create_network(1.0, 4, 1, None, encoder, unet, preset=path)
    again.apply_to(encoder, unet, True, True)
    assert not again.load_weights(file).missing
    with pytest.raises(ValueError, match="save_format=blissful has names of its own"):
        networks.lora.plan(4, 1, None, unet, preset=path, save_format="blissful")


def test_lora_prefix_where_the_names_begin_otherwise(preset_file: Any) -> None:
    """ACE-Step's trainers write lycoris_ themselves."""
    path, model = preset_file('lora_prefix = "mine"\n'), toy("ace_step")["dit"]
    network = networks.lora.create_network(1.0, 4, 1, None, None, model, preset=path)
    names = {key.partition(".")[0] for key in codec.encode(network.adapted_layers, network.file_format)}
    assert all(name.startswith("mine_layers_") for name in names)
    loaded = codec.encode(network.adapted_layers, network.file_format)
    assert not network.load_tensors(loaded).missing
    plain = networks.lora.create_network(1.0, 4, 1, None, None, model)
    names = {key.partition(".")[0] for key in codec.encode(plain.adapted_layers, plain.file_format)}
    assert all(name.startswith("lycoris_layers_") for name in names)
    assert not plain.load_tensors(codec.encode(plain.adapted_layers, plain.file_format)).missing


def test_nothing_leaks_into_the_next_network(preset_file: Any) -> None:
    before = networks.lora.plan(4, 1, None, sd_unet())
    trained(preset_file('enable_conv = true\n[module_algo_map.Attention]\nalgo = "loha"\n'), algo="lokr")
    trained("unet-convblock-only")
    assert networks.lora.plan(4, 1, None, sd_unet()) == before


def test_none_is_no_preset() -> None:
    assert trained("none") == trained("")
    assert set(trained("")) < set(trained("full"))


def test_presets_are_found_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """setup.cfg puts the folder below the package; a checkout has it beside."""
    installed, checkout = presets.FOLDERS
    assert installed.parent.name == "networks" and installed.name == "presets" and (checkout / "full.toml").is_file()
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "only-here.toml").write_text("enable_conv = false")
    monkeypatch.setattr(presets, "FOLDERS", (tmp_path / "presets", tmp_path / "none"))
    assert presets.names() == ["only-here"] and not presets.load("only-here").enable_conv
