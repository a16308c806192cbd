"""Every model family: we predict what the pipeline does, and a trained file draws the same wherever it is read."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_flow_models
import tiny_models
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import networks.lora
from kohya_trainer import generate
from kohya_trainer import train as trainer
from kohya_trainer.data.caption_folder import CaptionedImage
from kohya_trainer.data.sound import read_sound
from kohya_trainer.drawing.requests import ImageRequest
from kohya_trainer.families import FAMILIES
from kohya_trainer.families.noise import Flow
from kohya_trainer.model_folder import load_model

ROOT = Path(__file__).resolve().parents[1]
SIDE = 32
MAKERS = {
    "StableDiffusionPipeline": tiny_models.make_sd,
    "StableDiffusionXLPipeline": tiny_models.make_sdxl,
    **tiny_flow_models.MAKERS,
}
PARTS = {
    "StableDiffusionPipeline": {"unet", "text_encoder"},
    "StableDiffusionXLPipeline": {"unet", "text_encoder", "text_encoder_2"},
    "FluxPipeline": {"transformer", "text_encoder"},
    "StableDiffusion3Pipeline": {"transformer", "text_encoder", "text_encoder_2"},
}
# diffusers for Python 3.10 has not all of them
FLOWS = [name for name in tiny_flow_models.MAKERS if hasattr(diffusers, name)]
REQUEST = ImageRequest("a red square", "", 7, SIDE, SIDE, steps=1, scale=1.0, seconds=0.4)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Folders images and sounds, and a function that makes a model's folder once."""
    root = tmp_path_factory.mktemp("families")
    tiny_models.make_images(root / "images", 3, SIDE)
    tiny_flow_models.make_sounds(root / "sounds")

    @functools.cache
    def model(name: str) -> Path:
        torch.manual_seed(0)
        return MAKERS[name](root / name)

    model.root = root
    return model


def load(path: Path):
    return load_model(path, torch.device("cpu"), torch.float32, "--ckpt")


def unguided(name: str) -> float:
    """The guidance that is none: Z-Image's pipeline counts from 0."""
    return 0.0 if name == "ZImagePipeline" else 1.0


def data_of(folder, name: str) -> Path:
    return folder.root / ("sounds" if name == "AceStepPipeline" else "images")


@pytest.mark.parametrize("name", FLOWS)
def test_the_prediction_is_the_pipelines(folder, name):
    """One step from pure noise, without guidance: what the pipeline draws is noise - prediction at time 1."""
    family = load(folder(name))
    seen = {}
    family.decode = lambda latents: seen.setdefault("drawn", latents)
    family.draw([replace(REQUEST, scale=unguided(name))])
    drawn = seen["drawn"]
    shape = (1, *drawn.shape[1:]) if name != "AceStepPipeline" else (1, drawn.shape[2], drawn.shape[1])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(REQUEST.seed))
    noise = noise.transpose(1, 2) if name == "AceStepPipeline" else noise
    samples = round(REQUEST.seconds * getattr(family.pipeline, "sample_rate", 1))
    prompt = family.prompt_of(CaptionedImage(Path("x"), REQUEST.prompt), (1, samples))
    with torch.no_grad():
        predicted = family.predict(noise, torch.ones(1), family.encode_prompts([prompt]), {})
    assert torch.allclose(drawn, noise - predicted, rtol=0, atol=2e-5 * float(drawn.abs().max()))


