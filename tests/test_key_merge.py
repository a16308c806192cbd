"""Merging by key while a trainer loads its weights: the numbers of our formula, for every form of file."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import randomise
from torch import Tensor
from toy_models import signal, toy

import networks.loha
import networks.lokr
import networks.lora_flux
from networks.files import places
from networks.hosts import key_merge

LAUNCH = Path(__file__).resolve().parents[1] / "scripts" / "launch.py"
SHAPES = {"q": (24, 36), "mlp": (48, 24), "last": (64, 64), "conv": (16, 8, 3, 3)}
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed)) * 0.3


def kron(w1: Tensor, w2: Tensor) -> Tensor:
    """torch.kron over the first two axes; further ones belong to w2."""
    if w2.dim() == 2:
        return torch.kron(w1, w2)
    return torch.stack([torch.kron(w1, w2[:, :, i, j]) for i in range(3) for j in range(3)], -1).unflatten(-1, (3, 3))


def lokr(whole1: bool, whole2: bool, left: tuple[int, int], right: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of rank 2 and alpha 3 with suffixes, and their scaled product in float64."""
    w1, w2 = random(*left, seed=1), random(*right, seed=2)
    a1, b1, a2, b2 = random(left[0], 2, seed=3), random(2, left[1], seed=4), random(right[0], 2), random(2, right[1])
    tensors = {"lokr_w1": w1} if whole1 else {"lokr_w1_a": a1, "lokr_w1_b": b1}
    tensors |= {"lokr_w2": w2} if whole2 else {"lokr_w2_a": a2, "lokr_w2_b": b2}
    scale = 1.0 if whole1 and whole2 else 1.5
    exact = kron(
        w1.double() if whole1 else a1.double() @ b1.double(), w2.double() if whole2 else a2.double() @ b2.double()
    )
    return {**tensors, "alpha": torch.tensor(3.0)}, exact * scale


def loha(rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    a, b, c, d = random(rows, 2), random(2, columns), random(rows, 2, seed=5), random(2, columns, seed=6)
    tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(3.0)}
    return tensors, (a.double() @ b.double()) * (c.double() @ d.double()) * 1.5


FORMS: dict[str, tuple[str, Callable[[], tuple[dict[str, Tensor], Tensor]]]] = {
    "whole": ("q", lambda: lokr(True, True, (4, 6), (6, 6))),
    "low rank w2": ("last", lambda: lokr(True, False, (8, 8), (8, 8))),
    "low rank w1": ("mlp", lambda: lokr(False, True, (8, 4), (6, 6))),
    "both low rank": ("last", lambda: lokr(False, False, (8, 8), (8, 8))),
    "convolution": ("conv", lambda: lokr(True, True, (4, 2), (4, 4, 3, 3))),
    "loha": ("q", lambda: loha(24, 36)),
}


def nearest_value(exact: Tensor, dtype: torch.dtype) -> Tensor:
    return exact.float().to(dtype).float()


def check(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """As near as one rounding to the dtype; fp32 sums may differ in their last bits from float64."""
    assert found.dtype == dtype
    spacing = torch.finfo(dtype).eps * exact.abs().max()
    difference = (found.float() - nearest_value(exact, dtype)).abs()
    assert difference.max() <= spacing and (difference > 0).float().mean() < (1.0 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_function_which_trainers_call(form: str, dtype: torch.dtype) -> None:
    name, make = FORMS[form]
    tensors, delta = make()
    file = {f"lora_unet_{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    file |= {"lora_unet_q_other.lokr_w1": random(2, 2), "lora_unet_q_other.lokr_w2": random(2, 2)}
    keys = set(file)
    weight = random(*SHAPES[name], seed=9).to(dtype)
    merge = networks.loha.merge_weights_to_tensor if form == "loha" else networks.lokr.merge_weights_to_tensor
    merged = merge(weight, f"lora_unet_{name}", file, keys, -0.7, torch.device("cpu"))
    check(merged, weight.to(torch.float32).double() - 0.7 * delta, dtype)
    assert keys == {"lora_unet_q_other.lokr_w1", "lora_unet_q_other.lokr_w2"}
    again = merge(weight, f"lora_unet_{name}", file, keys, -0.7, "cpu")
    assert again is weight  # its keys are used up


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)], ids=str)
def test_fp8_saturates_instead_of_overflowing(dtype: torch.dtype, largest: float) -> None:
    weight = torch.full((2, 2), largest).to(dtype)
    file = {"a.lokr_w1": torch.ones(1, 1), "a.lokr_w2": torch.tensor([[1.0, -4.0], [-2.0, 0.0]]) * largest}
    merged = networks.lokr.merge_weights_to_tensor(weight, "a", file, set(file), 1.0, "cpu")
    assert merged.float().tolist() == [[largest, -largest], [-largest, largest]]


