"""Why a layer is trained or not, and where its values come from: each rule by itself, the order, and `plan.why`."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
from tiny_parts import sd_unet, text_encoder
from torch import nn
from toy_models import toy

import networks.lora
from networks.archs import ARCHS
from networks.files import codec
from networks.plan.plan import Plan
from networks.plan.rules import ADMISSION, CHOICE, RULES
from networks.plan.values import VALUES
from networks.plan.why import Why, saying

SPECS = {spec.name: spec for spec in ARCHS}
ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
BARE = "mid_block.attentions.0.transformer_blocks.0.norm1"
KERNEL = "down_blocks.0.resnets.0.conv1"
PRESET = """
unet_target_module = ["Attention"]
unet_target_name = ["conv_out", "conv_in"]
exclude_name = ["conv_in", "time_embedding.linear_1"]
[name_algo_map."to_q"]
dim = 5
alpha = 6
"""


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("presets") / "mine.toml"
    path.write_text(PRESET, encoding="utf-8")
    return str(path)


def planned(arch: str, **arguments: str) -> Plan:
    if arch == "sd":
        unet = sd_unet()
        unet.mid_block.attentions[0].transformer_blocks[0].norm1 = nn.LayerNorm(16, elementwise_affine=False)
        return networks.lora.plan(4, 2, text_encoder(), unet, **arguments)
    models, spec = toy(arch), SPECS[arch]
    encoders = [models.get(part.name) for part in spec.text_encoders]
    return networks.lora.plan(4, 2, encoders, models[spec.denoiser.name], **arguments)


def words(why: Why) -> dict[str, str]:
    return {rule.name: saying(rule, word) for rule, word in why.words}


BLOCKS, FIVES = (",".join([number] * 25) for number in "75")
# rule -> architecture, arguments, layer, the rule's word on it; in the order in which the rules are asked
SAYINGS: dict[str, list[tuple[str, dict[str, str], str, str]]] = {
    "part": [
        ("flux", {}, "encoder.block.0.layer.0.SelfAttention.q", "leaves it out: give train_t5xxl=True to train it"),
        ("flux", {"train_t5xxl": "True"}, "encoder.block.0.layer.0.SelfAttention.q", "passes"),
    ],
    "containers": [
        ("sd", {}, ATTENTION, "passes"),
        ("sd", {}, "conv_in", "leaves it out: outside Transformer2DModel, "),
        (
            "anima",
            {},
            "llm_adapter.blocks.0.self_attn.q_proj",
            "leaves it out: give train_llm_adapter=True to train it",
        ),
        ("flux", {}, "img_in", "leaves it out: give in_dims to train it"),
    ],
    "preset": [
        ("sd", {"preset": "PRESET"}, ATTENTION, "takes it in"),
        ("sd", {"preset": "PRESET"}, ATTENTION.replace("attn1.to_q", "ff.net.2"), "leaves it out: not in the preset "),
    ],
    "conv_dim": [
        ("sd", {}, KERNEL, "leaves it out: in a convolutional block: give conv_dim to train it"),
        ("sd", {"conv_dim": "2"}, KERNEL, "passes"),
        ("sd", {"preset": "full-lin"}, KERNEL, "leaves it out: the preset has enable_conv = false"),
    ],
    "preset, exclude_name": [
        ("sd", {"preset": "PRESET"}, "conv_in", "leaves it out: excluded by the preset: 'conv_in'")
    ],
    "layers outside the blocks": [("flux", {"in_dims": "[2,0,0,0,0]"}, "img_in", "takes it in (in_dims)")],
    "algo, train_norm": [("sd", {"algo": "norm"}, ATTENTION, "leaves it out: norm is for normalisation layers alone")],
    "normalisation": [
        (
            "sd",
            {"train_norm": "affine"},
            BARE,
            "leaves it out: has no weight of its own (train_norm=affine)",
        ),
    ],
    "exclude_patterns, include_patterns": [
        ("sd", {"exclude_patterns": ".*attn1.*"}, ATTENTION, "leaves it out: excluded by '.*attn1.*'"),
        (
            "sd",
            {"exclude_patterns": ".*attn1.*", "include_patterns": ".*to_q"},
            ATTENTION,
            "passes: '.*attn1.*' matches, include_patterns '.*to_q' keeps it",
        ),
    ],
    "default excludes, include_patterns": [
        ("qwen_image", {}, "transformer_blocks.0.img_mod.1", "leaves it out: give exclude_mod=False to train it"),
        ("qwen_image", {"exclude_mod": "False"}, "transformer_blocks.0.img_mod.1", "passes"),
    ],
    "only_patterns": [("sd", {"only_patterns": ".*attn2.*"}, ATTENTION, "leaves it out: not in only_patterns")],
    "blocks, train_blocks, indices": [
        ("sd", {"blocks": "0-11"}, ATTENTION, "leaves it out: block 12 is not in blocks"),
        (
            "flux",
            {"train_blocks": "single"},
            "double_blocks.0.img_attn.qkv",
            "leaves it out: not in train_blocks=single",
        ),
        (
            "flux",
            {"train_double_block_indices": "1"},
            "double_blocks.0.img_attn.qkv",
            "leaves it out: block 0 is not in train_double_block_indices",
        ),
    ],
    "dim": [
        ("sd", {"network_reg_dims": ".*attn1.*=0"}, ATTENTION, "leaves it out: dim 0 (network_reg_dims .*attn1.*)"),
        ("flux", {"img_attn_dim": "0"}, "double_blocks.0.img_attn.qkv", "leaves it out: dim 0 (img_attn_dim)"),
    ],
    "learning rate": [
        ("sd", {"mid_lr_weight": "0"}, ATTENTION, "leaves it out: its block has the learning rate factor 0"),
    ],
}


def test_every_rule_and_every_source_is_explained_and_has_a_case() -> None:
    assert [rule.name for rule in RULES] == [*SAYINGS][:8] + ["file"] + [*SAYINGS][8:]
    for one in (*RULES, *(source for sources in VALUES.values() for source in sources)):
        assert one.sentence.endswith("."), one.name


@pytest.mark.parametrize("rule,case", [(rule, case) for rule, cases in SAYINGS.items() for case in cases])
def test_the_word_of_a_rule(rule: str, case: tuple[str, dict[str, str], str, str], preset: str) -> None:
    arch, arguments, layer, wanted = case
    arguments = {name: preset if text == "PRESET" else text for name, text in arguments.items()}
    (why,) = planned(arch, **arguments).why(layer)
    assert words(why)[rule].startswith(wanted)
    if "leaves" in wanted:
        assert not why.row.trained and any(word.out == why.row.reason for _, word in why.words if word)


# Layers that several rules leave out: (arguments, layer, the reasons in the order of the rules, which of them counts)
REASONS: list[tuple[dict[str, str], str, tuple[str, ...], int]] = [
    ({}, "conv_in", ("outside Transformer2DModel", "kernel above 1x1: give conv_dim", "dim 0"), 0),
    (
        {"exclude_patterns": ".*attn1.*", "only_patterns": ".*attn2.*"},
        ATTENTION,
        ("excluded by '.*attn1.*'", "not in only_patterns"),
        0,
    ),
    (
        {"only_patterns": ".*attn2.*", "mid_lr_weight": "0"},
        ATTENTION,
        ("not in only_patterns", "its block has the learning rate factor 0"),
        0,
    ),
    (
        {"preset": "PRESET"},
        "time_embedding.linear_1",
        ("outside Transformer2DModel", "not in the preset", "excluded by the preset: 'time_embedding.linear_1'"),
        2,
    ),
]


@pytest.mark.parametrize("arguments,layer,reasons,counts", REASONS)
def test_which_of_several_reasons_counts(
    arguments: dict[str, str], layer: str, reasons: tuple[str, ...], counts: int, preset: str
) -> None:
    """The first, as it is the first that a user would have to change; but what a preset excludes stays out whatever
    else is changed, so that this is told."""
    (why,) = planned("sd", **{name: preset if text == "PRESET" else text for name, text in arguments.items()}).why(
        layer
    )
    said = [word.out for _, word in why.words if word and word.out]
    assert len(said) == len(reasons) and all(map(str.startswith, said, reasons))
    assert why.row.reason == said[counts]


CALLS: list[tuple[str, dict[str, str]]] = [(a, args) for cases in SAYINGS.values() for a, args, _, _ in cases]
CALLS += [("sd", {"preset": "PRESET", "conv_dim": "0"}), ("flux", {"preset": "PRESET", "in_dims": "[2,0,0,0,0]"})]
CALLS += [("sd", {"train_norm": "True", "conv_dim": "2", "block_dims": BLOCKS}), ("lumina", {"refiner_dim": "2"})]


@pytest.mark.parametrize("arch,arguments", CALLS)
def test_the_words_add_up_to_the_plan(arch: str, arguments: dict[str, str], preset: str) -> None:
    plan = planned(arch, **{name: preset if text == "PRESET" else text for name, text in arguments.items()})
    explained = plan.why("")
    assert [why.row for why in explained] == list(plan.rows)
    for why in explained:
        said = {rule: word for rule, word in why.words if word}
        if not why.row.trained:
            assert why.row.reason in {word.out for word in said.values()}
            continue
        assert not any(said[rule].out for rule in CHOICE if rule in said)
        last = [word for rule, word in said.items() if rule in ADMISSION and (word.out or word.takes_in)]
        assert not last or last[-1].takes_in
        found = {name: next(f.value for _, f in sources if f is not None) for name, sources in why.values.items()}
        assert (found["dim"], found["learning rate"]) == (why.row.dim, why.row.lr)
        assert found["alpha"] == why.row.alpha and found["factor of its block"] == why.row.block_rate


# Sources that all speak of one layer, in the order in which they count.
PRECEDENCE: list[tuple[str, str, str, dict[str, str], list[tuple[str, float]]]] = [
    (
        "dim",
        "sd",
        ATTENTION,
        {"network_reg_dims": ".*attn1.to_q=8", "block_dims": BLOCKS, "preset": "PRESET"},
        [("network_reg_dims", 8), ("block_dims, conv_block_dims", 7), ("preset", 5), ("network_dim", 4)],
    ),
    (
        "dim",
        "sd",
        "conv_out",
        {"network_reg_dims": "conv_out=8", "conv_dim": "3", "preset": "PRESET"},
        [("network_reg_dims", 8), ("conv_dim", 3), ("network_dim", 4)],
    ),
    (
        "dim",
        "flux",
        "img_in",
        {"network_reg_dims": "img_in=8", "in_dims": "[2,0,0,0,0]"},
        [("network_reg_dims", 8), ("layers outside the blocks", 2), ("network_dim", 4)],
    ),
    (
        "dim",
        "flux",
        "double_blocks.0.img_attn.qkv",
        {
            "network_reg_dims": ".*0.img_attn.qkv=8",
            "img_attn_dim": "6",
            "block_dims": ",".join(["7"] * 21),
        },
        [("network_reg_dims", 8), ("kind of layer", 6), ("block_dims, conv_block_dims", 7), ("network_dim", 4)],
    ),
    (
        "alpha",
        "sd",
        ATTENTION,
        {
            "network_reg_alphas": ".*attn1.to_q=8",
            "block_dims": BLOCKS,
            "block_alphas": ",".join(["3"] * 25),
            "preset": "PRESET",
        },
        [("network_reg_alphas", 8), ("block_alphas, conv_block_alphas", 3), ("preset", 6), ("network_alpha", 2)],
    ),
    (
        "dim",
        "sd",
        KERNEL,
        {"network_reg_dims": ".*conv1=8", "conv_dim": "3", "block_dims": BLOCKS, "conv_block_dims": FIVES},
        [("network_reg_dims", 8), ("block_dims, conv_block_dims", 5), ("conv_dim", 3), ("network_dim", 4)],
    ),
    (
        "alpha",
        "sd",
        KERNEL,
        {
            "network_reg_alphas": ".*conv1=8",
            "conv_dim": "3",
            "conv_alpha": "1.5",
            "block_dims": BLOCKS,
            "conv_block_dims": FIVES,
            "conv_block_alphas": FIVES,
        },
        [("network_reg_alphas", 8), ("block_alphas, conv_block_alphas", 5), ("conv_alpha", 1.5), ("network_alpha", 2)],
    ),
    (
        "LoRA+ ratio",
        "sd",
        ATTENTION,
        {"loraplus_unet_lr_ratio": "8", "loraplus_lr_ratio": "4"},
        [("loraplus_unet_lr_ratio, loraplus_text_encoder_lr_ratio", 8), ("loraplus_lr_ratio", 4)],
    ),
]


@pytest.mark.parametrize("value,arch,layer,arguments,wanted", PRECEDENCE)
def test_the_order_of_sources(
    value: str, arch: str, layer: str, arguments: dict[str, str], wanted: list[tuple[str, float]], preset: str
) -> None:
    (why,) = planned(arch, **{name: preset if text == "PRESET" else text for name, text in arguments.items()}).why(
        layer
    )
    said = [(source.name, found.value) for source, found in why.values[value] if found and found.value is not None]
    assert said == wanted
    got = {"dim": why.row.dim, "alpha": why.row.alpha, "LoRA+ ratio": why.row.plus_ratio}[value]
    assert got == wanted[0][1]


def test_a_file_decides_before_everything() -> None:
    """Also about layers which the architecture would leave out; what the call gives is a note."""
    unet = sd_unet()
    tensors = codec.encode(networks.lora.create_network(1.0, 3, 1, None, None, unet, preset="full").adapted_layers)
    calls = {"network_reg_dims": ".*=7", "only_patterns": "conv_in|.*to_q", "block_dims": BLOCKS, "conv_dim": "2"}
    network, _ = networks.lora.create_network_from_weights(1.0, "", None, None, unet, weights_sd=tensors, **calls)
    rows = {row.dotted_name: row for row in network.plan.rows}
    assert rows["conv_in"].dim == rows[ATTENTION].dim == 3
    assert rows[KERNEL].reason == "not in only_patterns" and rows[KERNEL].unwanted
    (note,) = [note for note in network.plan.notes if "the file decides" in note]
    assert note.startswith("block_dims, conv_dim, network_reg_dims: not used")


def test_a_file_decides_about_what_is_left_out_by_default() -> None:
    """Qwen-Image's modulations are trained on request alone; a file that has them needs no word, and a word counts."""
    denoiser, name = toy("qwen_image")[SPECS["qwen_image"].denoiser.name], "transformer_blocks.0.img_mod.1"
    trained = networks.lora.create_network(1.0, 3, 1, None, None, denoiser, exclude_mod="False")
    tensors = codec.encode(trained.adapted_layers)
    for arguments, wanted in (({}, True), ({"exclude_mod": "False"}, True), ({"exclude_mod": "True"}, False)):
        network, _ = networks.lora.create_network_from_weights(
            1.0, "", None, None, denoiser, weights_sd=tensors, **arguments
        )
        (row,) = [row for row in network.plan.rows if row.dotted_name == name]
        assert row.trained is wanted and row.unwanted is not wanted, arguments


