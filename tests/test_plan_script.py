"""scripts/plan.py and the models without weights that it looks at."""

from __future__ import annotations

import compileall
import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from registry_archs import SPECS, data_of, is_unet, release_of
from safetensors.torch import save_file
from tiny_flow_models import make_flux
from tiny_models import make_sd, make_sdxl
from tiny_two_streams import STAND_INS
from torch import nn
from toy_models import recorded

import networks.lora
from networks.archs import ARCHS
from networks.cli import plan as script
from networks.models import libraries
from networks.models.releases import ENCODERS, RELEASES
from networks.models.skeleton import recorded as recorded_model
from networks.models.skeleton import skeleton
from networks.tensors.norms import layer_geometry


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = script.main(argv)
    out, err = capsys.readouterr()
    return code, out, err


# Where a release's file has other names: what stands for what at their beginning.
IN_FILES: dict[str, tuple[str, Any]] = {
    "ltx2": (r"^(model\.|embeddings_)", lambda found: "" if found[1] == "model." else f"video_{found[1]}")
}


def checkpoint(path: Path, arch: str, prefix: str, more: dict[str, tuple[int, ...]] | None = None) -> Path:
    """A file with the header of a full-size checkpoint and no content: only the header may be read."""
    names = {e.dotted: e.shape for e in recorded(arch) if e.part in ("unet", "dit") and e.shape}
    shapes = {f"{prefix}{re.sub(*IN_FILES.get(arch, ('^$', '')), name)}.weight": shape for name, shape in names.items()}
    return header(path, {**shapes, **(more or {})})


def header(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    entries = {key: {"dtype": "F16", "shape": list(shape), "data_offsets": [0, 0]} for key, shape in shapes.items()}
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


@pytest.mark.parametrize("arch,text", [("sd", "cond_stage_model.x.weight"), ("sdxl", "conditioner.x.weight")])
def test_checkpoints_are_read_by_their_header(tmp_path: Path, arch: str, text: str) -> None:
    whole = skeleton(str(checkpoint(tmp_path / "a.safetensors", arch, "model.diffusion_model.", {text: (1,)})))
    default, _, encoders = data_of(arch).counts
    found = networks.lora.plan(4, 1, whole.text_encoders, whole.unet)
    assert len(found.trained) == default + encoders
    alone = skeleton(str(checkpoint(tmp_path / "b.safetensors", arch, "")))
    assert len(networks.lora.plan(4, 1, alone.text_encoders, alone.unet).trained) == default


@pytest.mark.sweep(2)
@pytest.mark.parametrize("arch", [name for name, spec in SPECS.items() if spec.releases and not is_unet(name)])
def test_headers_of_every_trainers_checkpoint(arch: str, tmp_path: Path) -> None:
    """The recorded layers of the trainer's own full-size model, or under those of the release's file."""
    prefix = "" if arch == "ace_step" else "model.diffusion_model."
    found = skeleton(str(checkpoint(tmp_path / "a.safetensors", arch, prefix)))
    assert RELEASES[release_of(arch)].title in found.title
    assert len(networks.lora.plan(4, 1, None, found.unet).trained) == data_of(arch).counts[0]
    if found.release is not None and found.release.added:
        widest = networks.lora.plan(4, 1, None, found.unet, **data_of(arch).widest)
        assert len(widest.trained) == data_of(arch).counts[1]


TWINS = {"hunyuan_video_i2v": "hunyuan_video"}  # of the same layers


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", RELEASES)
def test_headers_of_every_release_in_diffusers_names(name: str, tmp_path: Path) -> None:
    """Sizes of one architecture are told apart."""
    shapes = {key: tuple(p.shape) for key, p in skeleton(name).unet.named_parameters()}
    found = skeleton(str(header(tmp_path / "a.safetensors", shapes)))
    assert f"({RELEASES[TWINS.get(name, name)].title})" in found.title


@pytest.mark.sweep(2)
@pytest.mark.parametrize("arch", SPECS)
def test_released_sizes_have_the_usual_numbers_of_layers_and_kinds(arch: str) -> None:
    plans = [networks.lora.plan(4, 1, None, skeleton(one.name).unet).trained for one in SPECS[arch].releases]
    assert {len(rows) for rows in plans} <= SPECS[arch].usual
    assert {len({re.sub("[0-9]", "", row.trainer_name) for row in rows}) for rows in plans} <= SPECS[arch].kinds


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", [*RELEASES, *ENCODERS])
def test_outlines_are_those_of_the_real_classes(name: str) -> None:
    """Names, classes and shapes of every module, in the libraries that are installed."""
    if name in STAND_INS:
        with libraries.on_meta():
            real = STAND_INS[name]()
    elif name in RELEASES:
        real = libraries.denoiser_of(RELEASES[name])
    else:
        real = libraries.encoder_of(ENCODERS[name])
    ours = recorded_model(name)
    assert modules(ours) == modules(real), "run: python scripts/names.py --skeletons, and look at what has changed"
    assert [layer_geometry(m) for m in ours.modules()] == [layer_geometry(m) for m in real.modules()]
    assert all(p.is_meta for p in ours.parameters())


def modules(model: nn.Module) -> list[tuple[str, str, dict[str, tuple[int, ...]]]]:
    return [
        (path, type(module).__name__, {key: tuple(p.shape) for key, p in module.named_parameters(recurse=False)})
        for path, module in model.named_modules()
    ]


def test_built_in_models_and_checkpoints_need_no_library_of_models(tmp_path: Path) -> None:
    """And the rest takes little beside the import of torch: CPU time, since test machines are shared, and a
    ratio, since some are slow. Compiled once, as with its users."""
    file, root = checkpoint(tmp_path / "a.safetensors", "wan", ""), Path(__file__).resolve().parents[1]
    for folder in ("networks", "presets", "scripts"):
        shutil.copytree(root / folder, tmp_path / folder, ignore=shutil.ignore_patterns("emoji", "__pycache__"))
    assert compileall.compile_dir(tmp_path, quiet=1)
    code = (
        "import sys, time\n"
        "for name in 'diffusers transformers accelerate peft'.split():\n    sys.modules[name] = None\n"
        "start = time.process_time()\nimport torch\ntorchs = time.process_time() - start\n"
        "sys.path.insert(0, sys.argv[1])\nimport plan, networks\nassert plan.main(['sdxl']) == 0\n"
        "ours = time.process_time() - start - torchs\nassert plan.main([sys.argv[2]]) == 0\n"
        "assert networks.__file__.startswith(sys.argv[3]) and ours < 0.6 * torchs, (ours, torchs)\n"
    )
    arguments = [str(tmp_path / "scripts"), str(file), str(tmp_path)]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=tmp_path)


