"""The model of InvokeAI: against lists recorded from runs of it, and against itself where INVOKEAI_PATH is its folder
(with INVOKEAI_PYTHON, if that is another Python than this one)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from common import KINDS, Made
from outside import Case, assert_equal, by_hand, diffusers_places, file_of, meant, renamed, run

from networks.files.readers import Reading
from networks.files.readers.invokeai import BASES, READERS, File
from networks.files.readers.trainers import suffixes_of

ARCHS = tuple(arch for arch, base in BASES.items() if base.names)
(INVOKEAI,) = READERS

if os.environ.get("INVOKEAI_PATH"):
    WIDE = ("lora", "dora", "dora input", "lokr", "lokr dora", "loha", "ia3")
    ALL = tuple(kind for kind in KINDS if kind not in ("norms", "rs-lora"))
    # Kinds under other names: what stands before them, and whether the factors are called lora_A and lora_B.
    DOTTED = ("lora", "lora A", "dora", "lokr", "loha", "full")
    FORMS = {
        "flux": ("diffusion_model.",),
        "flux_2": ("diffusion_model.",),
        "zimage": ("diffusion_model.", "lora_unet__"),
        "qwen_image": ("transformer.",),
        "wan": ("diffusion_model.",),
        "krea2": ("diffusion_model.",),
        "anima": ("diffusion_model.",),
    }
    CASES = [(arch, kind, "") for arch in ARCHS for kind in (ALL if arch in ("flux", "sd") else WIDE)]
    CASES += [(arch, kind, form) for arch, forms in FORMS.items() for form in forms for kind in DOTTED]

    @pytest.fixture(scope="module")
    def real(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str, str], tuple[Case, Made]]:
        folder = tmp_path_factory.mktemp("invokeai")
        cases = {}
        for arch, kind, form in CASES:
            root = "model." if arch == "anima" else ""
            where = diffusers_places(arch, frozenset({"flux", "anima"}), root, encoders=not form)
            file = file_of(arch, kind.removesuffix(" A"), folder, encoders=not form)
            if form:
                file = renamed(file, form, folder, kind.endswith(" A"))
            cases[arch, kind, form] = Case(arch, kind, "apply", file, where)
        made = run("invokeai_program.py", "INVOKEAI_PATH", cases.values(), folder)
        return dict(zip(cases, zip(cases.values(), made, strict=True), strict=True))

    @pytest.mark.parametrize(("arch", "kind", "form"), CASES)
    def test_the_program_itself(
        arch: str, kind: str, form: str, real: Mapping[tuple[str, str, str], tuple[Case, Made]]
    ) -> None:
        case, made = real[arch, kind, form]
        given = case.trained.given
        assert_equal(INVOKEAI.applied(File(given, suffixes_of(given)), BASES[arch]), made, given)


# Architecture, part, trainer's name (and shape of its weight, where that counts); names in files: + where InvokeAI
# found the layer, - where it left it out.
FOUND = """
sd unet down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q
    + lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q
sd unet up_blocks.1.resnets.0.conv1
    + lora_unet_up_blocks_1_resnets_0_conv1
    - lora_unet_output_blocks_3_0_in_layers_2
sd text_encoder text_model.encoder.layers.0.mlp.fc1
    + lora_te_text_model_encoder_layers_0_mlp_fc1
    - lora_te1_text_model_encoder_layers_0_mlp_fc1
sdxl unet input_blocks.4.1.transformer_blocks.0.attn1.to_q
    + lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q
    + lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q
sdxl text_encoder2 text_model.encoder.layers.0.self_attn.q_proj
    + lora_te2_text_model_encoder_layers_0_self_attn_q_proj
flux dit double_blocks.0.img_attn.qkv 24x8
    + lora_unet_double_blocks_0_img_attn_qkv
    + diffusion_model.double_blocks.0.img_attn.qkv
flux dit single_blocks.0.linear1 56x8
    + lora_unet_single_blocks_0_linear1
    + diffusion_model.single_blocks.0.linear1
flux text_encoder1 text_model.encoder.layers.0.mlp.fc2
    + lora_te1_text_model_encoder_layers_0_mlp_fc2
flux_2 dit double_blocks.0.img_attn.qkv 24x8
    + lora_unet_double_blocks_0_img_attn_qkv
    + diffusion_model.double_blocks.0.img_attn.qkv
