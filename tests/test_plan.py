"""Which layers get what: patterns, blocks, dims, alphas, rates; and arguments that would have no effect."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from tiny_parts import sd_unet, text_encoder
from torch import nn

import networks.dylora
import networks.loha
import networks.lokr
import networks.lora
import networks.lycoris
from networks import api
from networks.plan.plan import Plan, PlanRow


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return text_encoder(), sd_unet()


def rows(plan: Plan, part: str = "unet") -> dict[str, PlanRow]:
    return {row.dotted_name: row for row in plan.trained if row.part == part}


TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def test_two_layers_of_one_saved_name_are_refused() -> None:
    """One would shadow the other in the network and in its file."""
    unet = sd_unet()
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.add_module("attn1_to_q", nn.Linear(4, 4))
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    with pytest.raises(
        ValueError, match=rf"transformer_blocks.0.attn1_to_q \({name}\): two layers would have one saved name"
    ):
        networks.lora.plan(4, 1, None, unet)
    one = networks.lora.plan(4, 1, None, unet, exclude_patterns=r".*attn1\.to_q")  # the other is not trained
    assert name in {row.saved_name for row in one.trained}


@pytest.mark.parametrize("argument", ["exclude_patterns", "only_patterns", "include_patterns"])
@pytest.mark.parametrize("part", [slice(None, -2), slice(2, None), slice(2, -2)], ids=["begins", "ends", "inside"])
def test_a_pattern_is_of_the_whole_name(argument: str, part: slice, models: Any) -> None:
    """One that fits a part of a name alone matches nothing, wherever in the name that part is."""
    with pytest.raises(ValueError, match=f"{argument}: .* matches no layer; a pattern must match the whole name"):
        networks.lora.plan(4, 1, *models, **{argument: TO_Q[part]})


def test_a_ratio_of_0_for_the_denoiser_is_no_ratio_for_all(models: Any) -> None:
    encoder, unet = models
    plan = networks.lora.plan(4, 1, encoder, unet, loraplus_lr_ratio="4", loraplus_unet_lr_ratio="0")
    ratios = {(row.part, row.plus_ratio) for row in plan.trained}
    assert ratios == {("unet", 0.0), ("text_encoder", 4.0)}
    plan = networks.lora.plan(4, 1, encoder, unet, loraplus_lr_ratio="4", loraplus_text_encoder_lr_ratio="0")
    assert {(row.part, row.plus_ratio) for row in plan.trained} == {("unet", 4.0), ("text_encoder", 0.0)}


def test_dim_alpha_scale(models: Any) -> None:
    row = rows(networks.lora.plan(8, 2, *models))[TO_Q]
    assert (row.dim, row.alpha, row.scale, row.parameters, row.bytes) == (8, 2, 0.25, 8 * (16 + 16), 8 * 32 * 4)
    assert rows(networks.lora.plan(8, 0, *models))[TO_Q].scale == 1.0
    assert rows(networks.lora.plan(8, 0, *models, rs_lora="True"))[TO_Q].scale == 1.0
    assert rows(networks.lora.plan(8, 2, *models, rs_lora="True"))[TO_Q].scale == pytest.approx(2 / math.sqrt(8))
    assert rows(networks.lora.plan(None, 1, *models))[TO_Q].dim == 4


def test_convolutions(models: Any) -> None:
    plain = rows(networks.lora.plan(8, 4, *models))
    conv = rows(networks.lora.plan(8, 4, *models, conv_dim="2"))
    assert not any("resnets" in name for name in plain)
    kernel = conv["down_blocks.0.resnets.0.conv1"]
    assert (kernel.dim, kernel.alpha, kernel.scale) == (2, 1.0, 0.5)
    assert conv["down_blocks.0.resnets.0.time_emb_proj"].dim == 8  # Linears of those blocks keep network_dim
    assert conv["up_blocks.0.resnets.0.conv_shortcut"].dim == 8  # so do 1x1 convolutions
    given = rows(networks.lora.plan(8, 4, *models, conv_dim="2", conv_alpha="2"))
    assert given["down_blocks.0.resnets.0.conv1"].scale == 1.0


def test_regex_dims_alphas_and_rates(models: Any) -> None:
    found = rows(
        networks.lora.plan(
            8,
            4,
            *models,
            network_reg_dims="{r'.*attn1\\.to_q': 2, '.*attn1.*': 6, '.*ff.*': 0}",
            network_reg_alphas=".*attn1.*=3",
            network_reg_lrs=".*attn2.*=0.5",
            loraplus_lr_ratio="4",
            loraplus_unet_lr_ratio="16",
        )
    )
    assert (found[TO_Q].dim, found[TO_Q].alpha, found[TO_Q].scale) == (2, 3, 1.5)  # scale from its own dim
    assert (found[TO_Q.replace("to_q", "to_k")].dim, found[TO_Q.replace("to_q", "to_k")].scale) == (6, 0.5)
    assert not any(".ff." in name for name in found)
    assert found[TO_Q.replace("attn1", "attn2")].lr == 0.5 and found[TO_Q].lr is None
    assert {row.plus_ratio for row in found.values()} == {16}
    text = rows(networks.lora.plan(8, 4, *models, loraplus_lr_ratio="4"), "text_encoder")
    assert {row.plus_ratio for row in text.values()} == {4}


def test_patterns(models: Any) -> None:
    every = rows(networks.lora.plan(4, 1, *models))
    without = rows(networks.lora.plan(4, 1, *models, exclude_patterns="['.*attn1.*']"))
    assert without.keys() == {name for name in every if "attn1" not in name}
    rescued = rows(networks.lora.plan(4, 1, *models, exclude_patterns=".*attn1.*", include_patterns=".*to_q"))
    assert rescued.keys() == {name for name in every if "attn1" not in name or name.endswith("to_q")}
    only = networks.lora.plan(4, 1, *models, only_patterns=".*attn2.*")
    assert rows(only).keys() == {name for name in every if "attn2" in name} and not rows(only, "text_encoder")
    reasons = {row.dotted_name: row.reason for row in only.rows if not row.trained}
    assert reasons[TO_Q] == "not in only_patterns"


def test_blocks(models: Any) -> None:
    found = networks.lora.plan(4, 1, *models, blocks="1-3")
    assert rows(found) and all(name.startswith("down_blocks.0.") for name in rows(found))
    assert rows(found, "text_encoder")  # block lists speak of the denoiser alone


@pytest.mark.parametrize(
    "kwargs,words",
    [
        ({"network_reg_dims": "foo=8"}, ["network_reg_dims: 'foo' matches no layer", "look like"]),
        ({"network_reg_dims": "attn1=8"}, ["must match the whole name", "'.*attn1.*'"]),
        ({"only_patterns": "lora_unet_down.*"}, ["matches no layer", "whole dotted name", "write 'down.*'"]),
        ({"exclude_patterns": ".*resnets.*conv1"}, ["only layers that are not trained", "conv_dim"]),
        ({"network_reg_lrs": ".*conv_in=1e-3"}, ["only layers that are not trained", "outside"]),
        ({"include_patterns": ".*attn1.*"}, ["rescues nothing", "only_patterns"]),
        ({"blocks": "24-25"}, ["blocks 0 to 24"]),
        ({"exclude_patterns": ".*"}, ["'.*' leaves out all 60 layers", "include_patterns"]),
        ({"algo": "glora", "use_tucker": "True"}, ["use_tucker=True has no effect"]),
        ({"algo": "lokr", "decompose_both": "True"}, ["decompose_both has no effect"]),
        ({"network_reg_dims": "{'.*attn.*': 2, '.*attn2.*': 3}"}, ["'.*attn2.*' decides no layer", "first match wins"]),
        (
            {"network_reg_dims": ".*attn1.*=2", "exclude_patterns": ".*attn1.*"},
            ["network_reg_dims", "decides no layer"],
        ),
        ({"network_reg_lrs": ".*mid_block.*=0.1", "blocks": "1"}, ["network_reg_lrs", "decides no layer"]),
        ({"exclude_patterns": ".*attn1.*", "include_patterns": ".*attn1.*"}, ["exclude_patterns", "decides no layer"]),
        ({"algo": "lokr", "full_matrix": "True", "network_reg_alphas": ".*=2"}, ["network_reg_alphas", "no layer"]),
        ({"blocks": "none", "exclude_patterns": ".*self_attn.*,.*mlp.*"}, ["no layer is left"]),
    ],
)
def test_no_argument_without_effect(models: Any, kwargs: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        networks.lora.plan(8, 4, *models, **kwargs)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "kwargs,words",
    [
        ({"conv_dim": "4", "only_patterns": ".*attn1.*"}, "conv_dim (no trained layer is in a convolutional block"),
        (
            {"algo": "lokr", "full_matrix": "True", "rank_dropout": "0.1"},
            "rank_dropout (no trained layer has a rank activation)",
        ),
        ({"dropout": "0.1", "algo": "full"}, "dropout (no trained layer has a rank activation)"),
        ({"use_tucker": "True"}, "use_tucker (no trained layer has a low-rank kernel above 1x1; conv_dim trains"),
        ({"algo": "lokr", "conv_dim": "100", "use_tucker": "True"}, "use_tucker (no trained layer has a low-rank"),
    ],
)
def test_what_the_host_lists_is_told_where_it_has_no_effect(models: Any, kwargs: dict[str, str], words: str) -> None:
    """In one line, and the call goes on; the same argument elsewhere is a mistake."""
    plan = networks.lora.plan(8, 4, *models, **kwargs)
    lines = [line for line in plan.warnings if line.startswith("networks.lora: without effect here, so not used: ")]
    assert len(lines) == 1 and words in lines[0]
    with pytest.raises(ValueError, match="has no effect"):
        api.plan(models[1], **kwargs)


def test_conv_dim_alone_may_let_a_linear_in(models: Any) -> None:
    found = rows(networks.lora.plan(8, 4, *models, conv_dim="4", only_patterns=".*time_emb_proj"))
    assert found and all(name.endswith("time_emb_proj") for name in found)


def test_a_ratio_for_a_part_that_is_not_there(models: Any) -> None:
    told = networks.lora.plan(8, 4, None, models[1], loraplus_text_encoder_lr_ratio="4").warnings
    assert any("loraplus_text_encoder_lr_ratio (no layer of that part is trained)" in line for line in told)


def test_mistakes_of_text_and_of_selection_come_together(models: Any) -> None:
    with pytest.raises(ValueError) as caught:
        networks.lora.plan(8, 4, *models, use_tucker="Ture", network_reg_dims="foo=8", rank_dropot="0.1")
    assert "3 problems" in str(caught.value)


def test_notes_count_what_a_layer_goes_without(models: Any) -> None:
    plan = networks.lokr.plan(4, 4, *models, conv_dim="4", rank_dropout="0.1", factor="2")
    assert any("no rank activation" in note for note in plan.notes)


def whole_factors(models: Any, dim: int, **kwargs: str) -> list[str]:
    return [line for line in networks.lokr.plan(dim, 4, *models, **kwargs).warnings if "have whole factors" in line]


def test_whole_factors_of_lokr_are_a_warning_whose_advice_helps(models: Any) -> None:
    """Among its own layers alone; of rs_lora only where it is asked for; none where it is asked for by its name."""
    (said,) = whole_factors(models, 8, factor="2", train_norm="true")
    plan = networks.lokr.plan(8, 4, *models, factor="2", train_norm="true")
    own = [row for row in plan.trained if row.algo == "lokr"]
    whole = [row for row in own if row.layout.rank is None]
    assert len(own) < len(plan.trained) and said.startswith(f"{len(whole)} of {len(own)} lokr layers, such as ")
    assert whole[0].shown_name in said and "scale 1 whatever alpha says" in said and "rs_lora" not in said
    assert not any("whole factors" in note for note in plan.notes)
    lower = int(said.partition("at most ")[2].partition(",")[0])
    for dim, rank in ((lower, lower), (lower + 1, None)):
        again = {row.saved_name: row for row in networks.lokr.plan(dim, 4, *models, factor="2").trained}
        assert again[whole[0].saved_name].layout.rank == rank
    assert "whatever alpha and rs_lora say" in whole_factors(models, 8, factor="2", rs_lora="True")[0]
    assert not whole_factors(models, 8, factor="2", full_matrix="True")


def test_what_an_algorithm_does_otherwise_than_elsewhere_is_noted_there(models: Any) -> None:
    def told(entry: Any, *, host: str = "sd_scripts", **kwargs: str) -> list[str]:
        plan = entry.plan(4, 4, *models, host=host, **kwargs)
        return [note for note in plan.notes if note.startswith(("dylora: ", "tlora: "))]

    assert "root of R/b" in told(networks.dylora)[0] and "LyCORIS" in told(networks.lycoris, algo="dylora")[0]
    assert "sig_type=last use_data_init=False" in told(networks.lora, algo="tlora")[0]
    assert not told(networks.lora, algo="tlora", sig_type="last") and not told(networks.lycoris, algo="tlora")
    assert not told(networks.lora, algo="dylora", host="musubi") and not told(networks.lora)


def test_a_dim_above_the_full_rank_is_noted(models: Any) -> None:
    assert any("above the full rank" in note for note in networks.lora.plan(17, 1, *models).notes)
    assert not any("above the full rank" in note for note in networks.lora.plan(16, 1, *models).notes)


def test_the_algorithm_follows_entry_and_argument(models: Any) -> None:
    assert {row.algo for row in networks.loha.plan(2, 1, *models).trained} == {"loha"}
    by_argument = networks.lora.plan(2, 1, *models, algo="lokr", factor="4")
    assert by_argument == networks.lokr.plan(2, 1, *models, factor="4")


def test_text_encoders_may_be_a_model_a_list_or_missing(models: Any) -> None:
    encoder, unet = models
    one = networks.lora.plan(4, 1, encoder, unet)
    assert networks.lora.plan(4, 1, [encoder], unet) == one
    for nothing in (None, [], [None]):
        assert {row.part for row in networks.lora.plan(4, 1, nothing, unet).rows} == {"unet"}
    with pytest.raises(ValueError, match="1 text encoders, but 2"):
        networks.lora.plan(4, 1, [encoder, encoder], unet)


def test_json_and_text_state_every_layer(models: Any) -> None:
    plan = networks.lora.plan(8, 4, *models)
    data = json.loads(json.dumps(plan.to_json()))
    assert len(data["rows"]) == len(plan.rows) == data["totals"]["layers"]
    trained = [row for row in data["rows"] if row["trained"]]
    wanted = {"dotted_name", "saved_name", "kind", "shape", "dim", "alpha", "scale", "lr", "parameters", "bytes"}
    assert all(wanted <= row.keys() for row in trained)
    assert all(row["reason"] for row in data["rows"] if not row["trained"])
    assert data["totals"]["parameters"] == sum(row["parameters"] for row in trained)
    text = plan.to_text()
    assert all(row.saved_name in text and row.dotted_name in text for row in plan.rows)
    assert f"{data['totals']['parameters']:,} parameters" in text


@pytest.mark.parametrize("dim,alpha,word", [(0, 1, "network_dim=0"), (-2, 1, "too small"), (4, -1, "negative")])
def test_dim_and_alpha_are_checked(models: Any, dim: int, alpha: float, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        networks.lora.plan(dim, alpha, *models)
