"""scripts/merge.py into every layout of checkpoints there is: the names are written down here from the programs' own
classes and files, and the weights are compared with dense formulas in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_numeric import assert_close
from registry import dense_glora, dense_loha, dense_lokr, dense_lora
from safetensors.torch import load_file, save_file
from test_oft_entries import rotated
from tiny_parts import randomise, sd_unet, sdxl_unet, text_encoder
from torch import Tensor, nn

import networks.lora
from networks.cli import merge as script
from networks.files import weight_names

D, M, ALPHA = 8, 0.7, 3.0
Names = Mapping[str, str]  # key of a weight -> the trainer's layers in the order of its rows


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True)
class Layout:
    """A way of naming the layers of a part.

    Attributes:
        prefix: of the trainer's saved names.
        root: before all keys.
        heads: (beginning of the keys of each block, the trainer's).
        block: keys below a head -> the trainer's layers there.
        rest: keys of everything else.
        recorded: (file of tests/names, part there) with all layers of the trainer's own model.
    """

    prefix: str
    root: str
    heads: Sequence[tuple[str, str]]
    block: Names
    rest: Names = field(default_factory=dict)
    recorded: tuple[str, str] = ("", "")

    def keys(self, blocks: slice = slice(None)) -> dict[str, tuple[str, ...]]:
        """Key -> saved names of the layers in the order of its rows."""
        found = {self.root + key: names.split() for key, names in self.rest.items()}
        for theirs, ours in self.heads[blocks]:
            for key, names in self.block.items():
                found[f"{self.root}{theirs}.{key}"] = [f"{ours}.{name}" for name in names.split()]
        return {key: tuple(f"{self.prefix}_{name}".replace(".", "_") for name in names) for key, names in found.items()}


def numbered(count: int, theirs: str, ours: str = "") -> list[tuple[str, str]]:
    return [(f"{theirs}.{i}", f"{ours or theirs}.{i}") for i in range(count)]


# OpenCLIP's text model, as SD 2.x and SDXL were released with it.
OPEN_CLIP = {
    "attn.in_proj_weight": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attn.out_proj.weight": "self_attn.out_proj",
    "mlp.c_fc.weight": "mlp.fc1",
    "mlp.c_proj.weight": "mlp.fc2",
    "ln_1.weight": "layer_norm1",
    "ln_2.weight": "layer_norm2",
}
OPEN_CLIP_REST = {"ln_final.weight": "text_model.final_layer_norm", "text_projection": "text_projection"}


def open_clip(prefix: str, root: str, blocks: int, recorded: tuple[str, str]) -> Layout:
    heads = numbered(blocks, "transformer.resblocks", "text_model.encoder.layers")
    return Layout(prefix, root, heads, OPEN_CLIP, OPEN_CLIP_REST, recorded)


CLIP = {
    f"{name}.weight": name
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2",
                 "layer_norm1", "layer_norm2")
}  # fmt: skip


def clip(prefix: str, root: str, blocks: int, recorded: tuple[str, str]) -> Layout:
    rest = {"text_model.final_layer_norm.weight": "text_model.final_layer_norm"}
    return Layout(prefix, root, numbered(blocks, "text_model.encoder.layers"), CLIP, rest, recorded)


T5 = {
    f"{name}.weight": name
    for name in ("0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v", "0.SelfAttention.o", "0.layer_norm",
                 "1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1", "1.DenseReluDense.wo", "1.layer_norm")
}  # fmt: skip
T5_HEADS = [(f"encoder.block.{i}.layer", f"encoder.block.{i}.layer") for i in range(24)]
LLAMA = {
    f"{name}.weight": name
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                 "mlp.up_proj", "mlp.down_proj", "input_layernorm")
}  # fmt: skip

# ComfyUI's NextDiT as it loads Z-Image.
ZIMAGE = {
    "attention.qkv.weight": "attention.to_q attention.to_k attention.to_v",
    "attention.out.weight": "attention.to_out.0",
    "attention.q_norm.weight": "attention.norm_q",
    "attention.k_norm.weight": "attention.norm_k",
    "feed_forward.w1.weight": "feed_forward.w1",
    "feed_forward.w2.weight": "feed_forward.w2",
    "feed_forward.w3.weight": "feed_forward.w3",
    "attention_norm1.weight": "attention_norm1",
    "adaLN_modulation.0.weight": "adaLN_modulation.0",
}
ZIMAGE_REST = {
    "x_embedder.weight": "all_x_embedder.2-1",
    "final_layer.linear.weight": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1.weight": "all_final_layer.2-1.adaLN_modulation.1",
    "cap_embedder.1.weight": "cap_embedder.1",
}
ZIMAGE_HEADS = [*numbered(30, "layers"), *numbered(2, "noise_refiner"), *numbered(2, "context_refiner")]

# ComfyUI's HunyuanVideo, which it also loads HunyuanImage 2.1 and HunyuanVideo 1.5 with.
DOUBLE = {
    "img_attn.qkv.weight": "img_attn_qkv",
    "img_attn.proj.weight": "img_attn_proj",
    "img_attn.norm.query_norm.weight": "img_attn_q_norm",
    "img_attn.norm.key_norm.weight": "img_attn_k_norm",
    "img_mlp.0.weight": "img_mlp.fc1",
    "img_mlp.2.weight": "img_mlp.fc2",
    "img_mod.lin.weight": "img_mod.linear",
    "txt_attn.qkv.weight": "txt_attn_qkv",
    "txt_attn.proj.weight": "txt_attn_proj",
    "txt_attn.norm.query_norm.weight": "txt_attn_q_norm",
    "txt_attn.norm.key_norm.weight": "txt_attn_k_norm",
    "txt_mlp.0.weight": "txt_mlp.fc1",
    "txt_mlp.2.weight": "txt_mlp.fc2",
    "txt_mod.lin.weight": "txt_mod.linear",
}
SINGLE = {
    "linear1.weight": "linear1",
    "linear2.weight": "linear2",
    "modulation.lin.weight": "modulation.linear",
    "norm.query_norm.weight": "q_norm",
    "norm.key_norm.weight": "k_norm",
}
HUNYUAN_REST = {
    "img_in.proj.weight": "img_in.proj",
    "time_in.in_layer.weight": "time_in.mlp.0",
    "time_in.out_layer.weight": "time_in.mlp.2",
    "txt_in.input_embedder.weight": "txt_in.input_embedder",
    "txt_in.t_embedder.in_layer.weight": "txt_in.t_embedder.mlp.0",
    "txt_in.t_embedder.out_layer.weight": "txt_in.t_embedder.mlp.2",
    "txt_in.c_embedder.in_layer.weight": "txt_in.c_embedder.linear_1",
    "txt_in.c_embedder.out_layer.weight": "txt_in.c_embedder.linear_2",
    "txt_in.individual_token_refiner.blocks.1.self_attn.qkv.weight":
        "txt_in.individual_token_refiner.blocks.1.self_attn_qkv",
    "txt_in.individual_token_refiner.blocks.1.self_attn.proj.weight":
        "txt_in.individual_token_refiner.blocks.1.self_attn_proj",
    "txt_in.individual_token_refiner.blocks.1.mlp.0.weight": "txt_in.individual_token_refiner.blocks.1.mlp.fc1",
    "txt_in.individual_token_refiner.blocks.1.mlp.2.weight": "txt_in.individual_token_refiner.blocks.1.mlp.fc2",
    "final_layer.linear.weight": "final_layer.linear",
}  # fmt: skip


def hunyuan(recorded: str) -> Layout:
    """HunyuanVideo and HunyuanImage: 20 double blocks, 40 single ones, below the prefix which ComfyUI gives them."""
    singles = {
        f"single_blocks.{i}.{key}": f"single_blocks.{i}.{name}" for i in range(40) for key, name in SINGLE.items()
    }
    return Layout(
        "lora_unet", "model.model.", numbered(20, "double_blocks"), DOUBLE, HUNYUAN_REST | singles, (recorded, "dit")
    )


DOUBLE_1_5 = {
    key: names.replace("attn_qkv", "attn_q") + (f" {names[:3]}_attn_k {names[:3]}_attn_v" if "qkv" in names else "")
    for key, names in DOUBLE.items()
}
# The files that ComfyUI offers for it: the original names, but for the projections.
REPACKED_1_5 = {
    f"{'_'.join(names.split()[0].split('_')[:2])}_qkv.weight" if "qkv" in key else f"{names}.weight": names
    for key, names in DOUBLE_1_5.items()
}
HIDREAM = {f"{name}.weight": name for name in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm")}
HIDREAM_REST = {
    "x_embedder.proj1.weight": "model.x_embedder.proj1",
    "final_layer2.linear.weight": "model.final_layer2.linear",
    "t_embedder1.mlp.0.weight": "model.t_embedder1.mlp.0",
    "visual.blocks.3.attn.qkv.weight": "model.visual.blocks.3.attn.qkv",
    "visual.merger.linear_fc1.weight": "model.visual.merger.linear_fc1",
}
LAYOUTS = {
    "SDXL, second encoder": open_clip("lora_te2", "conditioner.embedders.1.model.", 32, ("sdxl", "text_encoder2")),
    "SD 2": open_clip("lora_te", "cond_stage_model.model.", 24, ("sd", "text_encoder")),
    "SD 2 of sgm": open_clip("lora_te", "conditioner.embedders.0.model.", 24, ("sd", "text_encoder")),
    "OpenCLIP by itself": open_clip("lora_te2", "", 32, ("sdxl", "text_encoder2")),
    "SDXL, first encoder": clip("lora_te1", "conditioner.embedders.0.transformer.", 12, ("sdxl", "text_encoder1")),
    "SD 1": clip("lora_te", "cond_stage_model.transformer.", 12, ("sd", "text_encoder")),
    "SD 1, old": Layout(
        "lora_te", "cond_stage_model.transformer.", numbered(12, "encoder.layers", "text_model.encoder.layers"), CLIP,
        {"final_layer_norm.weight": "text_model.final_layer_norm"}, ("sd", "text_encoder"),
    ),
    "SD3, CLIP-L": clip("lora_te1", "text_encoders.clip_l.transformer.", 12, ("sd3", "text_encoder1")),
    "SD3, CLIP-G": clip("lora_te2", "text_encoders.clip_g.transformer.", 32, ("sd3", "text_encoder2")),
    "FLUX.1, CLIP-L": clip("lora_te1", "text_encoders.clip_l.transformer.", 12, ("flux", "text_encoder1")),
    "T5": Layout("lora_te3", "text_encoders.t5xxl.transformer.", T5_HEADS, T5, {}, ("flux", "text_encoder3")),
    "T5 by itself": Layout("lora_te3", "", T5_HEADS, T5, {}, ("sd3", "text_encoder3")),
    "Lumina, Gemma 2": Layout(
        "lora_te", "text_encoders.gemma2_2b.transformer.model.", numbered(26, "layers"), LLAMA, {},
        ("lumina", "text_encoder"),
    ),
    "Gemma 2 by itself": Layout("lora_te", "model.", numbered(26, "layers"), LLAMA, {}, ("lumina", "text_encoder")),
    "Anima, Qwen3": Layout(
        "lora_te", "text_encoders.qwen3_06b.transformer.model.", numbered(28, "layers"), LLAMA, {},
        ("anima", "text_encoder"),
    ),
    "Z-Image in ComfyUI": Layout(
        "lora_unet", "model.diffusion_model.", ZIMAGE_HEADS, ZIMAGE, ZIMAGE_REST, ("zimage", "dit")
    ),
    "Z-Image for ComfyUI": Layout("lora_unet", "", ZIMAGE_HEADS, ZIMAGE, ZIMAGE_REST, ("zimage", "dit")),
    "HunyuanVideo in ComfyUI": hunyuan("hunyuan_video"),
    "HunyuanImage in ComfyUI": hunyuan("hunyuan_image"),
    "HunyuanVideo 1.5 in ComfyUI": Layout(
        "lora_unet", "model.model.", numbered(54, "double_blocks"), DOUBLE_1_5, HUNYUAN_REST, ("hv_1_5", "dit")
    ),
    "HunyuanVideo 1.5 for ComfyUI": Layout(
        "lora_unet", "", numbered(54, "double_blocks"), REPACKED_1_5, {}, ("hv_1_5", "dit")
    ),
    "HiDream-O1 for ComfyUI": Layout(
        "lora_unet", "diffusion_model.", numbered(36, "language_model.layers", "model.language_model.layers"), HIDREAM,
        HIDREAM_REST,
    ),
    "HiDream-O1": Layout(
        "lora_unet", "", numbered(36, "model.language_model.layers"), HIDREAM,
        {f"model.{key}": name for key, name in HIDREAM_REST.items()},
    ),
    "ACE-Step": Layout("lycoris", "decoder.", numbered(24, "layers"), LLAMA),
    "ACE-Step in ComfyUI": Layout("lycoris", "model.diffusion_model.decoder.", numbered(24, "layers"), LLAMA),
    "Anima": Layout(
        "lora_unet", "net.", numbered(28, "blocks"),
        {f"{name}.weight": name for name in ("mlp.layer1", "mlp.layer2", "self_attn.q_proj")},
    ),
}  # fmt: skip


def recorded(layout: Layout) -> set[str]:
    """Saved names of all layers that the trainer trains in this part."""
    file, part = layout.recorded
    lines = (Path(__file__).parent / "names" / f"{file}.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    found = {row[4] for row in rows if row[0] == part and row[3] != "-" and row[4] != "-"}
    assert len(found) > 50
    return found


@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layer_has_its_rows(case: str) -> None:
    """All layers of the full-size model: each the rows of one key that stand here."""
    layout = LAYOUTS[case]
    expected = {
        name: (key, number, len(names)) for key, names in layout.keys().items() for number, name in enumerate(names)
    }
    others = ["first_stage_model.decoder.conv_in.weight", "scaled_fp8", "model_ema.decay"]
    found = weight_names.find([*layout.keys(), *others], expected)
    places = {name: [(p.key, p.number, p.count) for p in target.pieces] for name, target in found.items()}
    assert places == {name: [place] for name, place in expected.items()}
    if layout.recorded[0]:
        assert recorded(layout) <= expected.keys()


# -- numbers


def adapter(kind: str, W: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors under their suffixes, W' at multiplier M)."""
    rows, columns = W.shape
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    t: dict[str, Tensor] = {}
    if kind in ("lora", "dora"):
        t = {"lora_up.weight": draw(rows, 2), "lora_down.weight": draw(2, columns)}
        dW = dense_lora(t, (rows, columns)) * ALPHA / 2
    elif kind == "loha":
        t = {f"hada_w{n}_{x}": draw(*s) for n in (1, 2) for x, s in (("a", (rows, 2)), ("b", (2, columns)))}
        dW = dense_loha(t, (rows, columns)) * ALPHA / 2
    elif kind == "lokr":
        t = {"lokr_w1": draw(2, 2), "lokr_w2": draw(rows // 2, columns // 2)}
        dW = dense_lokr(t, (rows, columns))
    elif kind == "glora":
        sizes = {"a1": (columns, 2), "a2": (2, columns), "b1": (rows, 2), "b2": (2, columns)}
        t = {f"{name}.weight": draw(*size) for name, size in sizes.items()}
        dW = dense_glora({**t, "base": W}, (rows, columns)) * ALPHA / 2
    elif kind == "full":
        t = {"diff": draw(rows, columns)}
        dW = t["diff"]
    else:
        t = {"oft_blocks": draw(rows // 4, 4, 4)}
        return {**t, "alpha": torch.tensor(1e6)}, rotated(t["oft_blocks"], W, 1e6, M)
    if kind == "dora":
        t["dora_scale"] = draw(rows, 1).abs()
        dW = (W + dW) * t["dora_scale"] / (W + dW).norm(dim=1, keepdim=True) - W
    return {**t, "alpha": torch.tensor(ALPHA, dtype=torch.float64)}, W + M * dW


KINDS = ("lora", "dora", "loha", "lokr", "glora", "full", "diag-oft")


def bias_of(key: str) -> str:
    return f"{key.removesuffix('weight')}bias"


@pytest.mark.parametrize("case", LAYOUTS)
def test_every_kind_merges_into_these_rows(case: str, tmp_path: Path) -> None:
    """Two blocks and everything outside of them, with all algorithms in turn, biases and norms."""
    model: dict[str, Tensor] = {"first_stage_model.x.weight": torch.randn(3, dtype=torch.float64)}
    file: dict[str, Tensor] = {}
    wanted = {key: tensor.clone() for key, tensor in model.items()}
    turn = 0
    for key, names in LAYOUTS[case].keys(slice(2)).items():
        norm = "norm" in key or ".ln_" in key
        shape = (D,) if norm else (D * len(names), 2 * D)
        parts, biases = [], []
        for name in names:
            W, b = torch.randn(D, *shape[1:], dtype=torch.float64), torch.randn(D, dtype=torch.float64)
            kind, turn = KINDS[turn % len(KINDS)], turn + 1
            tensors, merged, shift = {}, W, torch.zeros_like(b)
            if norm:
                tensors = {"w_norm": torch.randn_like(W), "b_norm": torch.randn_like(b)}
                merged, shift = W + M * tensors["w_norm"], tensors["b_norm"]
            elif "text_projection" in key:  # [I, O], a parameter without a bias
                tensors, merged = adapter("lora", W)
            else:
                tensors, merged = adapter(kind, W)
                if kind == "full":
                    tensors["diff_b"] = shift = torch.randn_like(b)
            file |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
            parts.append((W, merged))
            biases.append((b, b + M * shift))
        model[key], wanted[key] = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        if "text_projection" in key:
            model[key], wanted[key] = model[key].T.contiguous(), wanted[key].T.contiguous()
        if "text_projection" not in key:
            model[bias_of(key)], wanted[bias_of(key)] = (torch.cat(tensors) for tensors in zip(*biases, strict=True))
    merged = merge(tmp_path, model, file)
    assert merged.keys() == model.keys() and len(file) > 10
    for key, expected in wanted.items():
        assert_close(merged[key], expected, f"{case} {key}")


# -- against the real models and diffusers' own converters

TRAINED: dict[str, dict[str, str]] = {
    "LoRA": {},
    "LoRA with DoRA": {"use_dora": "True"},
    "LoHa": {"algo": "loha"},
    "LoKr": {"algo": "lokr"},
    "GLoRA": {"algo": "glora"},
    "full": {"algo": "full"},  # with biases
    "OFT": {"algo": "diag-oft"},
    "IA3": {"algo": "ia3"},
}


def released(encoder: nn.Module, root: str) -> dict[str, Tensor]:
    """A transformers' text encoder under OpenCLIP's names."""
    own, found = named(encoder.state_dict()), {}
    count = len([key for key in own if key.endswith("layer_norm1.weight")])
    for i in range(count):
        theirs, ours = f"{root}transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        for kind in ("weight", "bias"):
            qkv = [own.pop(f"{ours}.self_attn.{letter}_proj.{kind}") for letter in "qkv"]
            found[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(qkv)
            names = (("attn.out_proj", "self_attn.out_proj"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
                     ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"))  # fmt: skip
            found |= {f"{theirs}.{a}.{kind}": own.pop(f"{ours}.{b}.{kind}") for a, b in names}
    for kind in ("weight", "bias"):
        found[f"{root}ln_final.{kind}"] = own.pop(f"text_model.final_layer_norm.{kind}")
    found[f"{root}positional_embedding"] = own.pop("text_model.embeddings.position_embedding.weight")
    found[f"{root}token_embedding.weight"] = own.pop("text_model.embeddings.token_embedding.weight")
    if "text_projection.weight" in own:
        found[f"{root}text_projection"] = own.pop("text_projection.weight").T.contiguous()
    assert not own
    return found


def named(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the level `text_model`, which transformers 5 has dropped for one of the two classes."""
    tops = ("encoder.", "embeddings.", "final_layer_norm.")
    return {
        f"text_model.{k}" if k.startswith(tops) else k: t.clone() for k, t in state.items() if "position_ids" not in k
    }


@torch.no_grad()
def said(encoder: nn.Module) -> Tensor:
    return encoder(torch.tensor([[2, 3, 4, 1]]), output_hidden_states=True).hidden_states[-1]


def load(encoder: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = encoder.state_dict()
    found = {key: state[named({key: t}).popitem()[0]] for key, t in own.items() if "position_ids" not in key}
    assert len(found) == len(state)
    encoder.load_state_dict(found, strict=False)


@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED)
def test_sdxl_merged_and_loaded_by_diffusers_is_the_network_applied(options: dict[str, str], tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

    encoders = [text_encoder().double(), text_encoder(True).double()]
    roots = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
    first = {roots[0] + key: t for key, t in named(encoders[0].state_dict()).items()}
    plain = [said(encoder) for encoder in encoders]
    live, file = trained(encoders, sdxl_unet(), options, tmp_path)
    merged = merge(tmp_path, first | released(encoders[1], roots[1]), file)
    load(encoders[0], convert_ldm_clip_checkpoint(merged, roots[0]))
    load(encoders[1], convert_open_clip_checkpoint(encoders[1], merged, roots[1]))
    for encoder, before, expected in zip(encoders, plain, live, strict=True):
        assert float((expected - before).norm()) > 1e-4
        assert_close(said(encoder) - before, expected - before, "merged", 1e-6)


@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED)
def test_sd2_merged_and_loaded_by_diffusers_is_the_network_applied(options: dict[str, str], tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    encoder, root = text_encoder().double(), "cond_stage_model.model."
    plain = said(encoder)
    live, file = trained([encoder], sd_unet(), options, tmp_path)
    merged = merge(tmp_path, released(encoder, root), file)
    load(encoder, convert_open_clip_checkpoint(encoder, merged, root))
    assert float((live[0] - plain).norm()) > 1e-4
    assert_close(said(encoder) - plain, live[0] - plain, "merged", 1e-6)


def trained(
    encoders: list[nn.Module], unet: nn.Module, options: dict[str, str], folder: Path
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What the encoders say with a random network at M, which is taken off again, and its file."""
    network = networks.lora.create_network(M, 4, 3, None, encoders, unet, **options)
    network.apply_to(encoders, unet, True, False)
    randomise(network)
    network.double().eval()
    live = [said(encoder) for encoder in encoders]
    network.save_weights(str(folder / "trained.safetensors"), None, {})
    network.detach()
    return live, load_file(folder / "trained.safetensors")


def merge(folder: Path, model: Mapping[str, Tensor], *files: Mapping[str, Tensor], more: Sequence[str] = ()) -> Any:
    """The merged checkpoint, by the script."""
    save_file(dict(model), folder / "model.safetensors")
    adapters = []
    for number, tensors in enumerate(files):
        save_file(dict(tensors), folder / f"{number}.safetensors")
        adapters.append(f"{folder / f'{number}.safetensors'}={M}")
    out = folder / "out.safetensors"
    assert script.main([str(folder / "model.safetensors"), *adapters, "--out", str(out), "--strict", *more]) == 0
    return load_file(out)
