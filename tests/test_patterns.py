"""Expressions on names: of one part, in either spelling, and what a user meant by one that matches no layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from registry_archs import RELEASED, SPECS, release_of
from tiny_parts import sdxl_unet, text_encoder
from torch import nn
from toy_models import recorded, toy

import networks.api
import networks.lora
import networks.lora_flux
import networks.lycoris
from networks.args import presets
from networks.models.skeleton import skeleton
from networks.plan.causes import grouped
from networks.plan.patterns import Patterns
from networks.plan.plan import Plan
from networks.plan.walk import candidates

TE1, TE2 = "text_encoder1:text_model.encoder.layers.", "text_encoder2:text_model.encoder.layers."


@pytest.fixture(scope="module")
def sdxl() -> tuple[list[nn.Module], nn.Module]:
    """Real classes of the versions that are installed."""
    return [text_encoder(), text_encoder(projection=True)], sdxl_unet()


@pytest.fixture(scope="module")
def flux() -> tuple[list[nn.Module | None], nn.Module]:
    roots = toy("flux", 2)
    return [roots["text_encoder1"], roots["text_encoder3"]], roots["dit"]


def planned(models: Any, module: Any = networks.lora, **arguments: str) -> Plan:
    return module.plan(4, 1, *models, **arguments)


def shown(plan: Plan) -> list[str]:
    return [row.shown_name for row in plan.trained]


def refused(models: Any, module: Any = networks.lora, dim: int = 4, **arguments: str) -> str:
    with pytest.raises(ValueError) as caught:
        module.plan(dim, 1, *models, **arguments)
    return str(caught.value)


# -- the part


@pytest.mark.parametrize(
    "pattern,wanted",
    [
        ("text_encoder1:.*layers.0.mlp.fc1", [f"{TE1}0.mlp.fc1"]),
        ("text_encoder2: .*layers.0.mlp.fc1", [f"{TE2}0.mlp.fc1"]),  # as an eye may read a table
        (".*layers.0.mlp.fc1", [f"{TE1}0.mlp.fc1", f"{TE2}0.mlp.fc1"]),
        ("text_encoder1:encoder.layers.1.mlp.fc2", [f"{TE1}1.mlp.fc2"]),  # transformers 5
        ("text_encoder2:encoder.layers.1.mlp.fc2", [f"{TE2}1.mlp.fc2"]),  # which has the level there still
        (f"{TE1}1.mlp.fc2", [f"{TE1}1.mlp.fc2"]),
        ("text_encoder1:.*s.1.*fc1|.*s.0.*fc2", [f"{TE1}0.mlp.fc2", f"{TE1}1.mlp.fc1"]),
        ("unet:down_blocks.1.attentions.0.proj_in", ["input_blocks.4.1.proj_in"]),
        ("unet:input_blocks.4.1.proj_in", ["input_blocks.4.1.proj_in"]),
        ("(?:input_blocks.4.1.proj_in)", ["input_blocks.4.1.proj_in"]),
    ],
)
def test_a_pattern_of_one_part(sdxl: Any, pattern: str, wanted: list[str]) -> None:
    """In every argument that takes patterns, in every way of writing it, and asked for by --why."""
    plan = planned(sdxl, only_patterns=f"[{pattern!r}]")
    assert shown(plan) == wanted
    out = planned(sdxl, exclude_patterns=f"[{pattern!r}]")
    assert {row.shown_name for row in out.rows if row.unwanted} == {*wanted}
    assert shown(planned(sdxl, exclude_patterns=".*", include_patterns=pattern)) == wanted
    for text in (f"{pattern}=7", f"{{{pattern!r}: 7}}", f'{{"{pattern}": 7}}'):
        rows = planned(sdxl, network_reg_dims=text, network_reg_alphas=text, network_reg_lrs=text).trained
        assert [row.shown_name for row in rows if (row.dim, row.alpha, row.lr) == (7, 7, 7)] == wanted, text
        assert sum((row.dim, row.alpha, row.lr) == (4, 1, None) for row in rows) == len(rows) - len(wanted), text
    told = [why.row.shown_name for why in planned(sdxl).why(f"{pattern}$" if "|" not in pattern else pattern)]
    assert told == wanted


def test_a_preset_names_the_part(sdxl: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'exclude_name = ["text_encoder1:.*fc1", "unet:.*"]\n[name_algo_map."text_encoder2:.*fc2"]\ndim = 2\n'
    )
    rows = planned(sdxl, preset=str(file)).trained
    names = [row.shown_name for row in rows]
    assert len(names) == 22 and f"{TE2}0.mlp.fc1" in names and f"{TE1}0.mlp.fc1" not in names
    assert [row.shown_name for row in rows if row.dim == 2] == [f"{TE2}0.mlp.fc2", f"{TE2}1.mlp.fc2"]
    file.write_text('use_fnmatch = true\nunet_target_module = []\nexclude_name = ["text_encoder1:*fc1"]\n')
    names = shown(planned(sdxl, preset=str(file)))
    assert len(names) == 22 and f"{TE2}0.mlp.fc1" in names and f"{TE1}0.mlp.fc1" not in names
    with pytest.raises(ValueError, match=r"the regular expression 'text_encoder1:\*' is wrong"):
        presets.read("mine", {"exclude_name": ["text_encoder1:*"]})


@pytest.mark.parametrize(
    "pattern,hint",
    [
        ("te1:.*fc1", "calls that part text_encoder1: write 'text_encoder1:.*fc1'"),
        ("lora_te2:.*fc1", "calls that part text_encoder2: write 'text_encoder2:.*fc1'"),
        ("text_encoder:.*", "'text_encoder' is no part of Stable Diffusion XL, whose parts are text_encoder1, text_"),
        ("dit:.*", "calls that part unet: write 'unet:.*'"),
        ("text_encoder2:mlp", f"must match the whole name '{TE2}0.mlp.fc1': write 'text_encoder2:.*mlp.*'"),
        ("text_encoder2:foo", f"layer names look like '{TE2}0.self_attn.k_proj'; kohya-networks plan"),
        ("text_encoder2:.*attn1.*", f"layer names look like '{TE2}0"),
    ],
)
def test_what_is_nearly_a_part(sdxl: Any, pattern: str, hint: str) -> None:
    assert f"only_patterns: {pattern!r} matches no layer; " in (message := refused(sdxl, only_patterns=pattern))
    assert hint in message


def test_a_part_of_which_nothing_can_be_trained(flux: Any) -> None:
    assert "dit: write 'dit:.*'" in refused(flux, only_patterns="unet:.*")
    message = refused(flux, only_patterns="text_encoder3:SelfAttention")
    assert "none of text_encoder3 can be trained here: give train_t5xxl=True" in message
    message = refused(([None, None], flux[1]), only_patterns="text_encoder1:.*")
    assert "none of text_encoder1 can be trained here: this call does not have it" in message


# -- one spelling of names


def without_level(encoder: nn.Module) -> nn.Module:
    """As transformers 5 has CLIPTextModel."""
    bare: nn.Module = type("CLIPTextModel", (nn.Module,), {})()
    for name, child in encoder.get_submodule("text_model").named_children():
        bare.add_module(name, child)
    return bare


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_names_are_those_of_every_version(name: str) -> None:
    """A table of names, and what patterns of either version mean, under transformers 4 and 5."""
    arch, roots, found = SPECS[name], toy(name, 2), []
    for change in (lambda encoder: encoder, without_level):
        encoders = [change(roots[part.name]) if part.versions else roots[part.name] for part in arch.text_encoders]
        models = encoders, roots[arch.denoiser.name]
        for pattern in ("encoder.layers.1.*", "text_model.encoder.layers.1.*"):
            found.append(shown(planned(models, only_patterns=pattern)))
        first = planned(models).trained[0].shown_name
        assert str(planned(models).why(first)[0]).startswith(f"{first} (lora_te")
    assert found == [found[0]] * 4 and len(found[0]) == 6 * sum(bool(part.versions) for part in arch.text_encoders)


@pytest.mark.parametrize("level", [True, False], ids=["transformers 4", "transformers 5"])
def test_an_expression_on_what_a_name_has_not(level: bool) -> None:
    """The names of both versions are one layer's: the trainer's decides."""
    roots = toy("sdxl", 2)
    encoders = [roots["text_encoder1"] if level else without_level(roots["text_encoder1"]), roots["text_encoder2"]]
    models = encoders, roots["unet"]
    every = planned(models).trained
    denoiser = [row.shown_name for row in every if row.part == "unet"]
    assert shown(planned(models, only_patterns="(?!text_model).*")) == denoiser
    assert shown(planned(models, exclude_patterns="(?!.*text_model).*")) == [
        row.shown_name for row in every if row.part != "unet"
    ]


@pytest.mark.sweep(4)
@pytest.mark.parametrize("arch", RELEASED)
def test_the_trainers_names_decide(arch: str) -> None:
    """So that a plan of diffusers' classes is that of the trainer's own, whatever else diffusers calls its layers."""
    spec, unet = SPECS[arch], skeleton(release_of(arch)).unet
    layers = list(candidates(spec.denoiser, unet))
    known = {entry.dotted for entry in recorded(arch) if entry.part == spec.denoiser.name and entry.saved != "-"}
    known &= {c.trainer_name for c in layers}
    words = ("attn", "mlp", "norm", "proj", "ff", "to_q", "_in", "out", "mod", r"\.0\.", "single", "linear", "embed")
    for pattern in (*(f".*{word}.*" for word in words), "(?!.*attn).*"):
        wanted = {name for name in known if re.fullmatch(pattern, name)}
        meant = Patterns("", [pattern], spec, [(spec.denoiser.name, name) for name in known]).patterns[0].means
        assert not wanted or {c.trainer_name for c in layers if meant(c)} & known == wanted, pattern


def test_whose_names_are_read(sdxl: Any, tmp_path: Path) -> None:
    """A trainer's user speaks as the trainer does, else as his model's classes do, and is told; in Python, as both."""
    every = {row.shown_name: row for row in planned(sdxl).trained if row.part == "unet"}
    own = [name for name, row in every.items() if re.fullmatch(".*[.]0[.].*", row.dotted_name)]
    theirs = [name for name in every if re.fullmatch(".*[.]0[.].*", name)]
    assert 0 < len(theirs) < len(own)
    plan = planned(sdxl, only_patterns="unet:.*[.]0[.].*")
    assert shown(plan) == theirs
    note = "only_patterns: 'unet:.*[.]0[.].*' is read on the trainer's names; the names of this model's classes would"
    assert any(one.startswith(note) and f"in {len(own) - len(theirs)} more layers" in one for one in plan.notes)
    plan = planned(sdxl, only_patterns="unet:down_blocks.*, unet:mid_block.*")
    assert plan.notes[0] == (
        "only_patterns: 'unet:down_blocks.*', 'unet:mid_block.*' are read on names of this model's classes: the "
        "trainer's have no such layer"
    )
    assert not any(
        "_patterns" in note for note in planned(sdxl, only_patterns="encoder.*").notes
    )  # another version of the trainer's own library
    plan = networks.api.plan(sdxl[1], dim=4, alpha=1, only_patterns=".*[.]0[.].*")
    assert [name for name in shown(plan) if name in every] == own
    assert not any("_patterns" in note for note in plan.notes)
    file = tmp_path / "mine.toml"
    file.write_text("text_encoder_target_module = []\nunet_only_name = ['^.*[.]0[.].*$']\n")
    assert [name for name in shown(planned(sdxl, preset=str(file))) if name in every] == theirs  # and convolutions
    file.write_text("text_encoder_target_module = []\nunet_only_name = ['^down_blocks.*']\n")
    assert {name.partition(".")[0] for name in shown(planned(sdxl, preset=str(file)))} == {"input_blocks"}


def test_a_plan_prints_what_patterns_take(sdxl: Any, flux: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Every name in the table, and those of notes, warnings and errors."""
    for models in (sdxl, flux, ([None, None], toy("flux", 1)["dit"])):
        plan = planned(models)
        table = [line.split()[0] for line in plan.to_text().splitlines() if " lora_" in line]
        assert table == [row["name"] for row in plan.to_json()["rows"]] == [row.shown_name for row in plan.rows]
        trained = [row for row in plan.trained]
        for row in trained[::17]:
            assert shown(planned(models, only_patterns=row.shown_name)) == [row.shown_name]
    notes = " ".join(planned(sdxl, networks.lycoris, algo="full", only_patterns="text_encoder2:.*fc1").notes)
    assert f"such as {TE2}0.mlp.fc1, have no rank" in notes
    assert f"{TE1}0.mlp.fc1" in " ".join(networks.lora.plan(17, 1, *sdxl, only_patterns=".*fc1").notes)