def test_names_that_why_takes() -> None:
    plan = planned("sd")
    (row,) = [row for row in plan.rows if row.dotted_name == ATTENTION]
    (one,) = plan.why(ATTENTION)
    assert one.row is row and plan.why(row.saved_name)[0].row is row
    assert {why.row.dotted_name for why in plan.why("attn1.to_q")} == {
        row.dotted_name for row in plan.rows if "attn1.to_q" in row.dotted_name
    }
    assert {why.row.dotted_name for why in plan.why(r"^conv_(in|out)$")} == {"conv_in", "conv_out"}
    with pytest.raises(ValueError, match=r"no layer .*'attn1\.to_\(' in its name"):  # no expression: taken literally
        plan.why("attn1.to_(")
    with pytest.raises(ValueError, match="did you mean .*attn1.to_q"):
        plan.why(ATTENTION.replace("attn1", "atn1"))
    text = str(one)
    assert "trained: lora, dim 4, alpha 2, scale 0.5" in text and "dim: 4 by network_dim" in text
    with pytest.raises(ValueError, match="no layer"):
        plan.only_trained().why("conv_in")


def test_a_plan_that_explains_keeps_no_model() -> None:
    unet = sd_unet()
    alive = weakref.ref(unet)
    plan = networks.lora.plan(4, 1, None, unet)
    del unet
    gc.collect()
    assert alive() is None and plan.why("conv_in")


def test_the_plan_of_a_network_keeps_no_rules() -> None:
    network = networks.lora.create_network(1.0, 4, 1, None, None, sd_unet())
    with pytest.raises(ValueError, match=r"ask the one of networks.X.plan"):
        network.plan.why("conv_in")
    assert network.plan == networks.lora.plan(4, 1, None, sd_unet())


def test_the_page_has_them_all() -> None:
    text = (Path(__file__).parents[1] / "docs" / "plan.md").read_text(encoding="utf-8")
    assert all(f"| {rule.name} | {rule.sentence} |" in text for rule in RULES)