@pytest.mark.parametrize("name", FLOWS)
def test_a_prediction_does_not_depend_on_its_batch(folder, name):
    family = load(folder(name))
    prompts = ["a red square", "a much longer caption of another square"]
    prompts = [family.prompt_of(CaptionedImage(Path("x"), text), (1, 160)) for text in prompts]
    size = (2, 8, 20) if name == "AceStepPipeline" else (2, 4, 16, 16)
    noisy, times = torch.randn(size, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        conditions = family.encode_prompts(prompts)
        both = family.predict(noisy, times, conditions, {})
        single = [family.encode_prompts([prompt]) for prompt in prompts]
        one = torch.cat([family.predict(noisy[i : i + 1], times[i : i + 1], single[i], {}) for i in range(2)])
    assert both.shape == noisy.shape
    assert torch.allclose(both, one, atol=1e-5)


@pytest.mark.parametrize("name", FLOWS)
def test_latents_decode_to_the_data(folder, name):
    """encode and decode are the autoencoder's own two ways: scale and unscale are inverse, shapes come back."""
    family = load(folder(name))
    latents = torch.randn(2, 4, 16, 16)
    if name == "AceStepPipeline":
        sounds = family.decode(torch.randn(2, 8, 20))
        assert [tuple(sound.shape) for sound in sounds] == [(2, 160)] * 2
        assert all(float(sound.abs().max()) == pytest.approx(10 ** (-1 / 20)) for sound in sounds)
        return
    raw = family.unscale(latents)
    assert torch.allclose(family.scale(raw), latents, atol=1e-6)
    item = family.read_item(folder.root / "images" / "0.png", (SIDE, SIDE))
    encoded = family.encode(item["data"][None], [torch.Generator().manual_seed(0)])
    assert encoded.shape == (1, 4, 16, 16)
    mean = family.vae.encode(family.to_vae(item["data"][None])).latent_dist
    assert float((encoded - family.scale(mean.mean)).abs().max()) < 6 * float(mean.std.max()) / 0.4 + 1e-6
    assert [image.size for image in family.decode(encoded)] == [(SIDE, SIDE)]


def train(folder, name: str, output: Path, *more: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    code = trainer.main(
        [
            f"--pretrained_model_name_or_path={folder(name)}",
            f"--train_data_dir={data_of(folder, name)}",
            f"--output_dir={output}",
            "--resolution=32",
            "--network_dim=4",
            "--network_alpha=4",
            "--max_train_steps=3",
            "--train_batch_size=2",
            "--learning_rate=0.05",
            "--seed=1",
            "--debug",
            *more,
        ]
    )
    assert code == 0


def draw(folder, name: str, output: Path, *more: str) -> np.ndarray:
    """What the generator draws: (H, W, 3) from 0 to 255, or (2, S) from -1 to 1."""
    options = ["--prompt=a red square --w 32 --h 32 --s 2 --l 1 --d 3 --sec 0.4", f"--outdir={output}", "--debug"]
    assert generate.main([f"--ckpt={folder(name)}", *options, *more]) == 0
    if name == "AceStepPipeline":
        return read_sound(output / "im_000000.wav", 400).numpy()
    return np.asarray(Image.open(output / "im_000000.png")).astype(float)


@pytest.mark.parametrize("name", FLOWS)
def test_trained_saved_loaded_and_drawn(folder, name, tmp_path):
    text = "FluxPipeline" == name  # its CLIP is trained too, so text runs in every step
    train(folder, name, tmp_path, *([] if text else ["--network_train_unet_only"]))
    file = tmp_path / "last.safetensors"
    network = ["--network_module", "networks.lora", "--network_weights", str(file)]
    base = draw(folder, name, tmp_path / "base")
    applied = draw(folder, name, tmp_path / "applied", *network)
    merged = draw(folder, name, tmp_path / "merged", *network, "--network_merge")
    span = 1 if base.ndim == 2 else 255
    assert np.abs(applied - base).max() > 0.02 * span
    assert np.abs(applied - merged).max() <= 0.01 * span


PRESET = """
enable_conv = true
unet_target_module = ["*"]
unet_target_name = ["proj_in_conv"]
"""
MUSIC: dict[str, tuple[list[str], set[str]]] = {  # arguments -> suffixes in the file
    "lora": ([], {"lora_down.weight", "lora_up.weight"}),
    "dora": (["use_dora=True"], {"lora_down.weight", "lora_up.weight", "dora_scale"}),
    "loha": (["algo=loha"], {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    "oft": (["algo=diag-oft", "network_reg_dims={{'.*':4}}"], {"oft_blocks"}),
    "lokr": (["algo=lokr", "factor=4"], {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
    "lokr, decompose both": (
        ["algo=lokr", "factor=4", "decompose_both=True"],
        {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
    ),
    "lokr, scalar": (["algo=lokr", "factor=4", "use_scalar=True"], {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
    "lokr, DoRA": (
        ["algo=lokr", "factor=4", "use_dora=True"],
        {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "dora_scale"},
    ),
    "lokr, Tucker": (
        ["algo=lokr", "factor=2", "use_tucker=True", "conv_dim=1", "preset={preset}"],
        {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2"},
    ),
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("form", MUSIC)
def test_music_with_every_setting_of_its_trainers(folder, tmp_path, form):
    """From sounds with captions and lyrics, and again from their caches, under the names which the
    original decoder's programs use; reloaded, it draws the same applied and merged."""
    (tmp_path / "preset.toml").write_text(PRESET)
    arguments, suffixes = MUSIC[form]
    arguments = [argument.format(preset=tmp_path / "preset.toml") for argument in arguments]
    sounds, name = shutil.copytree(folder.root / "sounds", tmp_path / "sounds"), "AceStepPipeline"
    dim = ["--network_dim=1", "--network_alpha=0.5", f"--train_data_dir={sounds}"]
    disk = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
    for run, more in (("sounds", []), ("caching", disk), ("cached", disk)):
        if run == "cached":
            assert len(list(sounds.glob("*_latents_*"))) == len(list(sounds.glob("*_text_*"))) == 3
        train(folder, name, tmp_path / run, *dim, *more, "--network_args", *arguments)
    file = tmp_path / "sounds" / "last.safetensors"
    tensors = load_file(file)
    caching, cached = (load_file(tmp_path / run / "last.safetensors") for run in ("caching", "cached"))
    assert caching.keys() == tensors.keys() and all(torch.equal(caching[key], cached[key]) for key in tensors)
    layers = {key.partition(".")[0] for key in tensors}
    projections = {f"{attn}_{which}_proj" for attn in ("self_attn", "cross_attn") for which in "qkvo"}
    own = {"lycoris_proj_in_1"} if "Tucker" in form else set()
    assert layers == {f"lycoris_layers_{block}_{name}" for block in (0, 1) for name in projections} | own
    assert {key.partition(".")[2] for key in tensors} == suffixes | {"alpha"}
    base, applied, merged = (drawn(folder, name, how, file) for how in ("", "applied", "merged"))
    assert float((applied - base).abs().max()) > 1e-3 * float(base.abs().max())
    assert torch.allclose(applied, merged, rtol=0, atol=2e-5 * float(base.abs().max()))
    # sounds are encoded by batches, caches one by one: other rounding
    other = drawn(folder, name, "applied", tmp_path / "cached" / "last.safetensors")
    assert float((other - applied).abs().max()) < 0.01 * float((applied - base).abs().max())


def test_lyrics_reach_the_model(folder):
    family = load(folder("AceStepPipeline"))
    with torch.no_grad():
        one, other, caption = (
            family.encode_prompts([f"0.4\n{text}"])[0]["hidden"] for text in ("a tone\nla la", "a tone\nlu lu", "a sea")
        )
    assert one.shape == other.shape and not torch.allclose(one, other) and one.shape != caption.shape


CASES = [(name, form) for name in MAKERS if hasattr(diffusers, name) for form in ("plain", "rs", "dora")]
CONVOLUTIONS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
ARGUMENTS = {"plain": [], "rs": ["use_rslora=True"], "dora": ["use_dora=True"]}


def drawn(folder, name: str, how: str = "", file: Path | None = None, strength: float = 1.0) -> torch.Tensor:
    """Latents that the pipeline ends with: by itself, with our network, or with diffusers' own reading of the file."""
    family, seen = load(folder(name)), []
    family.decode = seen.append
    if how == "diffusers":
        family.pipeline.load_lora_weights(str(file), adapter_name="read")
        family.pipeline.set_adapters(["read"], [strength])
    elif how:
        network, weights = networks.lora.create_network_from_weights(
            strength, str(file), None, family.text_encoder_argument, family.denoiser, for_inference=True
        )
        if how == "merged":
            network.merge_to(family.text_encoder_argument, family.denoiser, weights, torch.float32, "cpu")
        else:
            network.apply_to(family.text_encoder_argument, family.denoiser)
    family.draw([replace(REQUEST, scale=unguided(name), steps=2)])
    return seen[0]


@pytest.mark.sweep(3)
@pytest.mark.parametrize(("name", "form"), CASES)
def test_diffusers_reads_what_is_trained_for_it(folder, name, form, tmp_path):
    """Trained, saved in its dialect, and drawn three ways; text encoders and convolutions where they are trained."""
    arguments = ["save_format=diffusers", *ARGUMENTS[form], *(["conv_dim=2"] if name in CONVOLUTIONS else [])]
    text = [] if name in PARTS else ["--network_train_unet_only"]
    train(folder, name, tmp_path, "--network_alpha=3", *text, "--network_args", *arguments)
    file = tmp_path / "last.safetensors"
    keys = load_file(file).keys()
    assert {key.partition(".")[0] for key in keys} == PARTS.get(name, {"transformer"})
    assert any("lora_magnitude_vector" in key for key in keys) == (form == "dora")
    base, theirs = drawn(folder, name), drawn(folder, name, "diffusers", file)
    assert float((theirs - base).abs().max()) > 1e-2 * float(base.abs().max())
    for how in ("applied", "merged"):
        mine = drawn(folder, name, how, file)
        assert torch.allclose(theirs, mine, rtol=0, atol=2e-5 * float(mine.abs().max())), how


@pytest.mark.parametrize("name", [name for name in FLOWS if name in ("QwenImagePipeline", "ZImagePipeline")])
def test_diffusers_reads_the_trainers_names(folder, name, tmp_path):
    """Of FLUX.1 and Stable Diffusion it reads them too, but knows released sizes only: see test_diffusers_reads."""
    train(folder, name, tmp_path, "--network_train_unet_only")
    file = tmp_path / "last.safetensors"
    base, theirs, mine = (drawn(folder, name, how, file) for how in ("", "diffusers", "applied"))
    assert float((theirs - base).abs().max()) > 1e-2
    assert torch.allclose(theirs, mine, rtol=0, atol=2e-5 * float(mine.abs().max()))


def test_unknown_family_lists_those_known(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    assert generate.main([f"--ckpt={tmp_path}", "--prompt=x"]) == 2
    error = capsys.readouterr().err
    assert "KandinskyPipeline" in error and all(family.title in error for family in FAMILIES)


TOY = """
from __future__ import annotations

from .base import Family


class Toy(Family):
    title, pipeline_class, version = "Toy Diffusion", "ToyPipeline", "toy"
"""


def test_a_family_is_one_file(tmp_path):
    """Put into a copy of the trainer, it is in --help, and its models are known."""
    shutil.copytree(ROOT / "kohya_trainer", tmp_path / "kohya_trainer", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kohya_trainer" / "families" / "toy.py").write_text(TOY)
    (tmp_path / "model_index.json").write_text('{"_class_name": "ToyPipeline"}')
    code = (
        "from pathlib import Path\n"
        "from kohya_trainer.model_folder import check_model_folder\n"
        "from kohya_trainer.train_options import build_parser\n"
        "print(check_model_folder(Path(), '--x').version, build_parser().description)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("toy ")
    assert all(title in done.stdout for title in ("Toy Diffusion", *(family.title for family in FAMILIES)))


def with_part(model: Path, target: Path, **parts: list[str]) -> Path:
    """A copy of a model's folder with other entries in its index."""
    shutil.copytree(model, target)
    index = target / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **parts}))
    return target


def test_stable_diffusion_is_opened_without_its_safety_checker(folder, tmp_path):
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]  # whose files are not there
    model = with_part(folder("StableDiffusionPipeline"), tmp_path / "sd", safety_checker=checker)
    assert load(model).pipeline.safety_checker is None


PART = """
from diffusers import AutoencoderKL, ModelMixin


class OwnAutoencoder(AutoencoderKL):
    def fit_pipeline(self, pipeline):
        pipeline.vae_scale_factor = 3
"""


def test_a_part_may_be_of_any_module(folder, tmp_path, monkeypatch):
    """As model_index.json names it; an autoencoder may know its own scale."""
    (tmp_path / "own_parts.py").write_text(PART)
    monkeypatch.syspath_prepend(tmp_path)
    model = with_part(folder("StableDiffusionPipeline"), tmp_path / "sd", vae=["own_parts", "OwnAutoencoder"])
    family = load(model)
    assert type(family.vae).__name__ == "OwnAutoencoder" and family.pipeline.vae is family.vae
    assert family.vae.dtype == torch.float32 and not any(p.requires_grad for p in family.vae.parameters())
    assert family.native_size == 3 * family.denoiser.config.sample_size


@pytest.mark.parametrize("entry", [["no_such_parts", "X"], ["diffusers", "NoSuchAutoencoder"], [None, None], None])
def test_a_part_that_cannot_be_imported_is_named(folder, tmp_path, entry):
    model = with_part(folder("StableDiffusionPipeline"), tmp_path / "sd", vae=entry)
    with pytest.raises(ValueError, match=r"^--ckpt .*: its vae is .*(Install|upgrade)") as caught:
        load(model)
    assert all(word in str(caught.value) for word in filter(None, entry or ())), caught.value


def test_flow_levels():
    """Times grow with u; a shift moves them towards the noise by its formula; the middle of the normal is its mean."""
    u = torch.linspace(0.01, 0.99, 99)
    uniform, shifted = Flow(1.0, None).times(u), Flow(3.0, None).times(u)
    assert torch.allclose(uniform, u)
    assert torch.allclose(shifted, 3 * u / (1 + 2 * u))
    normal = Flow(1.0, -0.4).times(u)
    assert bool((normal.diff() > 0).all())
    assert float(normal[49]) == pytest.approx(float(torch.sigmoid(torch.tensor(-0.4))), abs=1e-6)
    draws = torch.sigmoid(torch.randn(200_000, generator=torch.Generator().manual_seed(0)) - 0.4)
    assert torch.allclose(torch.quantile(draws, u), normal, atol=5e-3)


def commands_of_the_page() -> list[list[str]]:
    """The block with one command per family, each as a shell divides it."""
    text = (Path(__file__).parents[1] / "docs" / "reference-trainer.md").read_text(encoding="utf-8")
    block = text.partition("## One command per family\n\n```bash\n")[2].partition("```")[0]
    return [shlex.split(command) for command in block.replace("\\\n", " ").splitlines()]


PLACES = {
    "SD15": "StableDiffusionPipeline",
    "SDXL": "StableDiffusionXLPipeline",
    "FLUX1": "FluxPipeline",
    "SD35": "StableDiffusion3Pipeline",
    "QWEN_IMAGE": "QwenImagePipeline",
    "Z_IMAGE": "ZImagePipeline",
    "ACE_STEP": "AceStepPipeline",
}


@pytest.mark.parametrize(
    "command",  # Python 3.10's last diffusers has not all pipelines
    [command for command in commands_of_the_page() if hasattr(diffusers, PLACES[command[3]])],
    ids=lambda command: command[3],
)
def test_the_commands_of_the_page_run(folder, tmp_path, command, monkeypatch):
    """As they stand there, on tiny models and pictures, and for two steps."""
    monkeypatch.chdir(tmp_path)
    python, script, *options = command
    name = PLACES[options[1]]
    places = {options[1]: folder(name), "IMAGES": folder.root / "images", "SOUNDS": folder.root / "sounds"}
    options = [str(places.get(option, option)) for option in options]
    AcceleratorState._reset_state(reset_partial_state=True)
    if script.endswith("train_network.py"):
        small = ["--max_train_steps=2", "--resolution=32", "--min_bucket_reso=16", "--bucket_reso_steps=4", "--debug"]
        assert python == "python" and trainer.main([*options, *small]) == 0
        assert load_file("out/last.safetensors")
        return
    train(folder, name, Path("out"), "--network_train_unet_only", "--max_train_steps=1")
    assert generate.main([*options, "--steps=1", "--W=32", "--H=32", "--debug"]) == 0
    assert len(list(Path("out").glob("im_*.png"))) == 9 and Path("out/grid_000000.png").is_file()


def test_every_family_has_a_command():
    said = {PLACES[command[3]] for command in commands_of_the_page() if command[1].endswith("train_network.py")}
    assert said == {family.pipeline_class for family in FAMILIES}
