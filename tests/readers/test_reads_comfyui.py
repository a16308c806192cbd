"""The model of ComfyUI, held to what it really does: names that were written down when it ran, formulas by hand, and
the program itself where COMFYUI_PATH gives it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import comfyui_program as program
import pytest
import torch
from common import KINDS, WIDE, Target, Trained, _network, trained
from registry_archs import SPECS, data_of
from safetensors.torch import load_file
from tiny_parts import randomise
from torch import Tensor, nn
from toy_models import recorded, toy

from networks import api
from networks.files.codec import decode
from networks.files.readers import Given, Reader, comfyui
from networks.files.readers.contract import STRENGTHS
from networks.files.readers.patcher import Slot, slots

READER = comfyui.READERS[0]
MODELS = comfyui.MODELS
NAMES = Path(__file__).parent / "comfyui.txt"
ROUNDING = 1e-4  # of W + dW in fp32, in parts of dW
NORM = 8  # features of normalisation layers, whose shapes are not recorded
# Names of layers which no trainer and no other program writes for these architectures.
_FLUX_2 = r"ff(_context)?[._]linear_(in|out)|attn[._]to_qkv_mlp_proj|single_transformer_blocks[._]\d+[._]attn[._]to_out"
_FLUX_1 = (
    r"ff(_context)?[._]net.*|single_transformer_blocks[._]\d+[._](attn[._]to_[qkv]|proj_(mlp|out))|time_text_embed.*"
)
MORE = {
    "flux": rf".*({_FLUX_2}|\.linear1_qkv)",
    "chroma": rf".*({_FLUX_2}|\.linear1_qkv)",
    "flux_2": rf".*({_FLUX_1}|\.linear1_qkv)",
    "lumina": r".*(attention[._](to_[qkv]|to_out[._]0|norm_[qk])|all_(final_layer|x_embedder).*)",
    "sdxl": r".*class_embedding[._]linear_[12]",
}


def given(arch: str, tensors: dict[str, Tensor] | None = None) -> Given:
    """The model of full size, as its names are recorded, with the normalisation layers of the first blocks."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for one in recorded(arch):
        if one.shape and one.dotted != "text_projection":  # which is never trained
            shapes.setdefault(one.part, {})[one.dotted] = one.shape
    for name, has_weight in data_of(arch).trainers_norms.items():
        if has_weight:
            shapes[SPECS[arch].denoiser.name].setdefault(name, (NORM,))
    tensors = tensors or {}
    return Given(tensors, {}, SPECS[arch], shapes, decode(tensors)[0])


def target(slot: Slot) -> program.Target:
    norm = slot.shape == (NORM,)
    return slot.path, slot.start, 0 if norm else slot.shape[0], slot.swapped


# -- names, as they were written down


def written_down() -> dict[str, dict[str, program.Target | None]]:
    """Architecture -> name in files -> what it means to it; None = nothing."""
    found: dict[str, dict[str, program.Target | None]] = {}
    arch = ""
    for line in NAMES.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            arch = line[1:-1]
        elif line and not line.startswith("#"):
            name, path, *rows = line.split()
            start, count = map(int, rows[:2]) if rows else (0, 0)
            found.setdefault(arch, {})[name] = None if path == "-" else (path, start, count, "swapped" in rows)
    return found


@pytest.mark.parametrize("arch", MODELS)
def test_names_as_written_down(arch: str) -> None:
    known, lines = slots(given(arch), MODELS[arch]), written_down()[arch]
    assert {name: target(known[name]) if name in known else None for name in lines} == lines


def test_every_architecture_is_written_down() -> None:
    """With all layers of the first block of each kind, under the trainers' names."""
    lines = written_down()
    assert lines.keys() == MODELS.keys() == SPECS.keys()
    for arch in MODELS:
        part = SPECS[arch].denoiser
        kinds = {re.sub(r"\d+", "0", one.saved) for one in recorded(arch) if one.part == part.name and one.saved != "-"}
        assert kinds <= {re.sub(r"\d+", "0", name) for name in lines[arch]}


# -- what it computes, by hand


def rotation(blocks: Tensor) -> Tensor:
    """(1 + Q)(1 - Q)^-1 of each."""
    Q, one = blocks - blocks.transpose(-1, -2), torch.eye(blocks.shape[-1]).to(blocks)
    return (one + Q) @ torch.linalg.inv(one - Q)