flux_2 dit single_blocks.0.linear2
    + lora_unet_single_blocks_0_linear2
    + diffusion_model.single_blocks.0.linear2
zimage dit layers.0.attention.to_q
    - lora_unet_layers_0_attention_to_q
    + lora_unet__layers_0_attention_to_q
    + diffusion_model.layers.0.attention.to_q
    + transformer.layers.0.attention.to_q
zimage dit layers.0.attention.to_out.0
    - lora_unet__layers_0_attention_to_out_0
    + diffusion_model.layers.0.attention.to_out.0
zimage dit layers.0.feed_forward.w1
    + lora_unet__layers_0_feed_forward_w1
qwen_image dit transformer_blocks.0.attn.to_q
    + lora_unet_transformer_blocks_0_attn_to_q
    + transformer.transformer_blocks.0.attn.to_q
    - diffusion_model.transformer_blocks.0.attn.to_q
qwen_image dit transformer_blocks.0.img_mlp.net.0.proj
    + lora_unet_transformer_blocks_0_img_mlp_net_0_proj
wan dit blocks.0.self_attn.q
    + lora_unet_blocks_0_self_attn_q
    + lora_unet_blocks_0_attn1_to_q
    + diffusion_model.blocks.0.self_attn.q
wan dit blocks.0.cross_attn.k_img
    - lora_unet_blocks_0_cross_attn_k_img
    - diffusion_model.blocks.0.cross_attn.k_img
wan dit blocks.0.ffn.0
    + lora_unet_blocks_0_ffn_0
krea2 dit blocks.0.attn.wq
    + lora_unet_blocks_0_attn_wq
    + diffusion_model.blocks.0.attn.wq
krea2 dit txtfusion.layerwise_blocks.0.mlp.gate
    + lora_unet_txtfusion_layerwise_blocks_0_mlp_gate
krea2 dit tmlp.0
    + lora_unet_tmlp_0
anima dit blocks.0.self_attn.q_proj
    + lora_unet_blocks_0_self_attn_q_proj
    + diffusion_model.blocks.0.self_attn.q_proj
anima dit blocks.0.mlp.layer1
    + lora_unet_blocks_0_mlp_layer1
anima dit llm_adapter.blocks.0.mlp.0
    - lora_unet_llm_adapter_blocks_0_mlp_0
anima dit x_embedder.proj.1
    - lora_unet_x_embedder_proj_1
anima text_encoder layers.0.self_attn.q_proj
    + lora_te_layers_0_self_attn_q_proj
