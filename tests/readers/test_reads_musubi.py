"""The models of musubi-tuner: against lists recorded from runs of it, and against itself where MUSUBI_PATH is the
folder that holds its package (with MUSUBI_PYTHON, if that is another Python than this one)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import test_any_model
import torch
from common import Made
from outside import Case, assert_equal, by_hand, file_of, own_places, run
from registry_archs import SPECS, data_of
from safetensors.torch import load_file

from networks import api
from networks.files.readers.musubi import READERS
from networks.files.readers.trainers import Trainer

BY_NAME: dict[str, Trainer] = {reader.name: reader for reader in READERS}

if os.environ.get("MUSUBI_PATH"):
    NETWORKS = Path(os.environ["MUSUBI_PATH"]) / "musubi_tuner" / "networks"
    # Module, and what stands in it since it is as the model has it: September 2026.
    LATER = {
        "qwen_image_21": ("lora_qwen_image_21", ""),
        "minimax_h3": ("lora_minimax_h3", "convert_lora_state_dict"),  # before, it found layers of the blocks alone
    }

    def is_there(arch: str) -> bool:
        """Whether this version has an architecture."""
        name, text = LATER.get(arch, ("lora", ""))
        file = NETWORKS / f"{name}.py"
        return file.is_file() and text in file.read_text(encoding="utf-8")

    WAYS = {
        arch: {"musubi": "modules", "musubi_generate": _way}
        for reader in READERS
        for arch, route in reader.routes.items()
        if is_there(arch)
        for _way in ["strict" if route.strict else "loading" if route.one_form else "modules"]
    }
    WIDE = ("lora", "dora", "lokr")
    ALL = ("dora input", "lokr whole", "lokr dora", "loha", "glora", "dylora", "full", "diag-oft", "oft input", "ia3")
    CASES = [
        (arch, kind, reader)
        for arch, ways in WAYS.items()
        for reader, way in ways.items()
        for kind in (*WIDE, *(ALL if arch in ("flux", "flux_2") else ()))
        if reader == "musubi" or way != "modules"
    ]

    @pytest.fixture(scope="module")
    def real(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str, str], tuple[Case, Made]]:
        folder, files, cases = tmp_path_factory.mktemp("musubi"), {}, {}
        for arch, kind, reader in CASES:
            wide = data_of(arch).widest if kind == "lora" and arch != "hidream_o1" else {}
            if (arch, kind) not in files:
                files[arch, kind] = file_of(arch, kind, folder, encoders=False, **wide)
            place = own_places(arch, encoders=False)
            cases[arch, kind, reader] = Case(arch, kind, WAYS[arch][reader], files[arch, kind], place)
        made = run("musubi_program.py", "MUSUBI_PATH", cases.values(), folder)
        return dict(zip(cases, zip(cases.values(), made, strict=True), strict=True))

    @pytest.mark.parametrize(("arch", "kind", "reader"), CASES)
    def test_the_program_itself(
        arch: str, kind: str, reader: str, real: Mapping[tuple[str, str, str], tuple[Case, Made]]
    ) -> None:
        case, made = real[arch, kind, reader]
        reading = BY_NAME[reader].read(case.trained.given)
        assert reading is not None
        assert_equal(reading, made, case.trained.given)

    def test_a_model_without_record_in_its_generic_loader(tmp_path: Path) -> None:
        """Its networks.lora adapts every Linear of the file, whatever the model is."""
        place = Path(os.environ["MUSUBI_PATH"]) / "musubi_tuner" / "networks" / "lora.py"
        spec = importlib.util.spec_from_file_location("musubi_lora", place)
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(theirs := importlib.util.module_from_spec(spec))
        model, x = test_any_model.model(), test_any_model.signal()
        network = test_any_model.moved(api.apply(model, dim=4, alpha=2))
        network.save(tmp_path / "a.safetensors")
        wanted = model(x).detach()
        network.detach()
        tensors = load_file(tmp_path / "a.safetensors")
        read = theirs.create_network_from_weights(None, 1.0, tensors, unet=model, for_inference=True)
        read.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
        assert not any(read.load_state_dict(tensors, strict=False))
        torch.testing.assert_close(model(x), wanted)


# A layer of each architecture, and what the two ways made of LoRA and of LoKr with a whole first factor: + exact, -
# left out, or the program's words.
RECORDED = """
hunyuan_video double_blocks.0.img_attn_qkv + + - -
hunyuan_video single_blocks.0.linear1 + + - -
hv_1_5 double_blocks.0.img_attn_q + + - +
framepack transformer_blocks.0.attn.to_q + + - +
wan blocks.0.self_attn.q + + - +
wan blocks.0.cross_attn.k_img + + - +
flux double_blocks.0.img_attn.qkv + + - -
flux img_in - - - -
flux_2 single_blocks.0.linear2 + + - +
qwen_image transformer_blocks.0.attn.to_q + + - +
qwen_image_21 transformer_blocks.0.img_mlp.gate_layer + + - +
minimax_h3 blocks.0.attn.qkv_proj + + - -
minimax_h3 token_refiner.blocks.0.mlp.fc1 + + - -
zimage layers.0.attention.to_q + + - +
kandinsky visual_transformer_blocks.0.self_attention.to_query + + - -
krea2 first + + - +
krea2 blocks.0.attn.wq + + - +
ideogram4 layers.0.attention.qkv + + - No_LoRA_modules_found
hidream_o1 model.language_model.layers.0.self_attn.q_proj + + - -
"""


@pytest.mark.parametrize("line", [line.split() for line in filter(None, RECORDED.splitlines())], ids=" ".join)
def test_layers(line: list[str]) -> None:
    arch, path, *verdicts = line
    name = f"lora_unet_{path}".replace(".", "_")
    for kind in ("lora", "lokr"):
        for reader, trainer in BY_NAME.items():
            wanted = verdicts.pop(0).replace("_", " ")
            reading = trainer.read(by_hand(arch, kind, {name: ("dit", path, (8, 8))}))
            assert reading is not None
            assert (reading.refused or "-+"[reading.fates[name].loaded]) == wanted, (kind, reader)
            assert reading.fates[name].reason == "" or wanted != "+"


# Kind -> what its modules, and its merge while a model loads, made of it: ~ = changed otherwise.
KINDS_READ = {
    "lora": "+ +", "dora": "~ ~", "dora input": "~ ~", "lokr": "- +", "lokr whole": "- +", "lokr both": "- -",
    "lokr dora": "- ~", "loha": "- +", "glora": "- -", "full": "- -", "diag-oft": "- -", "ia3": "- -",
    "lora without alpha": "KeyError +",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS_READ)
def test_kinds(kind: str) -> None:
    name, path = "lora_unet_double_blocks_0_img_attn_proj", "double_blocks.0.img_attn.proj"
    for reader, wanted in zip(("musubi", "musubi_generate"), KINDS_READ[kind].split(), strict=True):
        reading = BY_NAME[reader].read(by_hand("flux_2", kind, {name: ("dit", path, (8, 8))}))
        assert reading is not None
        fate = reading.fates[name]
        assert (reading.refused or ("-" if not fate.loaded else "~" if fate.reason else "+")) == wanted
        assert fate.errors == {"+": (0.0, 0.0), "~": (None, None)}.get(wanted, fate.errors)


def test_only_its_own_names() -> None:
    """Names with dots are those of its converter's other side."""
    name, path = "diffusion_model.double_blocks.0.img_attn.proj", "double_blocks.0.img_attn.proj"
    for reader in READERS:
        reading = reader.read(by_hand("flux_2", "lora", {name: ("dit", path, (8, 8))}))
        assert reading is not None and reading.loaded == 0 and not reading.refused


def test_the_first_key_decides_for_the_whole_file() -> None:
    first, second = "lora_unet_blocks_0_self_attn_k", "lora_unet_blocks_0_self_attn_q"
    layers = {name: ("dit", f"blocks.0.self_attn.{name[-1]}", (8, 8)) for name in (first, second)}
    one, two = (by_hand("wan", kind, layers) for kind in ("lora", "lokr"))
    tensors = {
        key: t for given, name in ((one, first), (two, second)) for key, t in given.tensors.items() if name in key
    }
    given = replace(one, tensors=tensors, meant={first: one.meant[first], second: two.meant[second]})
    reading = BY_NAME["musubi_generate"].read(given)
    assert reading is not None and reading.fates[first].loaded and not reading.fates[second].loaded


def test_architectures_which_it_has_not() -> None:
    for arch in ("sd", "sdxl", "sd3", "lumina", "anima", "chroma", "hunyuan_image", "ace_step"):
        part = SPECS[arch].denoiser.name
        assert all(
            reader.read(by_hand(arch, "lora", {"lora_unet_a": (part, "a", (8, 8))})) is None for reader in READERS
        )
