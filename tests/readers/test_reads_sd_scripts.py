"""The models of sd-scripts: against lists recorded from runs of it, and against itself where SD_SCRIPTS_PATH is its
folder, of a version with networks/lokr.py (with SD_SCRIPTS_PYTHON, if that is another Python than this one)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from common import Made
from outside import Case, assert_equal, by_hand, file_of, meant, own_places, run
from registry_archs import SPECS, data_of

from networks.files.readers.sd_scripts import READERS
from networks.files.readers.trainers import Trainer

BY_NAME: dict[str, Trainer] = {reader.name: reader for reader in READERS}

if os.environ.get("SD_SCRIPTS_PATH"):
    WIDE = ("lora", "dora", "lokr")
    ALL = ("dora input", "lokr whole", "lokr dora", "loha", "glora", "dylora", "full", "diag-oft", "oft input", "ia3")
    CASES = [
        (arch, kind, reader)
        for reader, trainer in BY_NAME.items()
        for arch, route in trainer.routes.items()
        for kind in (*WIDE, *(ALL if arch in ("flux", "anima") else ("loha", "lora tucker") if arch == "sdxl" else ()))
    ]

    def _way(reader: str, arch: str, kind: str) -> str:
        route = BY_NAME[reader].routes[arch]
        if reader == "sd_scripts_lokr":
            return "loha" if kind == "loha" else "lokr"
        return "strict" if route.strict else "loading" if route.one_form else "modules"

    @pytest.fixture(scope="module")
    def real(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str, str], tuple[Case, Made]]:
        folder, files, cases = tmp_path_factory.mktemp("sd_scripts"), {}, {}
        for arch, kind, reader in CASES:
            tucker = {"use_tucker": "True", "conv_dim": "2"} if kind == "lora tucker" else {}
            # Its own text encoders alone go to a network of few layers, and to one of all.
            more = tucker or (data_of(arch).widest if kind == "lora" else {})
            if (arch, kind) not in files:
                files[arch, kind] = file_of(arch, "lora" if tucker else kind, folder, **more)
            cases[arch, kind, reader] = Case(
                arch, kind, _way(reader, arch, kind), files[arch, kind], own_places(arch, True)
            )
        made = run("sd_scripts_program.py", "SD_SCRIPTS_PATH", cases.values(), folder)
        return dict(zip(cases, zip(cases.values(), made, strict=True), strict=True))

    @pytest.mark.parametrize(("arch", "kind", "reader"), CASES)
    def test_the_program_itself(
        arch: str, kind: str, reader: str, real: Mapping[tuple[str, str, str], tuple[Case, Made]]
    ) -> None:
        case, made = real[arch, kind, reader]
        reading = BY_NAME[reader].read(case.trained.given)
        assert reading is not None
        assert_equal(reading, made, case.trained.given)


# A layer of each architecture, and what its modules, its inference scripts and the modules of LoHa and LoKr made of
# LoRA and of LoKr: + exact, - left out, . no such way, ! refused.
RECORDED = """
sd unet down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q + + . - - .
sd unet down_blocks.0.resnets.0.conv1 + + . - - .
sd text_encoder text_model.encoder.layers.0.mlp.fc1 + + . - - .
sdxl unet input_blocks.4.1.transformer_blocks.0.attn1.to_q + + - - - +
sdxl text_encoder2 text_model.encoder.layers.0.mlp.fc1 + + - - - +
flux dit double_blocks.0.img_attn.qkv + + . - ! .
flux dit img_in + + . - ! .
flux text_encoder1 text_model.encoder.layers.0.mlp.fc1 + + . - ! .
flux text_encoder3 encoder.block.0.layer.0.SelfAttention.q + + . - ! .
chroma dit single_blocks.0.linear1 + + . - ! .
sd3 dit joint_blocks.0.x_block.attn.qkv + + . - ! .
sd3 dit x_embedder.proj + + . - ! .
lumina dit layers.0.attention.qkv + + . - ! .
lumina text_encoder layers.0.self_attn.q_proj + + . - ! .
hunyuan_image dit double_blocks.0.img_attn_qkv + + . - + .
anima dit blocks.0.self_attn.q_proj + + - - + +
anima dit llm_adapter.blocks.0.mlp.0 + + - - + +
anima text_encoder layers.0.self_attn.q_proj + + - - + +
"""


@pytest.mark.parametrize("line", [line.split() for line in filter(None, RECORDED.splitlines())], ids=" ".join)
def test_layers(line: list[str]) -> None:
    arch, part, path, *verdicts = line
    prefix = next(one.prefix for one in SPECS[arch].parts if one.name == part)
    name = f"{prefix}_{path}".replace(".", "_")
    for kind in ("lora", "lokr"):
        for reader in ("sd_scripts", "sd_scripts_inference", "sd_scripts_lokr"):
            # Wide enough that the second factor of LoKr is no whole one by the default factor.
            reading = BY_NAME[reader].read(by_hand(arch, kind, {name: (part, path, (144, 144))}))
            found = "." if reading is None else "!" if reading.refused else "-+"[reading.fates[name].loaded]
            assert found == verdicts.pop(0), (kind, reader)
            assert reading is None or found != "+" or reading.exact


# Kind -> what the three made of a layer of Anima: ~ = changed otherwise.
KINDS_READ = {
    "lora": "+ + -", "dora": "~ ~ -", "dora input": "~ ~ -", "lokr": "- + +", "lokr whole": "- + +",
    "lokr both": "- - -", "lokr dora": "- ~ ~", "loha": "- + +", "glora": "- - -", "full": "- - -",
    "diag-oft": "- - -", "ia3": "- - -",
    "lora without alpha": "KeyError + -",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS_READ)
def test_kinds(kind: str) -> None:
    name, path = "lora_unet_blocks_0_self_attn_q_proj", "blocks.0.self_attn.q_proj"
    readers = ("sd_scripts", "sd_scripts_inference", "sd_scripts_lokr")
    for reader, wanted in zip(readers, KINDS_READ[kind].split(), strict=True):
        reading = BY_NAME[reader].read(by_hand("anima", kind, {name: ("dit", path, (144, 144))}))
        assert reading is not None
        fate = reading.fates[name]
        assert (reading.refused or ("-" if not fate.loaded else "~" if fate.reason else "+")) == wanted
        assert fate.errors == {"+": (0.0, 0.0), "~": (None, None)}.get(wanted, fate.errors)


def test_lokr_by_a_factor_which_is_not_given() -> None:
    """Rank 2 of 8 = 2 * 4: by the default factor the second factor, 4 wide, is a whole one there; alpha 1 of rank 2 is
    then 1, not a half."""
    name, path = "lora_unet_blocks_0_self_attn_q_proj", "blocks.0.self_attn.q_proj"
    reading = BY_NAME["sd_scripts_lokr"].read(by_hand("anima", "lokr", {name: ("dit", path, (8, 8))}))
    assert reading is not None and reading.fates[name].errors == (1.0, 1.0)
    assert any("factor=N" in note for note in reading.notes)


def test_only_its_own_names() -> None:
    name, path = "diffusion_model.double_blocks.0.img_attn.proj", "double_blocks.0.img_attn.proj"
    reading = BY_NAME["sd_scripts"].read(by_hand("flux", "lora", {name: ("dit", path, (8, 8))}))
    assert reading is not None and reading.loaded == 0 and not reading.refused


def test_magnitudes_are_left_out() -> None:
    """dW without m, by hand."""
    torch.manual_seed(0)
    name, weight = "lora_unet_double_blocks_0_img_attn_proj", torch.randn(6, 4)
    given = by_hand("flux", "dora", {name: ("dit", "double_blocks.0.img_attn.proj", (6, 4))})
    tensors = {key: torch.randn(tensor.shape) if tensor.dim() else tensor for key, tensor in given.tensors.items()}
    given = replace(given, tensors=tensors, meant=meant(tensors), base={name: weight}.__getitem__)
    change = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"] / 2
    whole = weight + change
    wanted = tensors[f"{name}.dora_scale"] * whole / whole.norm(dim=1, keepdim=True) - weight
    error = pytest.approx(float((change - wanted).norm() / wanted.norm()), rel=1e-4)
    reading = BY_NAME["sd_scripts"].read(given)
    assert reading is not None and reading.fates[name].errors == (error, error)