def test_more_blocks_than_the_release_are_a_variant(tmp_path: Path) -> None:
    more = {"single_blocks.38.linear2.weight": (3072, 15360)}
    with pytest.raises(ValueError, match="has not the layers of a release"):
        skeleton(str(checkpoint(tmp_path / "a.safetensors", "flux", "", more)))


@pytest.mark.parametrize("arch", [name for name, spec in SPECS.items() if spec.text_encoders])
def test_text_encoders_of_the_releases_are_the_trainers(arch: str) -> None:
    model = skeleton(release_of(arch))
    rows = networks.lora.plan(4, 1, model.text_encoders, model.unet, **data_of(arch).widest).trained
    ours = {row.saved_name: row.shape for row in rows if row.part.startswith("text_encoder")}
    theirs = {e.saved: e.shape for e in recorded(arch) if e.part.startswith("text_encoder") and e.saved != "-"}
    assert ours == theirs and ours


@pytest.mark.parametrize("kind", ["pipeline", "denoiser alone"])
def test_folders_of_other_families(kind: str, tmp_path: Path) -> None:
    folder = make_flux(tmp_path / "model")
    model = skeleton(str(folder if kind == "pipeline" else folder / "transformer"))
    assert len(model.text_encoders) == (2 if kind == "pipeline" else 0)
    trained = networks.lora.plan(4, 1, model.text_encoders, model.unet).trained
    assert {row.part for row in trained} == ({"dit", "text_encoder1"} if kind == "pipeline" else {"dit"})
    assert all(p.is_meta for p in model.unet.parameters())