def limited(blocks: Tensor, limit: float) -> Tensor:
    norm = (blocks - blocks.transpose(-1, -2)).norm()
    return blocks * (limit / norm) if limit and norm > limit else blocks


def butterflies(W: Tensor, stages: Tensor) -> Tensor:
    """Every stage rotates blocks of rows of which each half lies `distance` apart."""
    size = stages.shape[-1]
    for i, blocks in enumerate(stages):
        order = torch.arange(len(W)).reshape(-1, 2, 2**i * size // 2).transpose(1, 2).flatten()
        W = (torch.block_diag(*blocks) @ W[order])[order.argsort()]
    return W


def dora(W: Tensor, t: dict[str, Tensor], s: float) -> Tensor:
    new = (W + t["lora_up.weight"] @ t["lora_down.weight"] / 2) * t["dora_scale"] / W.norm(dim=1, keepdim=True)
    return s * (new - W)


def oft(W: Tensor, t: dict[str, Tensor], s: float) -> Tensor:
    turns = rotation(limited(t["oft_blocks"], float(t["alpha"]))).transpose(1, 2)
    return s * s * (torch.block_diag(*turns) @ W - W)


def boft(W: Tensor, t: dict[str, Tensor], s: float) -> Tensor:
    one = torch.eye(4, dtype=W.dtype)
    turned = butterflies(W, s * rotation(limited(t["oft_blocks"], float(t["alpha"]))) + (1 - s) * one)
    return s * (turned * t.get("rescale", 1) - W)


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * 0.1


def pair() -> dict[str, Tensor]:
    return {"lora_up.weight": values(8, 2), "lora_down.weight": values(2, 6), "alpha": torch.tensor(1.0)}


FORMULAS = {
    "dora": (lambda: pair() | {"dora_scale": 1 + values(8, 1)}, dora),
    "magnitude of another name": (
        lambda: pair() | {"magnitude": 1 + values(8, 1)},
        lambda W, t, s: s * t["lora_up.weight"] @ t["lora_down.weight"] / 2,
    ),
    "oft": (lambda: {"oft_blocks": values(2, 4, 4), "alpha": torch.tensor(0.0)}, oft),
    "oft with a limit": (lambda: {"oft_blocks": values(2, 4, 4), "alpha": torch.tensor(0.05)}, oft),
    "oft with factors": (
        lambda: {"oft_blocks": values(2, 4, 4), "rescale": 1 + values(8, 1), "alpha": torch.tensor(0.0)},
        oft,
    ),
    "boft": (lambda: {"oft_blocks": values(2, 2, 4, 4), "alpha": torch.tensor(0.0)}, boft),
    "boft with a limit": (lambda: {"oft_blocks": values(2, 2, 4, 4), "alpha": torch.tensor(0.05)}, boft),
    "boft with factors": (
        lambda: {"oft_blocks": values(2, 2, 4, 4), "rescale": 1 + values(8, 1), "alpha": torch.tensor(0.0)},
        boft,
    ),
}


def meant(W: Tensor, t: dict[str, Tensor]) -> Tensor:
    """The change of the weight as the definitions of these algorithms have it."""
    if "oft_blocks" in t:
        R = rotation(limited(t["oft_blocks"], 8 * float(t["alpha"])))
        turned = butterflies(W, R) if R.dim() == 4 else torch.block_diag(*R.transpose(1, 2)) @ W
        return turned * t.get("rescale", 1) - W
    new = W + t["lora_up.weight"] @ t["lora_down.weight"] / 2
    magnitude = t.get("dora_scale", t.get("magnitude"))
    return new * magnitude / new.norm(dim=1, keepdim=True) - W


@pytest.mark.parametrize("kind", FORMULAS)
def test_errors_by_hand(kind: str) -> None:
    torch.manual_seed(0)
    make, theirs = FORMULAS[kind]
    tensors, W, name = make(), 10 * values(8, 6), "lora_unet_blocks_0_self_attn_q"
    file = {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    saved = decode({key.replace("magnitude", "dora_scale"): tensor for key, tensor in file.items()})[0]
    shapes = {"dit": {"blocks.0.self_attn.q": (8, 6)}}
    reading = READER.read(Given(file, {}, SPECS["wan"], shapes, saved, lambda _: W))
    assert reading is not None and reading.loaded == 1
    want = meant(W, tensors)
    wanted = [float((theirs(W, tensors, s) - s * want).norm() / (s * want).norm()) for s in (1.0, 0.7)]
    assert reading.errors == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    blind = READER.read(Given(file, {}, SPECS["wan"], shapes, saved))
    assert blind is not None and blind.loaded == 1 and not blind.exact
    if "oft" in kind:
        assert blind.errors == pytest.approx(wanted, rel=0.2, abs=1e-5)
    else:
        assert blind.errors == (None, None)


def odd(**tensors: Tensor) -> tuple[str, bool]:
    """(why, whether it changes anything) of a layer; a file of Wan, or of SD with a kernel of two dimensions."""
    kernel = max(t.dim() for t in tensors.values()) - 2
    arch, dotted = ("sd", "down_blocks.0.resnets.0.conv1") if kernel == 2 else ("wan", "patch_embedding")
    shape = (8, 6, *(3,) * kernel)
    name = f"lora_unet_{dotted}".replace(".", "_")
    file = {f"{name}.{suffix.replace('__', '.')}": tensor for suffix, tensor in tensors.items()}
    part = SPECS[arch].denoiser.name
    reading = READER.read(Given(file, {}, SPECS[arch], {part: {dotted: shape}}, decode(file)[0]))
    assert reading is not None
    return (reading.refused, False) if reading.refused else (reading.fates[name].reason, reading.loaded == 1)


def tucker(*kernel: int) -> dict[str, Tensor]:
    ones = (1,) * len(kernel)
    return {"lora_up__weight": values(8, 2, *ones), "lora_mid__weight": values(2, 2, *kernel)} | {
        "lora_down__weight": values(2, 6, *ones)
    }


def test_forms_that_it_cannot_read() -> None:
    """As its log says when it meets them."""
    lokr = {"lokr_w1": values(2, 2), "lokr_w2_a": values(2, 4), "lokr_w2_b": values(2, 3)}
    assert odd(**tucker(3, 3)) == ("", True)
    assert "of two dimensions alone" in odd(**tucker(3, 3, 3))[0]
    assert odd(**lokr, lokr_t2=values(2, 2, 3, 3)) == (
        "the Tucker form of LoKr is computed with an error, and the weight stays as it is",
        False,
    )
    assert odd(lokr_w1=values(2, 2), lokr_w2=values(4, 3, 3, 3)) == ("", True)
    assert "joined in another order" in odd(lokr_w1=values(2, 2), lokr_w2=values(4, 3, 3, 3, 3))[0]
    assert odd(oft_blocks=values(2, 2, 4, 4))[1] is False  # without alpha
    assert odd(weight=values(8), on_input=torch.tensor(False)) == ("it does not know this form", False)
    lora = {"lora_up__weight": values(8, 2), "lora_down__weight": values(2, 6)}
    assert odd(**lora) == ("", True)
    assert odd(**lora, alpha=torch.tensor(0.0)) == ("its alpha is read as 0", False)
    assert "another shape" in odd(**lora, dora_scale=values(8))[0]
    assert odd(**lora, dora_scale=values(1, 6)) == ("", True)


# -- the program itself


def program_on(arch: str, model: nn.Module, file: dict[str, Tensor]) -> Callable[[nn.Module, float], Tensor]:
    """What it makes of a file: the weight of a module of the trainer's model, at a strength."""
    base, where = program.of_trainer(arch, "", model)
    config = dict(program.CONFIGS[arch])
    shrink = data_of(arch).shrink
    config |= {name: max(4, config[name] // shrink) for name in ("hidden_size", "dim") if name in config}
    changed = {s: program.patched(arch, file, base, config, s)[0] for s in STRENGTHS}

    def weight_at(module: nn.Module, strength: float) -> Tensor:
        key, rows = where[module]
        return changed[strength].get(key, base[key])[rows]

    return weight_at


def check(arch: str, arguments: dict[str, str], folder: Path) -> None:
    part = SPECS[arch].denoiser.name
    models = {part: toy(arch, shrink=data_of(arch).shrink)[part].eval().requires_grad_(False)}
    run = trained(arch, models, folder / "a.safetensors", **arguments)
    assert_as_made(READER, run, program_on(arch, models[part], dict(run.given.tensors)))


def assert_as_made(reader: Reader, run: Trained, weight_at: Callable[[nn.Module, float], Tensor]) -> None:
    """A model says what the program did, layer by layer, to two digits.

    Args:
        weight_at: what the program makes of a module's weight, at a strength.
    """
    reading = reader.read(run.given)
    assert reading is not None and not reading.refused
    for name, fate in reading.fates.items():
        found = [errors(run.targets[name], weight_at, strength) for strength in STRENGTHS]
        assert fate.loaded == (found[0] is not None), name
        assert not fate.loaded or fate.errors == pytest.approx(found, rel=0.01, abs=ROUNDING), name
        assert bool(fate.reason) == (not fate.loaded or max(fate.errors) > 0), name


def errors(targets: Iterable[Target], weight_at: Callable[[nn.Module, float], Tensor], s: float) -> float | None:
    """||W'_reader - W'|| / ||W' - W|| of a layer at a strength; None = it is as it was."""
    got = torch.cat([(weight_at(one.module, s) - one.base).flatten() for one in targets])
    want = torch.cat([(s * (one.wanted - one.base)).flatten() for one in targets])
    return float((got - want).norm() / want.norm()) if got.any() else None


if program.ROOT:  # tests of what is not installed are not collected
    THERE = [arch for arch in MODELS if program.has(arch)]

    @pytest.mark.parametrize("arch", THERE)
    def test_all_names_as_it_knows_them(arch: str) -> None:
        """Of every layer of a model of full size, and no other names."""
        known = {name: target(slot) for name, slot in slots(given(arch), MODELS[arch]).items()}
        norms = {path for path, _, rows, _ in known.values() if not rows}
        ours, theirs = {path for path, *_ in known.values()}, dict[str, program.Target]()
        for name, (path, start, rows, swapped) in program.key_map(arch).items():
            if path in ours and not re.fullmatch(MORE.get(arch, "-"), name):
                theirs[name] = path, start, 0 if path in norms else rows, swapped
        assert known == theirs

    CASES = [
        (arch, kind)
        for arch in THERE
        for kind in KINDS
        if kind in WIDE or (arch in ("sd", "flux", "qwen_image", "wan") and kind != "norms")  # the toys have none
    ]

    @pytest.mark.parametrize(("arch", "kind"), CASES)
    def test_weights_as_it_makes_them(arch: str, kind: str, tmp_path: Path) -> None:
        check(arch, KINDS[kind], tmp_path)

    @pytest.mark.parametrize("kind", WIDE)
    @pytest.mark.parametrize("arch", THERE)
    def test_files_written_for_it_are_exact(arch: str, kind: str, tmp_path: Path) -> None:
        part = SPECS[arch].denoiser.name
        models = {part: toy(arch, shrink=data_of(arch).shrink)[part].eval().requires_grad_(False)}
        network = _network(arch, models[part], [], {"save_format": "comfyui", **KINDS[kind]})
        randomise(network)
        file = tmp_path / "a.safetensors"
        network.save_weights(str(file), None, {})
        wanted = {one.base: one.new_weight(one.whole_weight()).detach() for one in network.adapted_layers}
        network.detach()
        weight_at = program_on(arch, models[part], load_file(file))
        for module, new in wanted.items():
            for s in STRENGTHS:
                want, got = s * (new - module.weight), weight_at(module, s) - module.weight
                assert (got - want).norm() < ROUNDING * want.norm() / s, arch

    def test_a_model_without_record(tmp_path: Path) -> None:
        """Where its class is that of the model, names are the paths of modules, and files arrive exactly."""
        sizes = {"dim": 16, "n_layers": 3, "n_double_layers": 1, "n_heads": 2, "global_conddim": 16, "cond_seq_dim": 16}
        ops = program.program("ops").disable_weight_init
        model = program.program("ldm.aura.mmdit").MMDiT(**sizes, max_seq=4, operations=ops)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=0.1)
        network = api.apply(model.requires_grad_(False), dim=4)
        randomise(network)
        network.save(tmp_path / "a.safetensors")
        assert len(network.layers) == 32  # 16 of the double block, 8 of each single one
        wanted = {row.trainer_name: one.new_weight(one.whole_weight()).detach() for row, one in network.layers}
        weights = {f"diffusion_model.{name}": p.detach() for name, p in model.named_parameters()}
        changed, said = program.patched_class("AuraFlow", load_file(tmp_path / "a.safetensors"), weights, 1.0)
        assert not said and changed.keys() == {f"diffusion_model.{name}.weight" for name in wanted}
        for name, weight in wanted.items():
            torch.testing.assert_close(changed[f"diffusion_model.{name}.weight"], weight)
