"""diffusers' own loaders read our files: which layers, how strong, or refused in which words, equals their model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from common import KINDS, WIDE, Trained, assert_model, given_of, renamed, trained
from diffusers_program import PIPELINES, load, load_into, models
from registry_archs import SPECS, data_of
from safetensors.torch import save_file

from networks.files.readers import READERS
from networks.files.readers.contract import Reading
from networks.files.readers.diffusers import ALONE
from networks.files.readers.diffusers import PIPELINES as MODELLED

READER = next(reader for reader in READERS if reader.name == "diffusers")
OTHERS = [kind for kind in KINDS if kind not in WIDE]
# One architecture for each kind of converter: by the whole file, by block, with words of its own, none. A usual run
# has all kinds of files on the first.
SOME = ("zimage", "ace_step", "flux", "flux_2", "qwen_image", "wan", "sd", "hunyuan_video", "krea2")
# What stands before the trainer's dotted names, and whether the factors have PEFT's names.
ROOTS = (("diffusion_model.", False), ("diffusion_model.", True), ("base_model.model.", True))


def read(arch: str, file: Path, **arguments: str) -> tuple[Trained, Reading]:
    """A file that the program and its model read alike."""
    with_names_of_its_own = arguments.get("save_format") == "diffusers"
    parts = models(arch, not with_names_of_its_own)
    made = trained(arch, parts, file, **arguments)
    assert_model(READER, made, load(arch, parts, made))
    reading = READER.read(made.given)
    assert reading is not None
    return made, reading


def test_it_has_all_architectures_of_which_it_has_a_class() -> None:
    assert set(PIPELINES) == set(MODELLED) == {arch for arch in SPECS if SPECS[arch].denoiser.diffusers}


@pytest.mark.sweep
@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("arch", PIPELINES)
def test_files_of_every_architecture(arch: str, kind: str, tmp_path: Path) -> None:
    read(arch, tmp_path / "a.safetensors", **KINDS[kind])


@pytest.mark.sweep(4)  # the folders of PEFT have these names on all architectures
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("arch", PIPELINES)
def test_files_under_its_own_names(arch: str, kind: str, tmp_path: Path) -> None:
    made, reading = read(arch, tmp_path / "a.safetensors", save_format="diffusers", **KINDS[kind])
    if not MODELLED[arch].missing:
        assert reading.loaded == len(made.targets)
        assert reading.exact is (kind == "lora") and reading.errors[0] == 0


@pytest.mark.sweep
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("arch", SOME)
def test_files_of_every_kind(arch: str, kind: str, tmp_path: Path) -> None:
    read(arch, tmp_path / "a.safetensors", **KINDS[kind])


@pytest.mark.sweep(4)
@pytest.mark.parametrize("arch", [arch for arch in PIPELINES if data_of(arch).widest and arch != "anima"])
@pytest.mark.parametrize("save_format", ["portable", "diffusers"])
def test_layers_that_are_trained_on_request(arch: str, save_format: str, tmp_path: Path) -> None:
    read(arch, tmp_path / "a.safetensors", save_format=save_format, **data_of(arch).widest)


@pytest.mark.sweep
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
@pytest.mark.parametrize("arch", [arch for arch in PIPELINES if not MODELLED[arch].missing])
def test_the_trainers_dotted_names(arch: str, kind: str, root: tuple[str, bool], tmp_path: Path) -> None:
    part = SPECS[arch].denoiser.name
    parts = {part: models(arch)[part]}
    source = trained(arch, parts, tmp_path / "a.safetensors", **KINDS[kind])
    made = renamed(source, parts, tmp_path / "b.safetensors", *root)
    assert_model(READER, made, load(arch, parts, made))


@pytest.mark.parametrize("only", [".*", r"embeddings_connector\..*"])
def test_names_of_the_release_on_ltx_2(only: str, tmp_path: Path) -> None:
    """As its own trainer writes them; what lies before the denoiser gets no adapter under them."""
    arguments = {"save_format": "comfyui", "only_patterns": only} | data_of("ltx2").widest
    parts = models("ltx2")
    source = trained("ltx2", parts, tmp_path / "a.safetensors", **arguments)
    tensors = dict(source.given.tensors)
    for name in source.targets:
        alpha, up, down = (tensors.pop(f"{name}.{one}") for one in ("alpha", "lora_up.weight", "lora_down.weight"))
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up * (float(alpha) / len(down))}
    save_file(tensors, tmp_path / "b.safetensors")
    given = given_of(SPECS["ltx2"], parts, tmp_path / "b.safetensors", source.given.base)
    made = Trained(given=given, file=tmp_path / "b.safetensors", targets=source.targets)
    assert_model(READER, made, load("ltx2", parts, made))
    reading = READER.read(given)
    assert reading is not None
    assert reading.loaded == sum("connector" not in name for name in made.targets)
    assert bool(reading.refused) is (only != ".*")


@pytest.mark.parametrize("peft", [False, True])
def test_the_trainers_names_alone(peft: bool, tmp_path: Path) -> None:
    """As the released files of MiniMax-H3 have them."""
    parts = models("minimax_h3")
    source = trained("minimax_h3", parts, tmp_path / "a.safetensors", **data_of("minimax_h3").widest)
    made = renamed(source, parts, tmp_path / "b.safetensors", "", peft)
    assert_model(READER, made, load("minimax_h3", parts, made))
    reading = READER.read(made.given)
    assert reading is not None and reading.loaded == len(made.targets) and reading.exact


def test_one_factor_must_divide_all_layers(tmp_path: Path) -> None:
    for factor in ("2", "4"):
        read("zimage", tmp_path / "a.safetensors", algo="lokr", factor=factor)
    part = SPECS["zimage"].denoiser.name
    parts = {part: models("zimage")[part]}
    source = trained(
        "zimage", parts, tmp_path / "a.safetensors", algo="lokr", factor="2", unbalanced_factorization="True"
    )
    made = renamed(source, parts, tmp_path / "b.safetensors", "diffusion_model.", False)
    found = load("zimage", parts, made)
    assert "Could not infer a `decompose_factor`" in found.refused
    assert_model(READER, made, found)


def test_blocks_must_be_whole_on_wan(tmp_path: Path) -> None:
    made, reading = read("wan", tmp_path / "a.safetensors", exclude_patterns=r".*\.ffn\..*")
    assert reading.refused == "KeyError: 'blocks_0_ffn_0.lora_down.weight'" and not reading.loaded


def test_alphas_of_attention_must_be_alike_on_stable_diffusion(tmp_path: Path) -> None:
    """The others get the alpha that most layers have, without a word."""
    made, reading = read("sd", tmp_path / "a.safetensors", **KINDS["lora ranks"])
    wrong = [name for name, fate in reading.fates.items() if fate.reason]
    assert wrong and all("_to_q" in name or "q_proj" in name for name in wrong)
    assert reading.errors[0] == pytest.approx(abs((4 / 3) ** 0.5 - 1), abs=1e-3)


@pytest.mark.parametrize("arch", [arch for arch in PIPELINES if MODELLED[arch].missing])
def test_pipelines_without_a_loader_have_a_model_with_one(arch: str, tmp_path: Path) -> None:
    made, reading = read(arch, tmp_path / "a.safetensors", save_format="diffusers")
    assert reading.notes == (ALONE,)
    (model,) = models(arch, False).values()
    found = load_into(model, made)
    assert len(found.loaded) == len(made.targets) and max(max(errors or ()) for errors in found.errors.values()) < 1e-4


def test_two_strengths(tmp_path: Path) -> None:
    """diffusers' settings in the header beside alphas: refused, or both act."""
    for arch in ("sd", "qwen_image"):
        parts = {SPECS[arch].denoiser.name: models(arch)[SPECS[arch].denoiser.name]}
        made = trained(arch, parts, tmp_path / f"{arch}.safetensors")
        settings = {"lora_adapter_metadata": json.dumps(_settings(made, arch))}
        save_file(dict(made.given.tensors), made.file, settings)
        found = load(arch, parts, made)
        reading = READER.read(type(made.given)(**{**vars(made.given), "metadata": settings}))
        assert reading is not None and reading.refused in found.refused and bool(reading.refused) is (arch == "sd")
        if arch == "qwen_image":
            assert reading.errors == (None, None) and all(
                errors and errors[0] > 0.4 for errors in found.errors.values()
            )


def _settings(made: Trained, arch: str) -> dict[str, object]:
    """Of half the strength."""
    stem = SPECS[arch].denoiser.diffusers
    modules = [target.module for targets in made.targets.values() for target in targets]
    names = [name for name, module in models(arch)[SPECS[arch].denoiser.name].named_modules() if module in modules]
    return {f"{stem}.r": 4, f"{stem}.lora_alpha": 2, f"{stem}.target_modules": names}