def test_errors_of_layers_name_them_so(sdxl: Any) -> None:
    encoders, unet = [text_encoder(), text_encoder(projection=True)], sdxl_unet()
    network = networks.lora.create_network(1.0, 4, 1, None, encoders, unet, only_patterns="text_encoder2:.*0.mlp.fc1")
    network.apply_to(encoders, unet)
    fc1 = encoders[1].get_submodule("text_model.encoder.layers.0.mlp.fc1")
    fc1.weight = nn.Parameter(torch.zeros(32, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=f"^{re.escape(TE2)}0.mlp.fc1: "):
        network.merge_to(encoders, unet, None)


# -- what was meant


@pytest.mark.parametrize(
    "pattern,written",
    [
        ("single_blocks_1_", "single_blocks[.]1[.].*"),  # sd-scripts searches in saved names
        ("lora_unet_single_blocks_1_.*", "single_blocks[.]1[.].*"),
        ("^lora_unet_double_blocks_0_img_attn_(qkv|proj)$", "double_blocks[.]0[.]img_attn[.](qkv|proj)"),
        ("lora_unet_(single|double)_blocks_1_.*", "(single|double)_blocks[.]1[.].*"),
        ("lora_unet_.*_(img|txt)_attn_qkv", ".*[.](img|txt)_attn[.]qkv"),
        ("lora_te1_.*mlp_fc1", "text_encoder1:.*mlp[.]fc1"),
        (
            "double_blocks_0_img_mlp|single_blocks_0_linear1",
            "(double_blocks[.]0[.]img_mlp|single_blocks[.]0[.]linear1)",
        ),
        (r"double_blocks_\d+_txt_mod", r"double_blocks[.]\d+[.]txt_mod"),
        ("img_attn", ".*img_attn.*"),  # searched in dotted ones
        ("double_blocks", "double_blocks.*"),
        ("^single", "single.*"),
        ("qkv$", ".*qkv"),
        (".*img_attn", ".*img_attn.*"),
        ("img_attn|txt_attn", ".*(img_attn|txt_attn).*"),
        ("text_encoder1:mlp", "text_encoder1:.*mlp.*"),
    ],
)
def test_what_to_write(flux: Any, pattern: str, written: str) -> None:
    """It means the layers in whose names the other program finds the expression, and no others."""
    message = refused(flux, networks.lora_flux, network_reg_lrs=f"{{'{pattern}': 1e-4}}")
    assert f"network_reg_lrs: '{pattern}' matches no layer" in message  # as it was written
    proposed = re.search(r"write '(.*)'$", message)
    assert proposed and proposed[1].startswith(written), message
    assert "'.*...*'" not in message
    rows = planned(flux, networks.lora_flux).trained
    of, bare = ("text_encoder1", pattern.partition(":")[2]) if ":" in pattern else ("", pattern)
    own = [row.shown_name for row in rows if of in ("", row.part) and re.search(bare, row.trainer_name)]
    own = own or [row.shown_name for row in rows if re.search(bare, row.saved_name)]
    assert shown(planned(flux, networks.lora_flux, only_patterns=proposed[1])) == own != []


def test_what_no_expression_can_say(flux: Any) -> None:
    """No placeholder."""
    message = refused(flux, networks.lora_flux, only_patterns="single[_]blocks[_]1")
    assert message.endswith("must match the whole dotted name 'single_blocks.1.linear1'")


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"exclude_patterns": "['.*a', '.*b', '.*a']"}, "exclude_patterns=['.*a', '.*b', '.*a'] has the regular "
                                                         "expression '.*a' twice; leave one of the two out"),
        ({"network_reg_dims": ".*a=4,.*a=8"}, "network_reg_dims=.*a=4,.*a=8 has the regular expression '.*a' twice"),
        ({"network_reg_lrs": "{'.*a': 4, '.*a': 4}"}, "has the regular expression '.*a' twice"),
        ({"network_reg_lrs": '{"a": 4, "b": 1, "a": 4.0}'}, "has the regular expression 'a' twice"),
        ({"only_patterns": "['']"}, "the regular expression '' is empty: leave it out, or write '.*' for all layers"),
        ({"network_reg_dims": "=8"}, "the regular expression '' is empty"),
        ({"network_reg_dims": "text_encoder1:=8"}, "write 'text_encoder1:.*' for all layers of text_encoder1"),
        ({"only_patterns": "text_encoder1:*"}, "the regular expression 'text_encoder1:*' is wrong: nothing to repeat"),
        ({"exclude_patterns": ".*"}, "exclude_patterns: '.*' leaves out all "),
        ({"exclude_patterns": "text_encoder1:.*,text_encoder2:.*,unet:.*"}, "'unet:.*' leaves out all "),
    ],
)  # fmt: skip
def test_one_sentence(sdxl: Any, arguments: dict[str, str], words: str) -> None:
    message = refused(sdxl, **arguments)
    assert words in message and "\n" not in message and "problems" not in message


