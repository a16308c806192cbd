"""Argument text -> values: coercions, aliases, neutral values, and what the errors say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from networks.archs import ARCHS
from networks.args.coerce import coerce
from networks.args.parse import NetArgs, Problems, parse
from networks.args.table import TABLE


def read(**raw: Any) -> NetArgs:
    problems = Problems("networks.x")
    args = parse(raw, "lora", problems)
    problems.raise_if_any()
    return args


@pytest.mark.parametrize("text,value", [("True", True), ("tRuE", True), ("1", True), ("yes", True), ("on", True)])
@pytest.mark.parametrize("typed", [False, True])
def test_booleans(text: str, value: bool, typed: bool) -> None:
    assert read(use_scalar=value if typed else text).use_scalar is value
    for off in ("False", "0", "no", "OFF", False, 0):
        assert read(use_scalar=off).use_scalar is False


@pytest.mark.parametrize(
    "raw,name,value",
    [
        ({"conv_dim": "8"}, "conv_dim", 8),
        ({"conv_dim": "8.0"}, "conv_dim", 8),
        ({"conv_dim": 1e13}, "conv_dim", 10**13),
        ({"conv_dim": "none"}, "conv_dim", None),
        ({"conv_dim": ""}, "conv_dim", None),
        ({"dropout": "undefined"}, "dropout", 0.0),
        ({"neuron_dropout": 0.25}, "dropout", 0.25),
        ({"neuron_dropout": 0.25, "dropout": 0.25}, "dropout", 0.25),
        ({"use_rslora": "true"}, "rs_lora", True),
        ({"use_cp": "true"}, "use_tucker", True),
        ({"use_conv_cp": "true"}, "use_tucker", True),
        ({"algo": "LoHa"}, "algo", "loha"),
        ({"blocks": "0-2, 5"}, "blocks", (0, 1, 2, 5)),
        ({"blocks": "all"}, "blocks", None),
        ({"blocks": "none"}, "blocks", ()),
        ({"blocks": [1, 3]}, "blocks", (1, 3)),
        ({"exclude_patterns": "['.*a.*', \"b{1,2}\"]"}, "exclude_patterns", (".*a.*", "b{1,2}")),
        ({"exclude_patterns": ".*a.*,b{1,2}"}, "exclude_patterns", (".*a.*", "b{1,2}")),
        ({"exclude_patterns": "[abc].*"}, "exclude_patterns", ("[abc].*",)),
        ({"exclude_patterns": "(a|b).*"}, "exclude_patterns", ("(a|b).*",)),
        ({"exclude_patterns": ["x"]}, "exclude_patterns", ("x",)),
        ({"network_reg_dims": "{'.*a.*': 8, 'b': 0}"}, "network_reg_dims", {".*a.*": 8, "b": 0}),
        ({"network_reg_dims": '{".*a.*": 8}'}, "network_reg_dims", {".*a.*": 8}),
        ({"network_reg_dims": ".*a{1,2}=8,(?=b).*=4"}, "network_reg_dims", {".*a{1,2}": 8, "(?=b).*": 4}),
        ({"network_reg_lrs": ".*=1e-4"}, "network_reg_lrs", {".*": 1e-4}),
        ({"network_reg_dims": {"a": 2}}, "network_reg_dims", {"a": 2}),
    ],
)
def test_values(raw: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(read(**raw), name) == value


def test_files(tmp_path: Path) -> None:
    (tmp_path / "dims.toml").write_text("'.*attn1.*' = 8\n'.*ff.*' = 4\n")
    (tmp_path / "dims.json").write_text(json.dumps({".*attn1.*": 8}))
    (tmp_path / "names.txt").write_text("# comment\n.*attn1.*\n\nb{1,2}\n")
    assert read(network_reg_dims=f"@{tmp_path / 'dims.toml'}").network_reg_dims == {".*attn1.*": 8, ".*ff.*": 4}
    assert read(network_reg_dims=f"@{tmp_path / 'dims.json'}").network_reg_dims == {".*attn1.*": 8}
    assert read(exclude_patterns=f"@{tmp_path / 'names.txt'}").exclude_patterns == (".*attn1.*", "b{1,2}")
    (tmp_path / "names.toml").write_text("patterns = ['.*attn1.*', 'b{1,2}']\n")
    (tmp_path / "dims.txt").write_text(".*attn1.*=8\n# comment\n.*ff.*=4\n")
    assert read(exclude_patterns=f"@{tmp_path / 'names.toml'}").exclude_patterns == (".*attn1.*", "b{1,2}")
    assert read(network_reg_dims=f"@{tmp_path / 'dims.txt'}").network_reg_dims == {".*attn1.*": 8, ".*ff.*": 4}
    with pytest.raises(ValueError, match="does not exist"):
        read(network_reg_dims="@nowhere.toml")


@pytest.mark.parametrize(
    "raw,words",
    [
        ({"use_tucker": "Ture"}, ["use_tucker=Ture", "not a boolean", "True or False"]),
        ({"use_tucker": ""}, ["not a boolean"]),
        ({"rank_dropot": "0.1"}, ["rank_dropot", "did you mean rank_dropout?"]),
        ({"rank_dropout": "1"}, ["too large", "below 1"]),
        ({"rank_dropout": "-0.1"}, ["too small"]),
        ({"rank_dropout": "nan"}, ["finite"]),
        ({"rank_dropout": "much"}, ["not a number"]),
        ({"conv_dim": "4.5"}, ["whole number"]),
        ({"conv_dim": "1e400"}, ["whole number"]),
        ({"algo": "lokrr"}, ["did you mean lokr?"]),
        ({"factor": "8"}, ["no effect with algo=lora", "lokr"]),
        ({"full_matrix": "True"}, ["no effect with algo=lora"]),
        ({"conv_alpha": "4"}, ["without conv_dim"]),
        ({"use_cp": "True", "use_tucker": "False"}, ["contradicts"]),
        ({"exclude_patterns": "['(']"}, ["regular expression"]),
        ({"network_reg_dims": "abc"}, ["regex=value"]),
        ({"network_reg_dims": "{'a': 4"}, ["write it as"]),
        ({"network_reg_dims": ".*=-1"}, ["too small"]),
        ({"network_reg_dims": ".*=1.5"}, ["whole number"]),
        ({"network_reg_dims": "[1, 2]"}, ["mapping"]),
        ({"conv_alpha": "4", "conv_dim": "0"}, ["without conv_dim"]),
        ({"blocks": "a-b"}, ["no block number"]),
        ({"blocks": "5-2"}, ["no block number"]),
    ],
)
def test_errors(raw: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        read(**raw)
    for word in words:
        assert word in str(caught.value)


def test_all_mistakes_come_in_one_message() -> None:
    with pytest.raises(ValueError) as caught:
        read(use_tucker="Ture", rank_dropot="0.1", conv_dim="x")
    message = str(caught.value)
    assert "3 problems" in message and message.count("\n  - ") == 3


def test_neutral_values_pass_where_the_argument_cannot_apply() -> None:
    read(factor="-1", full_matrix="False", decompose_both="no", use_tucker=False, module_dropout=0, conv_dim="0")
    read(unbalanced_factorization="0", loraplus_lr_ratio="1", exclude_patterns="[]", network_reg_dims="{}")
    read(conv_dim="0", conv_alpha="1", dropout=None)


def test_none_is_an_empty_list_or_mapping() -> None:
    args = read(network_reg_dims="none", only_patterns="None", exclude_patterns="")
    assert (args.network_reg_dims, args.only_patterns, args.exclude_patterns) == ({}, (), ())


def test_every_argument_accepts_its_own_default() -> None:
    for arg in TABLE:
        if arg.default is not None:
            assert coerce(arg, arg.default) == arg.default
            assert arg.is_neutral(arg.default)


def test_unknown_arguments_can_be_allowed(caplog: pytest.LogCaptureFixture) -> None:
    assert read(foo="1", allow_unknown="True").allow_unknown
    assert "foo" in caplog.text


def test_not_given_words_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    read(conv_dim="None")
    assert "not given" in caplog.text


PAGE = (Path(__file__).parents[1] / "docs" / "arguments.md").read_text(encoding="utf-8")
SECTIONS = {text.partition("`")[0]: text for text in PAGE.split("\n### `")[1:]}


def test_documentation_has_every_argument() -> None:
    assert SECTIONS.keys() == {arg.name for arg in TABLE}
    for arg in TABLE:
        section = SECTIONS[arg.name]
        assert all(f"`{name}`" in f"`{section}" for name in arg.names) and arg.help[1:] in section
        assert "- in the file: " in section and all(word.partition("=")[0] in section for word in arg.written)


def test_documentation_says_which_models_have_an_argument() -> None:
    for arch in ARCHS:
        assert all(arch.title in SECTIONS[name] for name in arch.arguments)
    assert "FLUX.1: trained if not given, under musubi left out" in SECTIONS["exclude_mod"]
    assert (
        "Stable Diffusion XL: 9" in SECTIONS["up_lr_weight"] and "Stable Diffusion XL: 3" in SECTIONS["mid_lr_weight"]
    )
    assert not any(arch.title in arg.help for arch in ARCHS for arg in TABLE), "records say it"