# ---- a trainer's loader, in the shape which sd-scripts and musubi-tuner share ----

LORA_UTILS = """
from glob import glob
import torch
from safetensors.torch import load_file

def load_safetensors_with_fp8_optimization_and_hook(model_files, fp8, device, weight_hook=None):
    result = {}
    weights = {key: value for file in model_files for key, value in load_file(file).items()}
    for key, value in weights.items():
        result[key] = weight_hook(key, value, keep_on_calc_device=False) if weight_hook else value
    return result

def load_safetensors_with_lora_and_fp8(model_files, lora_weights_list, lora_multipliers, fp8, calc_device):
    files = lora_weights_list or []
    model_files = sorted(glob(model_files.replace("-00001-of-", "-0000?-of-")))
    assert len(lora_multipliers or []) == len(files)
    def hook(key, weight, keep_on_calc_device=False):
        name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        for file, multiplier in zip(files, lora_multipliers):
            if name + ".lora_down.weight" in file:
                raise AssertionError("the trainer's own merge")
        return weight
    return load_safetensors_with_fp8_optimization_and_hook(
        model_files, fp8, calc_device, weight_hook=hook if files else None
    )
"""


@pytest.fixture
def trainer() -> ModuleType:
    module = ModuleType("lora_utils")
    exec(LORA_UTILS, vars(module))
    key_merge.extend(module)
    return module


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    weights = {f"{name}.weight": random(*shape, seed=9) for name, shape in SHAPES.items()}
    weights["deep.er.q.weight"], weights["q.bias"] = random(24, 36), random(24)
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", weights


def one_file(prefix: str = "lora_unet_") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file with several forms, and what it adds."""
    file, deltas = {}, {}
    for form, name in (
        ("whole", "deep_er_q"),
        ("low rank w1", "mlp"),
        ("both low rank", "last"),
        ("convolution", "conv"),
    ):
        tensors, delta = FORMS[form][1]()
        file |= {f"{prefix}{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
        deltas[name.replace("_", ".") + ".weight"] = delta
    return file, deltas


def load(trainer: ModuleType, path: Path, files: Any, multipliers: Any) -> dict[str, Tensor]:
    return trainer.load_safetensors_with_lora_and_fp8(str(path), files, multipliers, False, torch.device("cpu"))


@pytest.mark.parametrize("prefix", ["lora_unet_", ""])
def test_several_files_and_plain_layers(
    trainer: ModuleType, model: tuple[Path, dict[str, Tensor]], prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, weights = model
    first, deltas = one_file(prefix)
    tensors, hada = loha(24, 36)
    second = {f"{prefix}deep_er_q.{suffix}": tensor for suffix, tensor in tensors.items()}
    up, down = random(24, 2, seed=7), random(2, 36, seed=8)
    second |= {"lora_unet_q.lora_up.weight": up, "lora_unet_q.lora_down.weight": down}
    with caplog.at_level(logging.INFO):
        found = load(trainer, path, [first, second], [0.7, -0.4])
    exact = {key: value.double() for key, value in weights.items()}
    for key, delta in deltas.items():
        exact[key] += 0.7 * delta
    exact["deep.er.q.weight"] += -0.4 * hada
    exact["q.weight"] += -0.4 * up.double() @ down.double()
    assert found.keys() == exact.keys() and torch.equal(found["q.bias"], weights["q.bias"])
    for key in exact:
        torch.testing.assert_close(found[key].double(), exact[key], rtol=1e-6, atol=1e-6)
    assert "adapter file 1 of 2: 4 layers (lokr) merged at 0.7" in caplog.text
    assert "adapter file 2 of 2: 2 layers (loha, lora) merged at -0.4" in caplog.text


def test_flagged_files_are_ours(trainer: ModuleType, model: tuple[Path, dict[str, Tensor]]) -> None:
    """Plain keys, but alpha is raw: the scale is alpha / sqrt(rank), which no trainer's own merge knows."""
    up, down = random(24, 4, seed=7), random(4, 36, seed=8)
    file = {"lora_unet_q.lora_up.weight": up, "lora_unet_q.lora_down.weight": down}
    file |= {"lora_unet_q.alpha": torch.tensor(3.0), "use_rslora_flag": torch.tensor(1.0)}
    found = load(trainer, model[0], [file], [0.7])["q.weight"]
    exact = model[1]["q.weight"].double() + 0.7 * 3 / 2 * up.double() @ down.double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