def test_repeated_in_a_file(sdxl: Any, tmp_path: Path) -> None:
    file = tmp_path / "dims.json"
    file.write_text('{"a": 4, "a": 8}')
    assert f"network_reg_dims=@{file} has the regular expression 'a' twice" in refused(
        sdxl, network_reg_dims=f"@{file}"
    )


def test_what_leaves_out_nothing_is_told(sdxl: Any) -> None:
    count = len(planned(sdxl).trained)
    plan = planned(sdxl, only_patterns=".*")
    told = f"only_patterns: '.*' matches all {count} layers that would be trained anyway, so it leaves out nothing"
    assert told in plan.warnings and told in plan.to_json()["warnings"] and len(plan.trained) == count
    assert not any("only_patterns" in w for w in planned(sdxl, only_patterns="unet:.*").warnings)
    assert len(planned(sdxl, exclude_patterns=".*", include_patterns="unet:.*").trained) == count - 24


# -- one cause, one line


def test_many_expressions_are_one_line(flux: Any, sdxl: Any) -> None:
    """Those of another trainer, and those of another model."""
    for count, named in ((2, "'{0}', '{1}' match"), (4, "'{0}', '{1}', '{2}' and 1 more match")):
        names = {"img_attn": "img_attn.*", "linear1": "linear1"}
        theirs = [f"_blocks_{i}_{name}" for i in (0, 1) for name in names][:count]
        message = refused(flux, networks.lora_flux, network_reg_dims=str(dict.fromkeys(theirs, 8)))
        assert f"network_reg_dims: {named.format(*theirs)} no layer; saved names such as" in message
        written = [f".*_blocks[.]{i}[.]{name}" for i in (0, 1) for name in names.values()][:count]
        assert message.endswith(f": write {written}")
    message = refused(flux, only_patterns=r"['_blocks_\d+_img_mlp', 'double_blocks_0_txt_mlp']")
    written = message.partition(": write ")[2]
    assert written == r"[r'.*_blocks[.]\d+[.]img_mlp.*', 'double_blocks[.]0[.]txt_mlp.*']"
    assert len(planned(flux, only_patterns=written).trained) == 6
    message = refused(sdxl, only_patterns=",".join(f"double_blocks.{i}.*" for i in range(19)))
    assert (
        "'double_blocks.0.*', 'double_blocks.1.*', 'double_blocks.2.*' and 16 more match no layer; layer n" in message
    )
    assert "\n" not in message
    message = refused(sdxl, network_reg_dims=str(dict.fromkeys((f".*conv{i}" for i in (1, 2)), 8)))
    assert "network_reg_dims: '.*conv1', '.*conv2' match only layers that are not trained, such as" in message
    message = refused(sdxl, network_reg_dims="{'.*': 8, '.*fc1': 4, '.*fc2': 4}")
    assert "network_reg_dims: '.*fc1', '.*fc2' decide no layer: " in message


@pytest.mark.parametrize(
    "module,dim,arguments,words",
    [
        (networks.lycoris, 1, {"algo": "boft"}, "boft has no blocks of up to 1 for "),
        (networks.lora, 4, {"algo": "tlora", "min_rank": "8"}, "min_rank=8 is above its dim 4"),
    ],
)
def test_what_fits_no_layer_is_one_line(
    sdxl: Any, module: Any, dim: int, arguments: dict[str, str], words: str
) -> None:
    message = refused(sdxl, module, dim, **arguments)
    assert words in message and "\n" not in message
    assert (count := re.search(r"\((\d+) layers, such as (\S+)\)$", message)) and int(count[1]) > 20
    assert shown(planned(sdxl, only_patterns=count[2])) == [count[2]]


def test_grouped() -> None:
    """The example is of a layer for which the remedy helps all."""
    reasons = [("no 4 of 320: use 10", "a"), ("no 4 of 768: use 6", "b"), ("no 4 of 640: use 10", "c"), ("odd", "d")]
    assert grouped(reasons) == ["no 4 of 640: use 10 (3 layers, such as c)", "d: odd"]
    assert grouped([]) == []
