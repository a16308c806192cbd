"""A file is opened once, and comes to the same verdict at every door: strength, broken values, layers without a place,
magnitudes of DoRA."""

from __future__ import annotations

import importlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from merge import main as merge_main
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_parts import randomise, sd_unet, text_encoder
from torch import Tensor, nn
from toy_models import toy

import networks.lora
import networks.lora_flux
from networks.cli import resize as resize_script
from networks.cli import show as show_script
from networks.files import places
from networks.files.adapter_file import FileTensors, Naming
from networks.files.places import Allowance
from networks.files.reader import read_header
from networks.hosts import key_merge

Q = "layers.0.self_attn.q_proj"
LAYERS = {"self_attn.q_proj": 2, "self_attn.k_proj": 3, "mlp.gate_proj": 5}  # the end of a name -> a prime of our own


def ace() -> nn.Module:
    return toy("ace_step")["dit"].eval().requires_grad_(False)


def changes(model: nn.Module, source: Any, entry: str = "lora_ace_step", **kwargs: Any) -> dict[str, Tensor]:
    """What a file, a folder or tensors change of a model, by its dotted names."""
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    module = importlib.import_module(f"networks.{entry}")
    given = {"file": None, "weights_sd": source} if isinstance(source, Mapping) else {"file": str(source)}
    network, _ = module.create_network_from_weights(
        1.0, vae=None, text_encoder=None, unet=model, for_inference=True, **given, **kwargs
    )
    network.merge_to(None, model)
    return {name: t - old[name] for name, t in model.state_dict().items() if not torch.equal(t, old[name])}


# -- strength

PATTERNS = {
    "rank_pattern": {"q_proj": 2, "layers.1.self_attn.k_proj": 6},
    "alpha_pattern": {"k_proj": 7, "^layers.0.mlp.gate_proj": 9},
}
TARGETS = ["q_proj", "k_proj", "gate_proj"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora r 4 alpha 8": lambda: LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    "rs-lora": lambda: LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=TARGETS),
    "patterns": lambda: LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **PATTERNS),
    "rs-lora with patterns": lambda: LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=TARGETS, **PATTERNS),
    "dora": lambda: LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=TARGETS),
    "loha": lambda: LoHaConfig(r=4, alpha=8, target_modules=TARGETS, **PATTERNS),
    "lokr": lambda: LoKrConfig(r=2, alpha=8, target_modules=TARGETS),
    "lokr of whole factors": lambda: LoKrConfig(r=64, alpha=8, target_modules=TARGETS),
    "lokr with both factors low": lambda: LoKrConfig(r=1, alpha=8, decompose_both=True, target_modules=TARGETS),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_peft_acts_as_in_peft(name: str, tmp_path: Path) -> None:
    """PEFT writes it and merges it itself; ours reads the folder, or the file in it."""
    model = ace()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    theirs = get_peft_model(ace(), CONFIGS[name]())
    torch.manual_seed(5)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "peft")
    merged = theirs.merge_and_unload().state_dict()
    wanted = {key: merged[key] - before[key] for key in before if not torch.equal(merged[key], before[key])}
    for path in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors"):
        mine = changes(ace(), path)
        assert mine.keys() == wanted.keys() and len(wanted) >= 6
        for key in wanted:
            assert float((mine[key] - wanted[key]).norm() / wanted[key].norm()) < 1e-5, key
    # as the tensors alone, which some hosts hand over, its strength is not known
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert not any(key.endswith("alpha") for key in tensors)


def pair(name: str, rank: int = 2, model: nn.Module | None = None) -> dict[str, Tensor]:
    """A LoRA of one layer under PEFT's suffixes."""
    shape = (model or ace()).get_submodule(Q).weight.shape
    own = torch.Generator().manual_seed(1)
    return {
        f"{name}.lora_A.weight": torch.randn(rank, shape[1], generator=own),
        f"{name}.lora_B.weight": torch.randn(shape[0], rank, generator=own),
    }


def strength(source: Any) -> float:
    """Of the one layer, in parts of up . down."""
    found = changes(ace(), source)[f"{Q}.weight"]
    factors = pair("x")
    whole = factors["x.lora_B.weight"] @ factors["x.lora_A.weight"]
    return float((found * whole).sum() / (whole * whole).sum())