def test_variants_adapters_and_other_models_are_refused(tmp_path: Path) -> None:
    pruned = checkpoint(
        tmp_path / "v.safetensors", "sdxl", "", {"input_blocks.4.1.transformer_blocks.2.attn2.to_k.weight": (640, 2048)}
    )
    with pytest.raises(ValueError, match="has not the layers of.*diffusers folder"):
        skeleton(str(pruned))
    save_file({"double_blocks.0.weight": torch.ones(1)}, tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match="has not the layers of"):
        skeleton(str(tmp_path / "flux.safetensors"))
    save_file({"x.lora_down.weight": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="is an adapter"):
        skeleton(str(tmp_path / "lora.safetensors"))
    with pytest.raises(ValueError, match="did you mean sdxl"):
        skeleton("sdxll")
    with pytest.raises(ValueError, match="neither model_index.json nor config.json"):
        skeleton(str(tmp_path))


@pytest.mark.parametrize("make,encoders", [(make_sd, 1), (make_sdxl, 2)])
def test_diffusers_folders(tmp_path: Path, make: Any, encoders: int) -> None:
    model = skeleton(str(make(tmp_path / "model")))
    assert len(model.text_encoders) == encoders
    assert all(p.is_meta for m in (model.unet, *model.text_encoders) for p in m.parameters())
    assert networks.lora.plan(4, 1, model.text_encoders, model.unet).trained


def test_output(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("sd15", "--network_module", "networks.lokr", "--network_dim", "8", "--network_args", "factor=8")
    code, out, _ = run(capsys, *arguments)
    assert (
        code == 0 and "lora_unet_mid_block_attentions_0_proj_in" in out and "264 layers" in out.replace("in all ", "")
    )
    code, out, _ = run(capsys, *arguments, "--json", "--network_train_unet_only", "--trained")
    data = json.loads(out)
    assert code == 0 and data["totals"]["trained_by_part"] == {"unet": 192} and len(data["rows"]) == 192
    code, out, _ = run(capsys, "sd15", "--network_train_text_encoder_only", "--json")
    assert json.loads(out)["totals"]["trained_by_part"] == {"text_encoder": 72}


def test_the_host_decides_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    """musubi-tuner: convolutions take the network's dim and alpha, and no text encoder is trained."""
    kinds = {}
    for host in ((), ("--host", "sd-scripts"), ("--host", "musubi")):
        code, out, err = run(capsys, "sd15", "--network_dim", "8", "--network_alpha", "2", "--json", "--trained", *host)
        assert code == 0, err
        rows = json.loads(out)["rows"]
        kinds[host] = {(row["part"], "3x3" in row["kind"], row["dim"], row["alpha"]) for row in rows}
    linear = ("unet", False, 8, 2.0)
    assert kinds[()] == kinds["--host", "sd-scripts"] == {linear, ("text_encoder", False, 8, 2.0)}
    assert kinds["--host", "musubi"] == {linear, ("unet", True, 8, 2.0)}
    code, _, err = run(capsys, "sd15", "--host", "musubi", "--network_train_text_encoder_only")
    assert code == 2 and "musubi trains no text encoder" in err
    code, _, err = run(capsys, "sd15", "--host", "kohya")
    assert code == 2 and "sd-scripts" in err and "musubi" in err


@pytest.mark.parametrize(
    "argv,words",
    [
        (
            ("sd15", "--network_args", "use_tucker=Ture", "rank_dropot=0.1"),
            ["2 problems", "did you mean rank_dropout?"],
        ),
        (("sd15", "--network_args", "network_reg_dims=foo=8"), ["'foo' matches no layer"]),
        (("sd15", "--network_args", "factor"), ["key=value"]),
        (("sd15", "--network_module", "networks.lorra"), ["networks.lora"]),
        (("nowhere.safetensors",), ["neither a built-in model"]),
        (("sd15", "--network_dimm", "4"), ["--network_dim"]),
    ],
)
def test_mistakes_are_one_message_and_exit_2(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: list[str]
) -> None:
    code, _, err = run(capsys, *argv)
    assert code == 2 and "Traceback" not in err
    for word in words:
        assert word in err


# Values of arguments that only some architectures have, where the name does not say what they are like.
VALUES = {
    "in_dims": "[2,0,0,0,1]", "emb_dims": "2,2,2,2,2,2", "embedder_dims": "2,0,2", "down_lr_weight": "cosine",
    "mid_lr_weight": "0.5", "up_lr_weight": "linear+.5", "block_lr_zero_threshold": "0.3", "train_t5xxl": "True",
    "train_llm_adapter": "True", "split_qkv": "True", "connector_lora": "True", "lora_target_preset": "v2v",
}  # fmt: skip
BESIDE = {"block_lr_zero_threshold": {"up_lr_weight": "linear"}}
OWN = {release.name: arch for arch in ARCHS for release in arch.releases}


def value_of(arch: Any, argument: str) -> str:
    """One that asks for something else than the default."""
    if argument in VALUES:
        return VALUES[argument]
    switch = next((switch for switch in arch.switches if switch.argument == argument), None)
    if switch is not None:
        trained = switch.trains(None, "sd_scripts")
        return str(switch.trained_if is not trained)
    if argument == "train_blocks":
        return arch.block_sets[0][0]
    return "0" if argument.endswith("_indices") else "2"  # a dim


@pytest.mark.sweep(6)
@pytest.mark.parametrize(
    "name,argument", [(name, argument) for name, arch in OWN.items() for argument in sorted(arch.arguments)]
)
def test_every_argument_of_an_architecture_changes_the_plan_of_its_release(name: str, argument: str) -> None:
    """What a built-in model lacks, an argument would speak of in vain."""
    beside = BESIDE.get(argument, {})
    assert rows_of(name, **beside) != rows_of(name, **beside, **{argument: value_of(OWN[name], argument)})


@functools.cache
def rows_of(name: str, **arguments: str) -> Any:
    model = built(name)
    return networks.lora.plan(4, 1, model.text_encoders, model.unet, **arguments).rows


built = functools.cache(skeleton)


def test_the_adapter_of_anima_is_the_trainers() -> None:
    """Of sd-scripts' own class, as it was recorded."""
    theirs = {e.saved: e.shape for e in recorded("anima") if "llm_adapter" in e.dotted and e.saved != "-"}
    model = skeleton("anima").unet
    rows = networks.lora.plan(4, 1, None, model, train_llm_adapter="True", train_norm="True").rows
    adapter = [row for row in rows if row.dotted_name.startswith("llm_adapter.")]
    assert {row.saved_name: row.shape for row in adapter if row.trained and row.kind == "Linear"} == theirs
    trained = {row.dotted_name for row in adapter if row.trained and row.kind == "RMSNorm"}
    ends = ["norm_self_attn", "norm_cross_attn", "norm_mlp"]
    ends += [f"{kind}_attn.{name}_norm" for kind in ("self", "cross") for name in "qk"]
    assert trained == {f"llm_adapter.blocks.{i}.{end}" for i in range(6) for end in ends}
    assert len(networks.lora.plan(4, 1, None, model).trained) == 280
    assert len(networks.lora.plan(4, 1, None, model, train_llm_adapter="True").trained) == 340


def test_a_checkpoint_has_what_is_in_it(tmp_path: Path) -> None:
    """Trainers load the adapter of Anima from a file of its own, too."""
    whole = checkpoint(tmp_path / "a.safetensors", "anima", "net.")
    unet = skeleton(str(whole)).unet
    assert len(networks.lora.plan(4, 1, None, unet, train_llm_adapter="True").trained) == 340
    entries = json.loads(whole.read_bytes()[8:])
    text = json.dumps({key: entry for key, entry in entries.items() if "llm_adapter" not in key}).encode()
    whole.write_bytes(len(text).to_bytes(8, "little") + text)
    unet = skeleton(str(whole)).unet
    assert len(networks.lora.plan(4, 1, None, unet).trained) == 280
    with pytest.raises(
        ValueError, match="train_llm_adapter=True has no effect: this model has no LLMAdapterTransformer"
    ):
        networks.lora.plan(4, 1, None, unet, train_llm_adapter="True")


def test_why_explains_layers(capsys: pytest.CaptureFixture[str]) -> None:
    """A part of a name means every layer that has it; an unknown one is a mistake with the nearest name."""
    arguments = ("--network_args", "exclude_patterns=.*attn1.*", "network_reg_dims=.*mid_block.*=2")
    code, out, _ = run(capsys, "sd15", "--network_train_unet_only", "--why", "mid_block.*to_q", *arguments)
    assert code == 0
    first, second = out.strip().split("\n\n")
    assert "attn1.to_q" in first and "left out: excluded by '.*attn1.*'" in first
    assert "attn2.to_q" in second and "dim: 2 by network_reg_dims '.*mid_block.*' > 4 by network_dim" in second
    code, out, _ = run(capsys, "sd15", "--network_train_unet_only", "--why", "mid_block.*to_q", "--json", *arguments)
    data = json.loads(out)
    assert [entry["trained"] for entry in data] == [False, True]
    said = {entry["rule"]: entry["word"] for entry in data[0]["rules"]}
    assert said["exclude_patterns, include_patterns"] == "leaves it out: excluded by '.*attn1.*'"
    dims = {entry["source"]: entry["value"] for entry in data[1]["values"]["dim"]}
    assert (dims["network_reg_dims"], dims["network_dim"], dims["file"]) == (2, 4, None)
    code, _, err = run(capsys, "sd15", "--why", "mid_block.attentions.0.proj_inn")
    assert code == 2 and "did you mean mid_block.attentions.0.proj_in" in err