def test_dora(trainer: ModuleType, model: tuple[Path, dict[str, Tensor]]) -> None:
    """Magnitudes of the output rows; the strength is linear from W to W'."""
    up, down, magnitude = random(24, 4, seed=7), random(4, 36, seed=8), random(24, 1).abs() + 1
    file = {"lora_unet_q.lora_up.weight": up, "lora_unet_q.lora_down.weight": down, "lora_unet_q.dora_scale": magnitude}
    found = load(trainer, model[0], [file], [0.7])["q.weight"]
    base = model[1]["q.weight"].double()
    moved = base + up.double() @ down.double()
    whole = moved / moved.norm(dim=1, keepdim=True) * magnitude
    torch.testing.assert_close(found.double(), base + 0.7 * (whole - base), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_plain_files(trainer: ModuleType, tmp_path: Path, prefix: str) -> None:
    """By alpha / rank, also where the checkpoint's keys have a prefix, which the trainers strip too late."""
    weight, up, down = random(24, 36, seed=9), random(24, 4, seed=7), random(4, 36, seed=8)
    save_file({f"{prefix}a.q.weight": weight}, tmp_path / "model.safetensors")
    file = {"lora_unet_a_q.lora_up.weight": up, "lora_unet_a_q.lora_down.weight": down}
    for alpha, scale in ((torch.tensor(3.0), 0.75), (None, 1.0)):
        given = file if alpha is None else {**file, "lora_unet_a_q.alpha": alpha}
        found = load(trainer, tmp_path / "model.safetensors", [given], [0.7])[f"{prefix}a.q.weight"]
        exact = weight.double() + 0.7 * scale * up.double() @ down.double()
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_files_are_merged_in_their_order(
    trainer: ModuleType, model: tuple[Path, dict[str, Tensor]], order: tuple[int, int]
) -> None:
    """What DoRA makes of a weight depends on it, so a plain file before it is another result than one after it."""
    up, down, magnitude = random(24, 4, seed=7), random(4, 36, seed=8), random(24, 1).abs() + 1
    plain = {"lora_unet_q.lora_up.weight": random(24, 2, seed=5), "lora_unet_q.lora_down.weight": random(2, 36, seed=6)}
    dora = {"lora_unet_q.lora_up.weight": up, "lora_unet_q.lora_down.weight": down, "lora_unet_q.dora_scale": magnitude}
    files = [plain, dora]
    found = load(trainer, model[0], [files[i] for i in order], [0.7, 0.7])["q.weight"]
    exact = model[1]["q.weight"].double()
    for file in (files[i] for i in order):
        new = exact + file["lora_unet_q.lora_up.weight"].double() @ file["lora_unet_q.lora_down.weight"].double()
        if file is dora:
            new = new / new.norm(dim=1, keepdim=True) * magnitude
        exact = exact + 0.7 * (new - exact)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


D = 16
Pairs = dict[str, tuple[Tensor, Tensor]]


def pairs(layers: dict[str, int]) -> Pairs:
    """Name of a layer, rows -> factors of rank 2."""
    return {name: (random(2, D, seed=i), random(rows, 2, seed=9 + i)) for i, (name, rows) in enumerate(layers.items())}


def as_file(found: Pairs, down: str = "lora_A.weight", up: str = "lora_B.weight") -> dict[str, Tensor]:
    return {f"{n}.{s}": t for n, both in found.items() for s, t in zip((down, up), both, strict=True)}


def test_names_of_diffusers_on_fused_layers(trainer: ModuleType, tmp_path: Path) -> None:
    """Projections are rows of the trainer's layer, one that the file lacks changes nothing; a bias follows its rows."""
    key = "double_blocks.0.img_attn.qkv"
    weights = {f"{key}.weight": random(3 * D, D, seed=5), f"{key}.bias": random(3 * D), "img_in.weight": random(D, 4)}
    weights["single_blocks.0.linear1.weight"] = random(7 * D, D, seed=6)
    save_file(weights, tmp_path / "model.safetensors")
    blocks = "transformer.transformer_blocks.0.attn.to_", "transformer.single_transformer_blocks.0."
    found = pairs({blocks[0] + "q": D, blocks[0] + "v": D, blocks[1] + "proj_mlp": 4 * D, blocks[1] + "attn.to_k": D})
    merged = load(trainer, tmp_path / "model.safetensors", [as_file(found)], [0.7])
    deltas = {name: 0.7 * up.double() @ down.double() for name, (down, up) in found.items()}
    exact = {name: weight.double().clone() for name, weight in weights.items()}
    exact[f"{key}.weight"][:D] += deltas[blocks[0] + "q"]
    exact[f"{key}.weight"][2 * D :] += deltas[blocks[0] + "v"]
    exact["single_blocks.0.linear1.weight"][D : 2 * D] += deltas[blocks[1] + "attn.to_k"]
    exact["single_blocks.0.linear1.weight"][3 * D :] += deltas[blocks[1] + "proj_mlp"]
    for name, weight in exact.items():
        torch.testing.assert_close(merged[name].double(), weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("names", ["diffusion_model.{}", "lora_unet__{}", "lora_unet_{}", "{}"])
def test_comfyuis_fused_projections(trainer: ModuleType, tmp_path: Path, names: str) -> None:
    """Z-Image, on the trainer's separate projections, in a model of two files."""
    where = "layers.{}.attention."
    weights = {f"{where.format(i)}{x}.weight": random(D, D, seed=i) for i in (0, 1) for x in ("to_q", "to_k", "to_v")}
    weights |= {f"{where.format(i)}to_out.0.weight": random(D, D, seed=i) for i in (0, 1)}
    for i in (0, 1):
        part = {key: weight for key, weight in weights.items() if key.startswith(f"layers.{i}.")}
        save_file(part, tmp_path / f"model-0000{i + 1}-of-00002.safetensors")
    layers = pairs({f"{where.format(i)}{x}": rows for i in (0, 1) for x, rows in (("qkv", 3 * D), ("out", D))})
    flat = "_" in names
    given = {
        names.format(n.replace(".", "_") if flat and "diffusion" not in names else n): p for n, p in layers.items()
    }
    merged = load(
        trainer,
        tmp_path / "model-00001-of-00002.safetensors",
        [as_file(given, "lora_down.weight", "lora_up.weight")],
        [1.0],
    )
    assert merged.keys() == weights.keys()
    for key, weight in merged.items():
        head, _, last = key.removesuffix(".weight").partition(".attention.")
        down, up = layers[f"{head}.attention.{'out' if last == 'to_out.0' else 'qkv'}"]
        at = {"to_q": 0, "to_k": 1, "to_v": 2, "to_out.0": 0}[last]
        exact = weights[key].double() + (up.double() @ down.double())[at * D : (at + 1) * D]
        torch.testing.assert_close(weight.double(), exact, rtol=1e-6, atol=1e-6)


def test_without_adapters_nothing_is_touched(trainer: ModuleType, model: tuple[Path, dict[str, Tensor]]) -> None:
    for files in (None, []):
        found = load(trainer, model[0], files, None)
        assert all(torch.equal(found[key], value) for key, value in model[1].items())


def test_a_hook_of_the_trainer_comes_first(model: tuple[Path, dict[str, Tensor]]) -> None:
    """A loader that changes every weight as it reads it: what is merged goes on top of that, and is not changed."""
    module, (path, weights) = ModuleType("lora_utils"), model
    exec(
        LORA_UTILS.replace("weight_hook=hook if files else None", "weight_hook=lambda key, w, **_: 3 * w"), vars(module)
    )
    key_merge.extend(module)
    file, deltas = one_file()
    found = load(module, path, [file], [0.7])
    for key, weight in weights.items():
        exact = 3 * weight.double() + (0.7 * deltas[key] if key in deltas else 0)
        torch.testing.assert_close(found[key].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("given", "used"), [(0.5, 0.5), (None, 1.0), ([], 1.0), ([0.5, 3.0], 0.5)])
def test_multipliers(trainer: ModuleType, model: tuple[Path, dict[str, Tensor]], given: Any, used: float) -> None:
    """A bare number is the default of --lora_multiplier, which the trainers themselves stumble over."""
    file, deltas = one_file()
    found = load(trainer, model[0], [file], given)
    delta = found["conv.weight"].double() - model[1]["conv.weight"].double()
    torch.testing.assert_close(delta, used * deltas["conv.weight"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: {f"x{key}": value for key, value in file.items()}, "no weight of this model belongs to its 4"),
        (lambda file: {**file, "lora_unet_mlp.strange": torch.ones(1)}, "lora_unet_mlp has strange"),
        (lambda file: {**file, "lora_unet_mlp.lokr_w1_a": torch.ones(3, 2)}, "lora_unet_mlp: lokr factors of a 18 x"),
        (lambda file: {"lora_unet_q.lora_A.weight": torch.ones(2, 36)}, "lora_unet_q has lora_A.weight"),
    ],
)
def test_what_cannot_be_merged_stops(
    trainer: ModuleType,
    model: tuple[Path, dict[str, Tensor]],
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
) -> None:
    read = trainer.load_safetensors_with_fp8_optimization_and_hook
    with pytest.raises(ValueError, match=message):
        load(trainer, model[0], [change(one_file()[0])], [1.0])
    assert trainer.load_safetensors_with_fp8_optimization_and_hook is read


def test_layers_without_a_weight_are_named(
    trainer: ModuleType, model: tuple[Path, dict[str, Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    file = {key.replace("mlp", "mlpp"): value for key, value in one_file()[0].items()}
    with pytest.raises(
        ValueError, match="1 of its 4 layers have no place here .*--allow_missing before the script's name"
    ):
        load(trainer, model[0], [file], [1.0])
    lenient = ModuleType("lora_utils")
    exec(LORA_UTILS, vars(lenient))
    key_merge.extend(lenient, places.Allowance(True))
    load(lenient, model[0], [file], [1.0])
    assert "1 of its layers have no place here (1 lora_unet: 1 mlpp; e.g. lora_unet_mlpp)" in caplog.text


def test_a_loader_of_another_shape_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    module = ModuleType("lora_utils")
    key_merge.extend(module)
    assert "lora_utils has changed" in caplog.text and not hasattr(module, key_merge.LOADER)


SCRIPT = """
import sys
from library.models import load_safetensors_with_lora_and_fp8 as load  # bound before anyone could replace it
from safetensors.torch import load_file, save_file
model, adapter, out = sys.argv[1:]
save_file(load(model, [load_file(adapter)], [0.7], False, "cpu"), out)
"""


def test_the_launcher_extends_a_trainer(tmp_path: Path, model: tuple[Path, dict[str, Tensor]]) -> None:
    """The same script started by python leaves the weights as they were."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "__init__.py").touch()
    (library / "lora_utils.py").write_text(LORA_UTILS)
    (library / "models.py").write_text("from library.lora_utils import load_safetensors_with_lora_and_fp8\n")
    script, adapter, out = (tmp_path / name for name in ("anima_minimal_inference.py", "a.safetensors", "out"))
    script.write_text(SCRIPT)
    file, deltas = one_file()
    save_file(file, adapter)
    for starter, strength in (([], 0.0), ([str(LAUNCH)], 0.7)):
        command = [sys.executable, *starter, str(script), str(model[0]), str(adapter), str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = load_file(out)
        for key, delta in deltas.items():
            exact = model[1][key].double() + strength * delta
            torch.testing.assert_close(found[key].double(), exact, rtol=1e-6, atol=1e-6)


# ---- generators that build a network for a file, on a whole model ----

LENT = {
    "plain": [],
    "dora": ["use_dora"],
    "loha": ["algo=loha", "use_dora"],
    "lokr": ["algo=lokr", "use_dora"],
    "flagged": ["use_dora", "use_rslora", "save_format=blissful"],
}


def theirs(multiplier: float, weights_sd: dict[str, Tensor], unet: Any = None, for_inference: bool = False) -> Any:
    raise AssertionError("the trainer's own function")


def lent() -> Any:
    module: Any = ModuleType("lora_flux")
    module.create_arch_network_from_weights = theirs
    key_merge.lend(module, networks.lora_flux)
    return module


@pytest.mark.parametrize("kind", LENT)
def test_a_generator_that_asks_its_module(kind: str, tmp_path: Path) -> None:
    model = toy("flux")["dit"].eval().requires_grad_(False)
    arguments = dict((text if "=" in text else f"{text}=True").split("=") for text in LENT[kind])
    network = networks.lora_flux.create_arch_network(1.0, 4, 3, None, None, model, **arguments)
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    randomise(network)
    network.set_multiplier(0.7)
    network.eval()
    wanted = model(signal()).detach()
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    network.detach()
    file = load_file(tmp_path / "a.safetensors")
    merger = lent().create_arch_network_from_weights(0.7, file, unet=model, for_inference=True)
    merger.merge_to(None, model, file, device=torch.device("cpu"), non_blocking=True)
    torch.testing.assert_close(model(signal()), wanted, rtol=1e-4, atol=1e-4)


def test_a_file_is_not_merged_twice(
    trainer: ModuleType, model: tuple[Path, dict[str, Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """FLUX.2's generator merges while it loads, and with --from_file again afterwards."""
    dit = toy("flux")["dit"].eval().requires_grad_(False)
    network = networks.lora_flux.create_arch_network(1.0, 4, 3, None, None, dit, use_dora="True")
    randomise(network)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    file = load_file(tmp_path / "a.safetensors")
    weights = {key: value.clone() for key, value in dit.state_dict().items()}
    save_file(weights, model[0])
    first = load(trainer, model[0], [file], [0.7])
    assert not torch.equal(first["double_blocks.0.img_attn.qkv.weight"], weights["double_blocks.0.img_attn.qkv.weight"])
    dit.load_state_dict(first)
    again = lent().create_arch_network_from_weights(0.7, file, unet=dit, for_inference=True)
    again.merge_to(None, dit, file, device=torch.device("cpu"))
    assert "not merged a second time" in caplog.text
    assert all(torch.equal(value, first[key]) for key, value in dit.state_dict().items())


def test_the_launcher_lends_our_functions(tmp_path: Path) -> None:
    package = tmp_path / "src" / "musubi_tuner"
    (package / "networks").mkdir(parents=True)
    for folder in (package, package / "networks"):
        (folder / "__init__.py").touch()
    for name in ("lora_flux", "lora_other"):
        (package / "networks" / f"{name}.py").write_text("def create_arch_network_from_weights(): pass\n")
    script = package / "generate.py"
    script.write_text(
        "from musubi_tuner.networks import lora_flux, lora_other\n"
        "for module in (lora_flux, lora_other): print(module.create_arch_network_from_weights.__code__.co_filename)\n"
    )
    done = subprocess.run([sys.executable, str(LAUNCH), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [Path(line).name for line in done.stdout.split()] == ["key_merge.py", "lora_other.py"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_never_get_into_a_model(value: float, dtype: torch.dtype) -> None:
    file = {"lora_unet_q.lora_up.weight": torch.full((24, 2), value), "lora_unet_q.lora_down.weight": random(2, 36)}
    with pytest.raises(ValueError, match="lora_unet_q: lora_up.weight has NaN or infinite values"):
        networks.lora_flux.merge_weights_to_tensor(
            random(24, 36).to(dtype), "lora_unet_q", file, set(file), 1.0, torch.device("cpu")
        )


def test_what_is_too_large_in_the_sum_is_refused() -> None:
    file = {"lora_unet_q.diff": torch.full((24, 36), 1e8)}
    with pytest.raises(ValueError, match="lora_unet_q: the merged values are NaN, or too large for torch.float32"):
        networks.lora_flux.merge_weights_to_tensor(
            random(24, 36), "lora_unet_q", file, set(file), 4e30, torch.device("cpu")
        )


def test_what_is_too_large_for_fp16_is_refused() -> None:
    file = {"lora_unet_q.diff": torch.full((24, 36), 1e5)}
    with pytest.raises(ValueError, match="too large for torch.float16"):
        networks.lora_flux.merge_weights_to_tensor(
            random(24, 36).half(), "lora_unet_q", file, set(file), 1.0, torch.device("cpu")
        )