def written(
    folder: Path, tensors: Mapping[str, Tensor], header: dict[str, str] | None = None, config: Any = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "a.safetensors", header)
    if config is not None:
        (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder / "a.safetensors"


def component(name: str, **settings: Any) -> dict[str, str]:
    """diffusers' header."""
    return {"lora_adapter_metadata": json.dumps({f"{name}.{key}": value for key, value in settings.items()})}


LORA: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 5}
KOHYA = f"lycoris_{Q.replace('.', '_')}"


@pytest.mark.parametrize(
    ("name", "header", "config", "wanted"),
    [
        (f"base_model.model.{Q}", None, LORA, 2.5),
        (f"diffusion_model.{Q}", {"alpha": "5"}, None, 2.5),
        (f"diffusion_model.{Q}", {"lora_alpha": "5.0", "alpha": "5"}, None, 2.5),
        (f"transformer.{Q}", component("transformer", r=2, lora_alpha=5), None, 2.5),
        (f"transformer.{Q}", component("transformer", r=2, lora_alpha=5, use_rslora=True), None, 5 / math.sqrt(2)),
        (f"transformer.{Q}", component("unet", r=2, lora_alpha=5), None, 1.0),
        (f"diffusion_model.{Q}", {"ss_network_alpha": "5"}, None, 1.0),  # multiplied in already
        (f"diffusion_model.{Q}", None, {"peft_type": "IA3", "r": 2, "lora_alpha": 5}, 1.0),
        (KOHYA, {"alpha": "5"}, None, 2.5),
        (KOHYA, None, LORA, 1.0),  # PEFT's settings are of PEFT's names
    ],
)  # fmt: skip
def test_strength_that_stands_beside_the_tensors(
    name: str,
    header: dict[str, str] | None,
    config: Any,
    wanted: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = pair(name)
    if name == KOHYA:
        tensors = {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for k, t in tensors.items()}
    file = written(tmp_path, tensors, header, config)
    assert strength(file) == pytest.approx(wanted, rel=1e-5)
    assert show_script.main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert f"scale {wanted:g}" in printed
    assert ("strength by nothing, so it is 1" in printed) == (wanted == 1)


@pytest.mark.parametrize(
    ("alpha", "header", "config", "message"),
    [
        (None, {"alpha": "4"}, LORA, "q_proj is 2.5 by adapter_config.json, but 2 by a number in the header"),
        (4.0, None, LORA, "is 2 by its alpha, but 2.5 by adapter_config.json"),
        (None, {"alpha": "4", "lora_alpha": "5"}, None, "says alpha = 4 and lora_alpha = 5"),
        (None, None, {**LORA, "r": 3}, "has rank 2, but adapter_config.json says 3"),
        (None, None, {**LORA, "lora_alpha": "much"}, "lora_alpha is 'much', which is no strength"),
        (None, None, {**LORA, "lora_alpha": float("nan")}, "lora_alpha is 'nan'"),
        (None, None, {**LORA, "alpha_pattern": [1]}, "its patterns are"),
        (None, None, {**LORA, "alpha_pattern": {"(": 1}}, "is no regular expression"),
        (None, None, {**LORA, "init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4 changed the"),
        (None, None, {**LORA, "layer_replication": [[0, 2]]}, "layer_replication"),
        (None, None, "{", "adapter_config.json cannot be read"),
        (None, None, "[1]", "adapter_config.json holds no settings"),
        (None, None, "\x00", "adapter_config.json cannot be read"),
        (None, {"lora_adapter_metadata": "{"}, None, "lora_adapter_metadata of .* cannot be read"),
        (None, {"alpha": "many"}, None, "alpha is 'many'"),
        (None, {"alpha": "inf"}, None, "alpha is 'inf'"),
    ],
)  # fmt: skip
def test_what_says_the_strength_must_be_readable_and_agree(
    alpha: float | None, header: dict[str, str] | None, config: Any, message: str, tmp_path: Path, capsys: Any
) -> None:
    tensors = pair(f"diffusion_model.{Q}")
    if alpha is not None:
        tensors[f"diffusion_model.{Q}.alpha"] = torch.tensor(alpha)
    file = written(tmp_path, tensors, header, config)
    for door in (lambda: strength(file), lambda: network_of(ace()).load_weights(str(file))):
        with pytest.raises(ValueError, match=message):
            door()
    for script in (show_script, resize_script):
        assert script.main([str(file), *(["--dims", "1"] if script is resize_script else [])]) == 2
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("alpha", "header", "config", "wanted"),
    [
        (0.0, None, {**LORA, "lora_alpha": 2}, 1.0),  # 0 stands for the rank, as everywhere
        (0.0, None, {**LORA, "lora_alpha": 0}, 1.0),
        (4.0, {"alpha": "5"}, None, 2.0),  # a number in the header is for layers without an alpha of their own
        (4.0, {"alpha": "5"}, {**LORA, "lora_alpha": 4}, 2.0),
    ],
)
def test_a_layer_s_own_alpha_decides(
    alpha: float, header: dict[str, str] | None, config: Any, wanted: float, tmp_path: Path
) -> None:
    tensors = pair(f"diffusion_model.{Q}")
    tensors[f"diffusion_model.{Q}.alpha"] = torch.tensor(alpha)
    assert strength(written(tmp_path, tensors, header, config)) == pytest.approx(wanted, rel=1e-5)


def test_an_alpha_in_low_precision_agrees_with_settings(tmp_path: Path) -> None:
    tensors = pair(f"diffusion_model.{Q}")
    tensors[f"diffusion_model.{Q}.alpha"] = torch.tensor(5.013, dtype=torch.bfloat16)
    file = written(tmp_path, tensors, None, {**LORA, "lora_alpha": 5.013})
    assert strength(file) == pytest.approx(2.5, rel=1e-5)  # of the tensor, which is what others read


def test_tensors_alone_say_that_their_strength_is_not_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = written(tmp_path, pair(f"diffusion_model.{Q}"), {"alpha": "5"})
    assert strength(load_file(file)) == pytest.approx(1.0, rel=1e-5)
    assert "no layer has an alpha, so its strength is read as 1; the tensors were handed over alone" in caplog.text
    caplog.clear()
    assert strength(file) == pytest.approx(2.5, rel=1e-5)
    assert "alpha" not in caplog.text


def test_what_is_handed_back_keeps_its_strength_and_is_not_opened_again(tmp_path: Path) -> None:
    """gen_img.py and the trainers give the file's tensors back to merge_to or load_state_dict."""
    file = written(tmp_path, pair(f"diffusion_model.{Q}"), {"alpha": "5"})
    model = ace()
    network, tensors = networks.lora.create_network_from_weights(1.0, str(file), None, None, model)
    assert isinstance(tensors, FileTensors) and tensors.keys() == load_file(file).keys()
    naming = Naming(network.file_format.arch, network.file_format.dialect)
    assert tensors.opened(naming) is tensors.opened(naming)
    for give_back in (lambda: network.load_state_dict(tensors), lambda: network.merge_to(None, model, tensors)):
        network.adapted_layers[0].scale = 9.0
        give_back()
        assert network.adapted_layers[0].scale == pytest.approx(2.5)
    first = tensors.opened(naming)
    tensors[f"diffusion_model.{Q}.lora_B.weight"] = torch.zeros_like(tensors[f"diffusion_model.{Q}.lora_B.weight"])
    assert tensors.opened(naming) is not first and not any(
        t.any() for t in [changes(ace(), tensors).get("x", torch.zeros(1))]
    )


# -- broken values


def network_of(model: nn.Module, module: ModuleType = networks.lora, **kwargs: Any) -> Any:
    made = module.create_network(1.0, kwargs.pop("dim", 2), 1, None, None, model, **kwargs)
    made.apply_to(None, model, False, True)
    return made


BROKEN = {
    "a factor": ({}, "lora_up.weight"),
    "alpha": ({}, "alpha"),
    "a magnitude": ({"use_dora": "True"}, "dora_scale"),
    "a bias": ({"algo": "full"}, "diff_b"),
    "a norm": ({"algo": "norm", "train_norm": "True"}, "w_norm"),
    "the bias of a norm": ({"algo": "norm", "train_norm": "True"}, "b_norm"),
    "a rotation": ({"algo": "diag-oft"}, "oft_blocks"),
}


@pytest.mark.parametrize(("what", "value"), zip(BROKEN, [math.nan, math.inf, -math.inf] * 3, strict=False))
def test_values_that_are_not_finite_are_met_at_every_door(
    what: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kwargs, suffix = BROKEN[what]
    made = network_of(sd_unet(), **kwargs)
    made.save_weights(tmp_path / "good.safetensors", None, {})
    tensors = load_file(tmp_path / "good.safetensors")
    key = [key for key in tensors if key.endswith(f".{suffix}")][-1]
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[-1] = value
    bad = tmp_path / "bad.safetensors"
    save_file(tensors, bad)
    save_file({f"x.{n}": t for n, t in sd_unet().state_dict().items()}, tmp_path / "model.safetensors")
    name = key.partition(".")[0]
    utils = ModuleType("lora_utils")
    exec(LOADER, vars(utils))
    key_merge.extend(utils)
    doors: dict[str, Callable[[], Any]] = {
        "load_weights": lambda: network_of(sd_unet(), **kwargs).load_weights(str(bad)),
        "load_state_dict": lambda: network_of(sd_unet(), **kwargs).load_state_dict(tensors),
        "from weights": lambda: networks.lora.create_network_from_weights(1.0, str(bad), None, None, sd_unet()),
        "from tensors": lambda: networks.lora.create_network_from_weights(
            1.0, None, None, None, sd_unet(), weights_sd=tensors
        ),
        "musubi's": lambda: networks.lora.create_arch_network_from_weights(1.0, tensors, unet=sd_unet()),
        "one weight": lambda: key_merge.merge_weights_to_tensor(
            torch.zeros(4, 4), name, tensors, set(tensors), 1.0, "cpu"
        ),
        "by key": lambda: utils.load_safetensors_with_lora_and_fp8([], [tensors], [1.0], calc_device="cpu"),
    }
    for door, call in doors.items():
        with pytest.raises(ValueError, match=f"{name}: {suffix} has NaN or infinite values") as caught:
            call()
        assert "\n" not in str(caught.value), door
    (tmp_path / "out").mkdir()
    for script, arguments in (
        (merge_main, [str(tmp_path / "model.safetensors"), str(bad), "--out", str(tmp_path / "out" / "m.safetensors")]),
        (show_script.main, [str(bad)]),
        (resize_script.main, [str(bad), "--dims", "1", "--out_dir", str(tmp_path / "out")]),
    ):
        capsys.readouterr()
        assert script(arguments) == 2
        assert f"{name}: {suffix} has NaN or infinite values" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


LOADER = """
def load_safetensors_with_fp8_optimization_and_hook(files, weight_hook=None):
    return {}
def load_safetensors_with_lora_and_fp8(files, lora_weights_list, lora_multipliers, calc_device):
    return load_safetensors_with_fp8_optimization_and_hook(files, weight_hook=None)
"""


# -- layers without a place


NONE = Allowance()


def judged(file: list[str], placed: list[str], held: set[str], known: set[str], allowed: Allowance = NONE) -> Any:
    return places.find_missing(dict.fromkeys(file, "linear"), placed, held, known, (), allowed, "F")


BLOCKS = [f"lora_unet_blocks_{i}_{kind}" for i in range(10) for kind in ("attn_q", "attn_k", "mlp")]
ENCODER = [f"lora_te1_layers_{i}_{kind}" for i in range(3) for kind in ("q", "fc1")]
PARTS = {"lora_unet", "lora_te1", "lora_te2"}


def test_a_tenth_a_kind_and_a_part() -> None:
    """The rule by hand-written lists."""
    all_held = PARTS
    assert judged(BLOCKS, BLOCKS, all_held, PARTS) == places.Missing()
    three = [*BLOCKS[:1], *BLOCKS[4:5], *BLOCKS[8:9]]  # of three kinds and three blocks: a tenth exactly
    kept = [name for name in BLOCKS if name not in three]
    assert judged(BLOCKS, kept, all_held, PARTS).names == tuple(three)
    assert "3 of its layers have no place here (3 lora_unet: " in judged(BLOCKS, kept, all_held, PARTS).warning()
    with pytest.raises(
        ValueError, match="F: 4 of its 30 layers have no place here .*, more than 10%.*allow_missing=True"
    ):
        judged(BLOCKS, kept[1:], all_held, PARTS)
    many = BLOCKS + [f"lora_unet_blocks_{i}_{k}" for i in range(10) for k in "abcdefghijklmnopq"] + ["lora_unet_in"]
    assert judged(many, [n for n in many if n != "lora_unet_in"], all_held, PARTS).names == ("lora_unet_in",)
    with pytest.raises(ValueError, match="10 of its 201 layers .* among them all like lora_unet_blocks_N_attn_q"):
        judged(many, [n for n in many if not n.endswith("attn_q")], all_held, PARTS)
    with pytest.raises(ValueError, match="among them all of part lora_te1"):
        judged([*many, *ENCODER], many, all_held, PARTS)
    families = {name: "norm" if "attn_k" in name else "linear" for name in BLOCKS}
    with pytest.raises(ValueError, match="all like"):
        places.find_missing(families, [n for n in BLOCKS if "attn_k" not in n], all_held, PARTS, (), NONE, "F")
    odd = {f"lora_unet_{name}": "norm" if name in ("x", "y") else "linear" for name in "abcdefghijklmnopqrstuvwxyz"}
    with pytest.raises(ValueError, match="among them all of kind norm"):
        places.find_missing(odd, [n for n in odd if odd[n] != "norm"], all_held, PARTS, (), NONE, "F")


def test_parts_that_a_call_does_not_hold_are_a_count() -> None:
    found = judged([*BLOCKS, *ENCODER], BLOCKS, {"lora_unet"}, PARTS)
    assert not found.names and found.elsewhere == tuple(sorted(ENCODER))
    assert found.counted() == "6 of its layers are for models that are not here (6 of lora_te1)"
    with pytest.raises(ValueError, match="all of part lora_te3"):  # no model of this architecture at all
        judged([*BLOCKS, "lora_te3_q"], BLOCKS, {"lora_unet"}, PARTS)


def test_leave_for_everything_or_for_a_part() -> None:
    whole = [*BLOCKS, *ENCODER]
    for allowed in (Allowance(True), Allowance.given([""], "-"), Allowance.given(["lora_te1"], "-")):
        assert len(judged(whole, BLOCKS, PARTS, PARTS, allowed).names) == 6
    with pytest.raises(ValueError, match="--allow_missing goes on"):
        judged(whole, BLOCKS, PARTS, PARTS, Allowance.given(["lora_te2"], "--allow_missing"))
    assert Allowance.given(None, "-") == Allowance(remedy="-")


def test_the_trainers_doors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of the whole UNet and an encoder, for networks that have less."""
    unet, encoder = sd_unet(), text_encoder()
    large = networks.lora.create_network(1.0, 2, 1, None, encoder, unet)
    large.save_weights(tmp_path / "large.safetensors", None, None)
    path, tensors = str(tmp_path / "large.safetensors"), load_file(tmp_path / "large.safetensors")
    caplog.clear()  # what programs make of the file
    caplog.set_level(logging.WARNING, logger="networks")
    only_unet = networks.lora.create_network(1.0, 2, 1, None, encoder, unet)
    only_unet.apply_to(encoder, unet, False, True)  # --network_train_unet_only
    assert only_unet.load_weights(path).without.counted().endswith("(12 of lora_te)")
    assert "large.safetensors" not in caplog.text
    asked = network_of(unet, only_patterns=".*attn1.*").load_weights(path).without
    assert len(asked.unwanted) == 32 and not asked.names and "32 of its layers are left out by the" in asked.counted()
    strange = {key.replace("attn1_to_q", "attn1_to_qq"): tensor for key, tensor in tensors.items()}
    save_file(strange, tmp_path / "large.safetensors")
    for call in (
        lambda **more: network_of(unet, **more).load_weights(path),
        lambda **more: network_of(unet, **more).load_state_dict(strange, False),
        lambda **more: networks.lora.create_network_from_weights(1.0, path, None, encoder, unet, **more),
    ):
        with pytest.raises(ValueError, match="have no place here .*among them all like .*allow_missing=True"):
            call()
        caplog.clear()
        call(allow_missing="True")
        told = [r.getMessage() for r in caplog.records if "layers have no place here" in r.getMessage()]
        assert len(told) == 1 and "4 of its layers have no place here (4 lora_unet: 4 attn1_to_qq; e.g. " in told[0]


def test_the_scripts_doors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A UNet alone, a UNet with an encoder that nobody knows, and a file for both."""
    unet, encoder = sd_unet(), text_encoder()
    both = networks.lora.create_network(1.0, 2, 1, None, encoder, unet)
    both.save_weights(tmp_path / "a.safetensors", None, None)
    weights = {f"model.diffusion_model.{n}": t for n, t in unet.state_dict().items()}
    save_file(weights, tmp_path / "unet.safetensors")
    save_file({**weights, "cond_stage_model.strange.weight": torch.ones(4)}, tmp_path / "both.safetensors")

    def merge(model: str, *more: str) -> tuple[int, str, str]:
        out = tmp_path / f"{model}-out.safetensors"
        out.unlink(missing_ok=True)
        code = merge_main([str(tmp_path / model), str(tmp_path / "a.safetensors"), "--out", str(out), *more])
        assert out.exists() == (code == 0)
        return code, *capsys.readouterr()

    code, out, _ = merge("unet.safetensors")
    assert code == 0 and "12 of its layers are for models that are not here (12 of lora_te)" in out
    code, _, err = merge("both.safetensors")
    assert code == 2 and "among them all of part lora_te: " in err and "--allow_missing goes on" in err
    for more in (["--allow_missing"], ["--allow-missing=lora_te"], ["--allow_missing=lora_te1", "--allow-missing"]):
        code, out, err = merge("both.safetensors", *more)
        assert code == 0 and "left out, a.safetensors has it, the checkpoint has no such weight: 12, lora_te" in out
    assert merge("both.safetensors", "--allow_missing=lora_unet")[0] == 2
    assert merge("unet.safetensors", "--strict")[0] == 2


# -- magnitudes, RS-LoRA

FORMS = ("portable", "blissful", "comfyui", "diffusers")


def magnitudes(form: str, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A DoRA file in a dialect."""
    made = network_of(toy("qwen_image", blocks=1)["dit"], save_format=form, use_dora="True")
    randomise(made)
    made.save_weights(tmp_path / f"{form}.safetensors", None, {})
    return tmp_path / f"{form}.safetensors", load_file(tmp_path / f"{form}.safetensors")


@pytest.mark.parametrize("form", FORMS)
def test_magnitudes_follow_one_rule_in_every_dialect(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, tensors = magnitudes(form, tmp_path)
    words = ("dora_scale", "dora_layer", "magnitude_vector", "dora_flag")
    plain = {key: t for key, t in tensors.items() if not any(word in key for word in words)}
    save_file(plain, tmp_path / "plain.safetensors")
    first = next(key for key in tensors if any(word in key for word in words[:3]))
    save_file({k: t for k, t in tensors.items() if k != first}, tmp_path / "some.safetensors")

    dit = toy("qwen_image", blocks=1)["dit"]

    def doors(file: Path, **kwargs: Any) -> list[Callable[[], Any]]:
        make = lambda: network_of(toy("qwen_image", blocks=1)["dit"], **kwargs)  # noqa: E731
        follow, like_musubi = networks.lora.create_network_from_weights, networks.lora.create_arch_network_from_weights
        return [
            lambda: make().load_weights(str(file)),
            lambda: make().load_state_dict(load_file(file), False),
            lambda: (n := make()).merge_to(None, None, load_file(file)) or n,
            lambda: follow(1.0, str(file), None, None, dit, **kwargs)[0],
            lambda: follow(1.0, None, None, None, dit, load_file(file), **kwargs)[0],
            lambda: like_musubi(1.0, load_file(file), None, dit, **kwargs),
        ]

    for call in doors(tmp_path / "plain.safetensors", use_dora="True"):
        with pytest.raises(ValueError, match="this network expects DoRA but .* has no magnitudes"):
            call()
    for call in doors(tmp_path / "some.safetensors", use_dora="True"):
        with pytest.raises(ValueError, match=r"no DoRA magnitude for 1 of \d+ layers"):
            call()
    count = sum(any(word in key for word in words[:3]) for key in tensors)
    layers = len(network_of(toy("qwen_image", blocks=1)["dit"]).layers)
    assert layers == count
    follows = doors(path)[3:]
    assert all(layer.side for call in follows for layer in call().adapted_layers) and "mismatch" not in caplog.text
    for call in (*doors(path)[:3], *doors(path, use_dora="False")):
        caplog.clear()
        call()
        told = [
            r.getMessage() for r in caplog.records if "DoRA" in r.getMessage() and "flag mismatch" in r.getMessage()
        ]
        assert len(told) == 1 and f"magnitudes for {count} layers" in told[0] and "add use_dora=True" in told[0]


def test_a_plain_network_takes_the_rest_of_a_dora_file(tmp_path: Path) -> None:
    path, tensors = magnitudes("portable", tmp_path)
    made = network_of(toy("qwen_image", blocks=1)["dit"])
    made.load_weights(str(path))
    for layer in made.adapted_layers:
        up, down = (tensors[f"{layer.lora_name}.lora_{end}.weight"] for end in ("up", "down"))
        wanted = up @ down * (float(tensors[f"{layer.lora_name}.alpha"]) / down.shape[0])
        zero = torch.zeros_like(wanted)
        torch.testing.assert_close(layer.new_weight(zero), wanted, rtol=1e-5, atol=1e-6)


def test_rs_lora_flags_have_one_verdict(tmp_path: Path) -> None:
    """inputs: a file with the flag, networks that say otherwise; a network made from the file follows it."""
    dit = lambda: toy("qwen_image", blocks=1)["dit"]  # noqa: E731
    made = network_of(dit(), save_format="blissful", use_rslora="True", dim=4)
    randomise(made)
    made.save_weights(tmp_path / "rs.safetensors", None, {})
    file = tmp_path / "rs.safetensors"
    takes: tuple[Callable[[Any], Any], ...] = (
        lambda n: n.load_weights(str(file)),
        lambda n: n.load_state_dict(load_file(file)),
        lambda n: n.merge_to(None, None, load_file(file)),
    )
    for kwargs in ({"save_format": "blissful"}, {}):
        for call in takes:
            with pytest.raises(ValueError, match="RS-LoRA flag mismatch"):
                call(network_of(dit(), dim=4, **kwargs))
    create, of_file = networks.lora.create_arch_network_from_weights, networks.lora.create_network_from_weights
    follow: tuple[Callable[..., Any], ...] = (
        lambda **kwargs: create(1.0, load_file(file), unet=dit(), **kwargs),
        lambda **kwargs: of_file(1.0, str(file), None, None, dit(), **kwargs),
        lambda **kwargs: of_file(1.0, None, None, None, dit(), load_file(file), **kwargs),
    )
    for door in follow:
        with pytest.raises(ValueError, match="RS-LoRA flag mismatch.*give use_rslora=True"):
            door(use_rslora="False")
    again = create(1.0, load_file(file), unet=dit(), save_format="blissful")
    again.save_weights(tmp_path / "again.safetensors", None, {})
    theirs, ours = load_file(file), load_file(tmp_path / "again.safetensors")
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    # The flag is lost, and most alphas are the root of their rank.
    lost = {key: torch.tensor(2.0) if key.endswith(".alpha") else t for key, t in load_file(file).items()}
    save_file({key: t for key, t in lost.items() if "flag" not in key}, file)
    rs_lora = {"save_format": "blissful", "use_rslora": "True"}
    for door in (*(lambda call=call: call(network_of(dit(), dim=4, **rs_lora)) for call in takes),
                 *(lambda door=door: door(**rs_lora) for door in follow)):  # fmt: skip
        with pytest.raises(ValueError, match=r"says nothing of RS-LoRA.* Hint: (\d+) of \1 alphas are the square root"):
            door()


# -- values that nobody knows, and keys that are no adapter


def test_magnitudes_of_ai_toolkit_are_read() -> None:
    """`X.magnitude` beside lora_A and lora_B: DoRA of output rows."""
    model = ace()
    tensors = pair(f"diffusion_model.{Q}")
    rows = tensors[f"diffusion_model.{Q}.lora_B.weight"].shape[0]
    magnitude = torch.rand(rows) + 0.5
    W = model.get_submodule(Q).weight.detach().clone().double()
    V = W + (
        tensors[f"diffusion_model.{Q}.lora_B.weight"].double() @ tensors[f"diffusion_model.{Q}.lora_A.weight"].double()
    )
    wanted = V * (magnitude.double() / V.norm(dim=1))[:, None] - W
    found = changes(model, {**tensors, f"diffusion_model.{Q}.magnitude": magnitude})[f"{Q}.weight"]
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_an_unknown_value_of_a_known_layer_is_an_error_with_its_name(tmp_path: Path, capsys: Any) -> None:
    """Dots in the name or not; the layer is told, not what stands before the first dot."""
    for name, shown in ((f"diffusion_model.{Q}", KOHYA), (KOHYA, KOHYA)):
        tensors = pair(name)
        if name == KOHYA:
            tensors = {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for k, t in tensors.items()}
        tensors[f"{name}.gate.weight"] = torch.ones(2)
        for call in (partial(changes, ace(), tensors), partial(network_of(ace()).load_state_dict, tensors, False)):
            with pytest.raises(ValueError, match=f"{shown} has gate.weight, a form which this version does not know"):
                call()
        save_file(tensors, tmp_path / "a.safetensors")
        assert show_script.main([str(tmp_path / "a.safetensors")]) in (0, 2)
        printed = capsys.readouterr()
        assert f"{name} has gate.weight, a form which this version does not know" in printed.out + printed.err


def test_keys_that_are_no_adapter_stop_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = network_of(sd_unet())
    randomise(made)
    made.save_weights(tmp_path / "a.safetensors", None, {})
    strays = {"bundle_emb.word.clip_l": torch.ones(2, 8), "step": torch.tensor(3)}
    save_file({**load_file(tmp_path / "a.safetensors"), **strays}, tmp_path / "b.safetensors")
    report = network_of(sd_unet()).load_weights(str(tmp_path / "b.safetensors"))
    assert "2 keys are no adapter, e.g. bundle_emb.word.clip_l" in str(report)
    save_file({n: t.clone() for n, t in sd_unet().state_dict().items()}, tmp_path / "model.safetensors")
    arguments = [str(tmp_path / f"{n}.safetensors") for n in ("model", "b")]
    assert merge_main([*arguments, "--out", str(tmp_path / "m.safetensors")]) == 0
    assert "2 keys are no adapter" in capsys.readouterr().out
    assert resize_script.main([str(tmp_path / "b.safetensors"), "--dims", "1"]) == 0
    smaller = load_file(tmp_path / "b-0001.safetensors")
    assert all(torch.equal(smaller[key], tensor) for key, tensor in strays.items())
    assert show_script.main([str(tmp_path / "b.safetensors")]) == 0
    assert "not read: bundle_emb.word.clip_l" in capsys.readouterr().out


def test_resize_keeps_dotted_names(tmp_path: Path) -> None:
    """A file of diffusers or PEFT comes out under its own names, with the strength that it has."""
    tensors = pair(f"transformer.{Q}", rank=4)
    file = written(tmp_path, tensors, {"alpha": "2"})
    assert resize_script.main([str(file), "--dims", "2"]) == 0
    smaller = load_file(tmp_path / "a-0002.safetensors")
    stem = f"transformer.{Q}"
    assert smaller.keys() == {f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"}  # the strength is in the factors
    assert "alpha" not in read_header(tmp_path / "a-0002.safetensors").metadata
    whole = tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double() * 0.5
    u, s, vh = torch.linalg.svd(whole)
    nearest = u[:, :2] * s[:2] @ vh[:2]
    low = smaller[f"{stem}.lora_B.weight"].double() @ smaller[f"{stem}.lora_A.weight"].double()
    torch.testing.assert_close(low, nearest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("transformer.blocks.0.attn1.to_q", "names of Wan 2.1 / 2.2 as diffusers has them"),
        ("diffusion_model.layers.0.attention.qkv", "names of Z-Image as ComfyUI has them"),
        ("lora_unet_down_blocks_1_attentions_0_proj_in", "names of Stable Diffusion XL as diffusers has them"),
        ("somewhere.else", "somewhere.else, "),
    ],
)
def test_names_of_another_model_are_told(name: str, words: str, tmp_path: Path) -> None:
    """At both doors: what the file has, and whose names these are."""
    tensors = pair(name)
    model = toy("flux")["dit"]
    made = networks.lora_flux.create_network(1.0, 2, 1, None, None, model)
    for call in (
        lambda: made.load_weights(str(written(tmp_path, tensors))),
        lambda: networks.lora_flux.create_network_from_weights(1.0, str(written(tmp_path, tensors)), None, None, model),
    ):
        with pytest.raises(ValueError, match=f"names like {name}") as error:
            call()
        assert words in str(error.value)