"""


def _lines() -> list[tuple[str, str, str, tuple[int, ...], str, bool]]:
    found, layer = [], tuple[str, str, str, tuple[int, ...]]()
    for line in filter(None, FOUND.splitlines()):
        words = line.split()
        if line.startswith(" "):
            found.append((*layer, words[1], words[0] == "+"))
        else:
            arch, part, path, *shape = words
            sizes = tuple(map(int, shape[0].split("x"))) if shape else (8, 8)
            layer = arch, part, path, (*sizes, 3, 3) if "resnets" in path else sizes
    return found  # type: ignore[return-value]


def read(arch: str, kind: str, layers: Mapping[str, tuple[str, str, tuple[int, ...]]]) -> Reading:
    given = by_hand(arch, kind, layers)
    return INVOKEAI.applied(File(given, suffixes_of(given)), BASES[arch])


@pytest.mark.parametrize(("arch", "part", "path", "shape", "name", "found"), _lines())
def test_layers_are_found(arch: str, part: str, path: str, shape: tuple[int, ...], name: str, found: bool) -> None:
    reading = read(arch, "lora" if "." not in name else "peft", {name: (part, path, shape)})
    assert not reading.refused
    assert reading.fates[name].loaded is found
    assert bool(reading.fates[name].reason) is not found


# Kind -> what became of a Linear layer under sd-scripts' names: "" = exact, + = changed otherwise, or its words.
KINDS_READ = {
    "lora": "", "lora without alpha": "", "dora input": "", "lokr": "", "lokr whole": "", "lokr both": "", "loha": "",
    "full": "", "ia3": "", "dora": "+", "lokr dora": "KeyError: 'lora_up.weight'", "glora": "Unsupported lora format",
    "diag-oft": "Unsupported lora format",
}  # fmt: skip
# Where another base model differs; - = the layer is left out.
ELSEWHERE = {
    ("anima", "lokr dora"): "+", ("krea2", "lokr"): "-", ("krea2", "lokr whole"): "-", ("krea2", "loha"): "-",
    ("krea2", "full"): "-", ("krea2", "lokr both"): "-", ("krea2", "ia3"): "-",
}  # fmt: skip
LAYERS = {
    "sd": ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"),
    "sdxl": ("unet", "middle_block.1.transformer_blocks.0.attn1.to_q"),
    "flux": ("dit", "double_blocks.0.img_attn.proj"),
    "flux_2": ("dit", "double_blocks.0.img_attn.proj"),
    "qwen_image": ("dit", "transformer_blocks.0.attn.to_q"),
    "wan": ("dit", "blocks.0.self_attn.q"),
    "krea2": ("dit", "blocks.0.attn.wq"),
    "anima": ("dit", "blocks.0.self_attn.q_proj"),
}


@pytest.mark.parametrize("kind", KINDS_READ)
@pytest.mark.parametrize("arch", LAYERS)
def test_kinds(arch: str, kind: str) -> None:
    part, path = LAYERS[arch]
    name = f"lora_unet_{path}".replace(".", "_")
    reading, wanted = read(arch, kind, {name: (part, path, (8, 8))}), ELSEWHERE.get((arch, kind), KINDS_READ[kind])
    if wanted in ("", "+", "-"):
        fate = reading.fates[name]
        assert not reading.refused and fate.loaded is (wanted != "-") and bool(fate.reason) is bool(wanted)
        assert fate.errors == {"": (0.0, 0.0), "+": (None, None), "-": (1.0, 1.0)}[wanted]
    else:
        assert reading.refused.startswith(wanted)


# Names with dots: layer, its name, kind, and what became of it; ~ = changed otherwise.
WITH_DOTS = """
flux double_blocks.0.img_attn.qkv diffusion_model. peft +
flux double_blocks.0.img_attn.qkv diffusion_model. lora Unsupported lora format
flux double_blocks.0.img_attn.qkv diffusion_model. lokr +
flux double_blocks.0.img_attn.qkv diffusion_model. loha +
flux double_blocks.0.img_attn.qkv diffusion_model. full Unsupported lora format
flux_2 double_blocks.0.img_attn.qkv diffusion_model. peft +
flux_2 double_blocks.0.img_attn.qkv diffusion_model. lokr +
flux_2 double_blocks.0.img_attn.qkv diffusion_model. loha -
zimage layers.0.attention.to_q diffusion_model. lora +
zimage layers.0.attention.to_q diffusion_model. dora_input +
zimage layers.0.attention.to_q diffusion_model. peft_with_alpha ~
zimage layers.0.attention.to_q diffusion_model. lokr Unsupported lora format
zimage layers.0.attention.to_q lora_unet__ lora +
zimage layers.0.attention.to_q lora_unet__ lokr Unsupported lora format
qwen_image transformer_blocks.0.attn.to_q transformer. lora +
qwen_image transformer_blocks.0.attn.to_q transformer. lokr Unsupported lora format
wan blocks.0.self_attn.q diffusion_model. lora +
wan blocks.0.self_attn.q diffusion_model. peft_with_alpha +
wan blocks.0.self_attn.q diffusion_model. lokr Unsupported lora format
krea2 blocks.0.attn.wq diffusion_model. lora +
krea2 blocks.0.attn.wq diffusion_model. peft_with_alpha +
anima blocks.0.self_attn.q_proj diffusion_model. lora +
anima blocks.0.self_attn.q_proj diffusion_model. peft_with_alpha ~
anima blocks.0.self_attn.q_proj diffusion_model. lokr +
anima blocks.0.self_attn.q_proj diffusion_model. loha Unsupported lora format
"""


@pytest.mark.parametrize("line", [line.split(" ", 4) for line in filter(None, WITH_DOTS.splitlines())], ids=" ".join)
def test_names_with_dots(line: list[str]) -> None:
    arch, path, form, kind, wanted = line
    name = form + (path if form.endswith(".") else path.replace(".", "_"))
    shape = (24, 8) if path.endswith("qkv") else (8, 8)
    reading = read(arch, kind.replace("_", " "), {name: ("dit", path, shape)})
    fate = reading.fates[name]
    assert (reading.refused or ("-" if not fate.loaded else "~" if fate.reason else "+")) == wanted
    assert wanted != "~" or fate.errors == (1.0, 1.0)  # alpha 1 of rank 2 is taken for 2


# Of full size: name, shape of the weight, kind, and the base model for which InvokeAI took the file ("" = for none).
TAKEN = """
lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k 320x768 lora sd
lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k 320x1024 lora sd
lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k 320x768 lokr_whole sd
lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k 320x768 lokr -
lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k 320x768 diag-oft -
lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k 320x320 lora -
lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k 640x2048 lora sdxl
lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k 640x640 lora -
lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_k 1280x1280 lokr sdxl
lora_unet_double_blocks_0_img_attn_proj 3072x3072 lora flux
lora_unet_double_blocks_0_img_attn_proj 3072x3072 diag-oft flux
lora_unet_double_blocks_0_img_attn_proj 6144x6144 lora flux_2
lora_unet_double_blocks_0_img_attn_proj 6144x6144 lokr_whole flux_2
lora_unet_double_blocks_0_img_attn_proj 6144x6144 lokr flux
lora_unet_double_blocks_0_img_attn_proj 6144x6144 loha flux
lora_unet_img_in 3072x64 lora -
lora_te3_encoder_block_0_layer_0_SelfAttention_q 4096x4096 lora -
lora_unet_layers_0_attention_to_q 3840x3840 lora -
lora_unet__layers_0_attention_to_q 3840x3840 lora zimage
lora_unet_layers_0_self_attention_to_q 4096x4096 lora -
diffusion_model.layers.0.self_attention.to_q 4096x4096 lora zimage
lora_unet_transformer_blocks_0_attn_to_q 3072x3072 lora qwen_image
lora_unet_transformer_blocks_0_attn_to_q 3072x3072 lokr qwen_image
lora_unet_transformer_blocks_0_attn_to_q 3072x3072 loha -
lora_unet_transformer_blocks_0_attn_img_qkv 4608x1536 lora qwen_image
lora_unet_blocks_0_self_attn_q 5120x5120 lora wan
lora_unet_blocks_0_self_attn_q 5120x5120 full -
lora_unet_blocks_0_attn_wq 6144x6144 lora -
lora_unet_txtfusion_refiner_blocks_0_attn_wq 2560x2560 lora krea2
lora_unet_txtfusion_refiner_blocks_0_attn_wq 2560x2560 lokr -
lora_unet_blocks_0_self_attn_q_proj 2048x2048 lora anima
lora_unet_blocks_0_self_attn_q_proj 2048x2048 loha -
lora_unet_joint_blocks_0_x_block_attn_qkv 4608x1536 lora -
"""


@pytest.mark.parametrize("line", [line.split() for line in filter(None, TAKEN.splitlines())], ids=" ".join)
def test_what_a_file_is_taken_for(line: list[str]) -> None:
    name, shape, kind, base = line
    out, features = map(int, shape.split("x"))
    given = by_hand("flux", kind.replace("_", " "), {name: ("dit", "a", (out, features))})
    file = File(given, suffixes_of(given))
    taken = [arch for arch, one in BASES.items() if one.is_one(file)]
    assert taken == ([] if base == "-" else [base])
    reading = INVOKEAI.read(given)
    assert reading is not None
    if base != "flux":
        assert reading.refused.startswith("it does not recognise" if base == "-" else "it takes the file for one of")


def test_magnitudes_of_rows_are_taken_for_those_of_columns() -> None:
    """W' = m (W + dW) / ||columns||, by hand."""
    torch.manual_seed(0)
    name = "lora_unet_double_blocks_0_img_attn_proj"
    given, weight = by_hand("flux", "dora", {name: ("dit", "double_blocks.0.img_attn.proj", (6, 4))}), torch.randn(6, 4)
    tensors = {key: torch.randn(tensor.shape) if tensor.dim() else tensor for key, tensor in given.tensors.items()}
    given = replace(given, tensors=tensors, meant=meant(tensors), base={name: weight}.__getitem__)
    whole = weight + tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"] / 2
    m = tensors[f"{name}.dora_scale"]
    wanted, got = m * whole / whole.norm(dim=1, keepdim=True), m * whole / whole.norm(dim=0, keepdim=True)
    error = float((got - wanted).norm() / (wanted - weight).norm())
    fate = INVOKEAI.applied(File(given, suffixes_of(given)), BASES["flux"]).fates[name]
    assert fate.loaded and fate.errors == (pytest.approx(error, rel=1e-4), pytest.approx(error, rel=1e-4))
