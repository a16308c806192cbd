"""Right adapter files of every algorithm and form, written by hand for toy models, and what they make of the weights by
formulas of our own in float64: what test_fuzz_files.py breaks, and holds results to.

Letters: O x I weight of a layer, R rank.
"""

from __future__ import annotations

import functools
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from golden import replay
from registry import dense_boft_input, dense_glora, dense_loha, dense_lokr, dense_lora, dense_oft
from test_golden import GOLDEN, read_json
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # [8, 12]; in the model `wide` [20, 36]
FF = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"  # [16, 12] and a bias
CONV = "down_blocks.0.resnets.0.conv1"  # [8, 4, 3, 3] and a bias; in `wide` [4, 12, 3, 3]
NORM = "down_blocks.0.attentions.0.transformer_blocks.0.norm1"  # [12] and a bias
QKV, MLP = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0"  # [24, 8], [16, 8]


class Meaningless(Exception):
    """By the definitions these tensors are no such layer: every program of ours has to say so."""


@dataclass(frozen=True)
class Place:
    """A layer of a file: rows `start` to `stop` of a layer of the model."""

    module: str
    suffixes: Mapping[str, tuple[int, ...]]
    alpha: float | None = 3.0
    rows: tuple[int, int] | None = None
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """A right file.

    Attributes:
        places: name of a layer in the file -> where it belongs.
        model: of tests/golden, as `unet`, `wide` or `flux`.
        whole: keys of the whole file -> value.
        metadata: of its header.
        config: adapter_config.json beside it.
        arguments: of a network for it, beside what it says itself.
    """

    places: Mapping[str, Place]
    model: str = "unet_norms"
    whole: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    arguments: Mapping[str, str] = field(default_factory=dict)

    @property
    def entry(self) -> str:
        return "networks.lora_flux" if self.model == "flux" else "networks.lora"

    def tensors(self) -> Tensors:
        found: Tensors = {}
        for name, place in self.places.items():
            for suffix, shape in place.suffixes.items():
                key, value = f"{name}.{suffix}", place.values.get(suffix)
                random = torch.Generator().manual_seed(zlib.crc32(key.encode()))
                own = 0.3 * torch.randn(shape, generator=random)
                near_one = suffix.startswith(("dora", "lora_magnitude", "resc", "boft_s"))
                found[key] = torch.full(shape, value) if value is not None else own.abs() + 1 if near_one else own
            if place.alpha is not None:
                found[f"{name}.alpha"] = torch.tensor(place.alpha)
        return found | {key: torch.tensor(value) for key, value in self.whole.items()}

    def models(self) -> nn.Module:
        return next(iter(replay.build(read_json(GOLDEN / "5cb7757" / "models.json")[self.model]).values()))


@functools.cache
def weights_of(model: str) -> Tensors:
    return {key: tensor.clone() for key, tensor in Form({}, model).models().state_dict().items()}


# -- the forms


def kohya(module: str, text: str = "lora_unet_") -> str:
    return text + module.replace(".", "_")


def lora(o: int, i: int, *kernel: int, r: int = 2, **more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"lora_down.weight": (r, i, *kernel), "lora_up.weight": (o, r, *[1] * len(kernel)), **more}


def loha(o: int, j: int) -> dict[str, tuple[int, ...]]:
    return {"hada_w1_a": (o, 2), "hada_w1_b": (2, j), "hada_w2_a": (o, 2), "hada_w2_b": (2, j)}


def glora(o: int, i: int, *kernel: int) -> dict[str, tuple[int, ...]]:
    one = [1] * len(kernel)
    names = {"a1": (i, 2, *one), "a2": (2, i, *one), "b1": (o, 2, *one), "b2": (2, i, *kernel)}
    return {f"{name}.weight": shape for name, shape in names.items()}


def sd(q: Mapping[str, tuple[int, ...]], conv: Mapping[str, tuple[int, ...]], **more: Any) -> dict[str, Place]:
    return {kohya(Q): Place(Q, q, **more), kohya(CONV): Place(CONV, conv, **more)}


def forms(real: bool) -> dict[str, Form]:
    """All of them, for the toy models, or in the sizes of Stable Diffusion 1.5 and FLUX.1."""
    q, wide_q, ff = ((320, 320), (320, 320), (320, 1280)) if real else ((8, 12), (20, 36), (16, 12))
    conv, wide_conv = ((320, 320, 3, 3), (320, 320, 3, 3)) if real else ((8, 4, 3, 3), (4, 12, 3, 3))
    qkv, mlp, norm = ((9216, 3072), (12288, 3072), 320) if real else ((24, 8), (16, 8), 12)
    (o, i), (co, ci, *k), part = q, conv, qkv[0] // 3
    D = 5 if real else 6
    w1, w2 = (wide_q[0] // 5, wide_q[1] // D), (wide_conv[0] // 2, wide_conv[1] // 4)
    plain = sd(lora(*q), lora(*conv))
    rows, columns, of_conv = {"dora_scale": (o, 1)}, {"dora_scale": (1, i)}, {"dora_scale": (co, 1, 1, 1)}
    rotated, rescale = {"oft_blocks": (o // 4, 4, 4)}, {"rescale": (co, 1, 1, 1)}
    pair = {"lora_A.weight": (2, qkv[1]), "lora_B.weight": (part, 2)}
    peft = {"lora_A.weight": (2, i), "lora_B.weight": (o, 2)}
    halves = [(f"hada_{name}{n}{side}", n) for n in (1, 2) for name, side in (("w", "_a"), ("w", "_b"), ("t", ""))]
    sizes = {"_a": (2, co), "_b": (2, ci), "": (2, 2, *k)}
    return {
        "lora": Form(plain),
        "lora bias": Form({kohya(FF): Place(FF, {**lora(*ff), "diff_b": ff[:1]})}),
        "lora tucker": Form(
            {kohya(CONV): Place(CONV, {**lora(co, ci, 1, 1), "lora_mid.weight": (2, 2, *k)}), kohya(Q): plain[kohya(Q)]}
        ),
        "lora lycoris": Form({kohya(Q, "lycoris_"): Place(Q, lora(*q))}),
        "dora rows": Form(sd({**lora(*q), **rows}, {**lora(*conv), **of_conv})),
        "dora columns": Form(sd({**lora(*q), **columns}, {**lora(*conv), "dora_scale": (1, ci, 1, 1)})),
        "dylora": Form(
            plain, metadata={"ss_network_module": "networks.dylora", "ss_network_args": '{"algo": "dylora"}'}
        ),
        "lora_fa": Form(plain, arguments={"algo": "lora_fa"}),
        "tlora": Form(plain, arguments={"algo": "tlora"}),
        "loha": Form(sd(loha(*q), loha(co, ci * 9))),
        "loha tucker": Form({kohya(CONV): Place(CONV, {name: sizes[name[7:]] for name, _ in halves})}),
        "loha dora": Form(sd({**loha(*q), **rows}, {**loha(co, ci * 9), **of_conv})),
        "lokr whole": Form(
            sd({"lokr_w1": w1, "lokr_w2": (5, D)}, {"lokr_w1": (2, wide_conv[1] // 4), "lokr_w2": (w2[0], 4, *k)}),
            "wide",
        ),
        "lokr": Form(
            sd(
                {"lokr_w1": w1, "lokr_w2_a": (5, 2), "lokr_w2_b": (2, D)},
                {"lokr_w1": (2, w2[1]), "lokr_w2_a": (w2[0], 2), "lokr_w2_b": (2, 36)},
            ),
            "wide",
        ),
        "lokr both": Form(
            {
                kohya(Q): Place(
                    Q,
                    {"lokr_w1_a": (w1[0], 2), "lokr_w1_b": (2, w1[1]), "lokr_w2_a": (5, 2), "lokr_w2_b": (2, D)},
                )
            },
            "wide",
        ),
        "lokr tucker": Form(
            {
                kohya(CONV): Place(
                    CONV,
                    {"lokr_w1": (2, w2[1]), "lokr_w2_a": (2, w2[0]), "lokr_w2_b": (2, 4), "lokr_t2": (2, 2, *k)},
                )
            },
            "wide",
        ),
        "lokr dora": Form(
            {kohya(Q): Place(Q, {"lokr_w1": w1, "lokr_w2": (5, D), "dora_scale": (1, wide_q[1])})}, "wide"
        ),
        "glora": Form(sd(glora(*q), glora(*conv))),
        "full": Form({kohya(Q): Place(Q, {"diff": q}), kohya(FF): Place(FF, {"diff": ff, "diff_b": ff[:1]})}),
        "norm": Form({kohya(NORM): Place(NORM, {"w_norm": (norm,), "b_norm": (norm,)})}),
        "norm diff": Form({kohya(NORM): Place(NORM, {"diff": (norm,), "diff_b": (norm,)}, None)}),
        "oft": Form(sd(rotated, rotated, alpha=0.0)),
        "oft limited": Form(sd(rotated, {**rotated, **rescale}, alpha=0.01)),
        "oft parts": Form(
            {kohya(QKV): Place(QKV, {f"oft_blocks.{n}": (part // 4, 4, 4) for n in range(3)}, 0.0)}, "flux"
        ),
        "oft input": Form(sd({"oft_R.weight": (i // 4, 6)}, {"oft_R.weight": (ci, 36)}, alpha=None)),
        "boft": Form(
            sd({"oft_blocks": (2, 2, o // 2, o // 2)}, {"oft_blocks": (2, 2, co // 2, co // 2), **rescale}, alpha=0.0)
        ),
        "boft input": Form(sd({"boft_R": (1, i // 4, 4, 4), "boft_s": (o, 1)}, {"boft_R": (1, ci, 9, 9)}, alpha=None)),
        "ia3": Form(
            {
                kohya(Q): Place(Q, {"weight": (o,), "on_input": ()}, values={"on_input": 0.0}),
                kohya(CONV): Place(CONV, {"weight": (1, ci, 1, 1), "on_input": ()}, values={"on_input": 1.0}),
            }
        ),
        "blissful": Form(
            {kohya(Q): Place(Q, {**lora(*q), "dora_layer.weight": (o,)})},
            whole={"use_rslora_flag": 1.0, "use_dora_flag": 1.0},
        ),
        "comfyui dora": Form({kohya(Q): Place(Q, {**lora(*q), **rows})}, whole={"use_folded_dora_flag": 1.0}),
        "comfyui flux": Form({f"diffusion_model.{QKV}": Place(QKV, lora(*qkv), None)}, "flux"),
        "split": Form({kohya(QKV): Place(QKV, lora(*qkv, r=6)), kohya(MLP): Place(MLP, lora(*mlp))}, "flux"),
        "diffusers": Form(
            {
                "transformer.transformer_blocks.0.attn.to_q": Place(QKV, pair, None, (0, part)),
                "transformer.transformer_blocks.0.attn.to_v": Place(QKV, pair, None, (2 * part, 3 * part)),
                "transformer.transformer_blocks.0.ff.net.0.proj": Place(
                    MLP, {"lora_A.weight": (3, mlp[1]), "lora_B.weight": (mlp[0], 3)}, None
                ),
            },
            "flux",
        ),
        "peft": Form(
            {f"base_model.model.{Q}": Place(Q, {**peft, "lora_magnitude_vector": (o,)}, None)},
            config={"peft_type": "LORA", "r": 2, "lora_alpha": 5, "use_dora": True},
        ),
        "peft header": Form(
            {f"unet.{Q}": Place(Q, peft, None)},
            metadata={"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 5})},
        ),
    }


FORMS, REAL = forms(real=False), forms(real=True)


# -- the definitions


OTHER_SUFFIXES = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "dora_layer.weight": "dora_scale",
}
FULL_NAMES = {"w_norm": "diff", "b_norm": "diff_b"}


def outcome(form: Form, tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensors:
    """Every tensor of the model that the file changes, in float64.

    Args:
        form: which the file had before something was done to it.
        tensors: under the file's keys.
        scales: name of a layer -> its scale where no alpha says it.

    Raises:
        Meaningless: see there.
    """
    old = {key: tensor.double() for key, tensor in weights_of(form.model).items()}
    new = dict(old)
    for name, place in form.places.items():
        layer = _own(name, tensors)
        rows = slice(*(place.rows or (None,)))
        for key, tensor in layer_outcome(layer, old, place, rows, form, tensors, scales.get(name, 1.0)).items():
            new[key] = torch.cat(
                [new[key][: rows.start or 0], tensor, new[key][rows.stop :] if rows.stop else new[key][:0]]
            )
    for key, tensor in new.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise Meaningless(f"{key} is not finite")
    return {key: tensor for key, tensor in new.items() if not torch.equal(tensor, old[key])}


def _own(name: str, tensors: Mapping[str, Tensor]) -> Tensors:
    found: Tensors = {}
    for key, tensor in tensors.items():
        if key.startswith(f"{name}."):
            suffix = key.removeprefix(f"{name}.")
            own = OTHER_SUFFIXES.get(suffix, suffix)
            require(own not in found, f"{own} twice")
            found[own] = tensor.flatten() if "vector" in suffix else tensor  # of a convolution it is [1, O, 1, 1]
    return found


def require(fine: bool, what: str) -> None:
    if not fine:
        raise Meaningless(what)


def number(tensor: Tensor, what: str) -> float:
    require(tensor.numel() == 1 and not tensor.is_complex(), f"{what} is no number")
    return float(tensor)


def layer_outcome(
    layer: Tensors, old: Tensors, place: Place, rows: slice, form: Form, tensors: Mapping[str, Tensor], said: float
) -> Tensors:
    if not layer:
        return {}
    key, bias_key = f"{place.module}.weight", f"{place.module}.bias"
    W = old[key][rows]
    alpha = layer.pop("alpha", None)
    given = None if alpha is None else number(alpha, "alpha")
    magnitude = layer.pop("dora_scale", None)
    require(bool(layer) or magnitude is None, "no factor")
    if not layer:  # an alpha alone acts on nothing
        return {}
    for suffix, tensor in layer.items():
        kind = tensor.is_floating_point() or suffix == "on_input" or not bool(tensor.any())
        require(kind and tensor.numel() > 0, f"{suffix} is no factor")
        require(bool(torch.isfinite(tensor.double()).all()), f"{suffix} is not finite")
    t = {FULL_NAMES.get(suffix, suffix): _trimmed(tensor.double(), max(4, W.dim())) for suffix, tensor in layer.items()}
    bias = t.pop("diff_b", None)
    changed: Tensors = {}
    if bias is not None and bool(bias.any()):
        require(bias_key in old and bias.shape == old[bias_key][rows].shape, "diff_b of another size")
        changed[bias_key] = old[bias_key][rows] + bias
    if not t:
        return changed
    blissful = form.whole.keys() & {"use_rslora_flag"}
    root = bool(blissful) and "use_rslora_flag" in tensors and number(tensors["use_rslora_flag"], "flag") != 0
    algorithm = next((a for a in ALGORITHMS if a.marks(t.keys())), None)
    if algorithm is None or not t.keys() <= algorithm.keys:
        raise Meaningless(f"{', '.join(t)} are no layer")
    if algorithm.weight is not None:
        require(magnitude is None, "no such layer has a magnitude")
        changed[key] = algorithm.weight(t, W, given)
        return changed
    assert algorithm.delta is not None
    dW, rank = algorithm.delta(t, W)
    require(dW.shape == W.shape, f"a change {tuple(dW.shape)} of {tuple(W.shape)}")
    if rank and given is not None:
        scale = given / (math.sqrt(rank) if root else rank) if given else 1.0
    else:
        scale = said if rank else 1.0
    V = W + scale * dW
    if magnitude is not None:
        V = _with_magnitude(V, W, magnitude, "use_folded_dora_flag" in tensors)
    changed[key] = V
    return changed


def _with_magnitude(V: Tensor, W: Tensor, magnitude: Tensor, folded: bool) -> Tensor:
    require(magnitude.is_floating_point() and V.dim() > 1, "no magnitude")
    m = magnitude.double()
    require(bool(torch.isfinite(m).all()), "a magnitude is not finite")
    shape = tuple(m.shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    axes = {(len(V), 1): 0, (len(V),): 0, (1, V.shape[1]): 1}
    require(shape in axes, f"a magnitude {shape}")
    axis = axes[shape]
    size = [1] * V.dim()
    size[axis] = -1
    of = W if folded and axis == 0 else V
    return m.reshape(size) * V / of.transpose(0, axis).flatten(1).norm(dim=1).reshape(size)


# -- the algorithms, by what their tensors must be like


def sizes(t: Tensors, **axes: str) -> dict[str, int]:
    """What the letters stand for, `lora_up="OR"`; a tensor may have further axes of length 1, and with `*` any."""
    found: dict[str, int] = {}
    for name, letters in axes.items():
        tensor = next(t[key] for key in (name, f"{name}.weight") if key in t)
        names = letters.rstrip("*")
        require(tensor.dim() >= len(names), f"{name} has too few axes")
        if names == letters:
            require(all(n == 1 for n in tensor.shape[len(names) :]), f"{name} has more axes")
        for letter, size in zip(names, tensor.shape, strict=False):
            require(found.setdefault(letter, size) == size, f"{name} has another {letter}")
    return found


def _lora(t: Tensors, W: Tensor) -> tuple[Tensor, int]:
    if "lora_mid.weight" in t:
        n = sizes(t, lora_down="RI", lora_mid="RR*", lora_up="OR")
        require(t["lora_mid.weight"].shape[2:] == W.shape[2:], "another kernel")
    else:
        n = sizes(t, lora_down="R*", lora_up="OR")
        down = t["lora_down.weight"]
        require(down.numel() == n["R"] * W[0].numel() and _alike(down.shape[1:], W.shape[1:]), "other columns")
    require(n["O"] == len(W), "other rows")
    return dense_lora(t, tuple(W.shape)), n["R"]


def _trimmed(t: Tensor, axes: int) -> Tensor:
    """Without further axes of length 1."""
    return t.reshape(t.shape[:axes]) if all(n == 1 for n in t.shape[axes:]) else t


def _alike(one: Sequence[int], other: Sequence[int]) -> bool:
    """But for axes of length 1 at the end, and a kernel that is laid out in one axis."""

    def short(shape: Sequence[int]) -> list[int]:
        kept = list(shape)
        while len(kept) > 1 and kept[-1] == 1:
            kept.pop()
        return kept

    return short(one) == short(other)


def _loha(t: Tensors, W: Tensor) -> tuple[Tensor, int]:
    if "hada_t1" in t or "hada_t2" in t:
        require("hada_t1" in t and "hada_t2" in t, "one core")
        n = sizes(t, hada_t1="RR*", hada_t2="RR*", hada_w1_a="RO", hada_w1_b="RI", hada_w2_a="RO", hada_w2_b="RI")
        require(all(t[f"hada_t{i}"].shape[2:] == W.shape[2:] for i in (1, 2)) and n["I"] == W.shape[1], "other columns")
    else:
        n = sizes(t, hada_w1_a="OR", hada_w1_b="RJ", hada_w2_a="OR", hada_w2_b="RJ")
        require(n["J"] == W[0].numel(), "other columns")
    require(n["O"] == len(W), "other rows")
    return dense_loha(_flat(t), tuple(W.shape)), n["R"]


def _flat(t: Tensors) -> Tensors:
    """Without axes of length 1 at the end."""
    return {
        key: x.flatten(1) if x.dim() > 2 and not key.startswith(("hada_t", "lokr_t", "lokr_w2")) else x
        for key, x in t.items()
    }


def _lokr(t: Tensors, W: Tensor) -> tuple[Tensor, int]:
    require(not {"lokr_w1", "lokr_w1_a"} <= t.keys() and not {"lokr_w2", "lokr_w2_a"} <= t.keys(), "both forms of one")
    low = {"lokr_w1_a": "AR", "lokr_w1_b": "RC"} if "lokr_w1" not in t else {"lokr_w1": "AC"}
    if "lokr_w2" in t:
        low["lokr_w2"] = "BD*"
    elif "lokr_t2" in t:
        low |= {"lokr_w2_a": "RB", "lokr_w2_b": "RD", "lokr_t2": "RR*"}
    else:
        low |= {"lokr_w2_a": "BR", "lokr_w2_b": "RE"}
    require(t.keys() <= low.keys(), "more than one form")
    n = sizes(t, **low)
    D = n["D"] if "D" in n else n["E"] / W[0, 0].numel()
    require((n["A"] * n["B"], n["C"] * D) == (len(W), W.shape[1]), "another weight")
    if "lokr_w2" in t or "lokr_t2" in t:
        require(
            _alike((1, *t["lokr_w2" if "lokr_w2" in t else "lokr_t2"].shape[2:]), (1, *W.shape[2:])), "another kernel"
        )
    flat = {
        k: x.reshape(x.shape[:2]) if k not in ("lokr_w2", "lokr_t2") else x.reshape(*x.shape[:2], *W.shape[2:])
        for k, x in t.items()
    }
    return dense_lokr(flat, tuple(W.shape)), n.get("R", 0)


def _glora(t: Tensors, W: Tensor) -> tuple[Tensor, int]:
    n = sizes(t, a1="IR", a2="RI", b1="OR", b2="RI*")
    require((n["O"], n["I"]) == tuple(W.shape[:2]), "another weight")
    require(_alike((1, *t["b2.weight"].shape[2:]), (1, *W.shape[2:])), "another kernel")
    return dense_glora({**t, "base": W}, tuple(W.shape)), n["R"]


def _full(t: Tensors, W: Tensor) -> tuple[Tensor, int]:
    return t["diff"].reshape(W.shape) if _alike(t["diff"].shape, W.shape) else t["diff"], 0


def _oft(t: Tensors, W: Tensor, alpha: float | None) -> Tensor:
    numbered = [_trimmed(t[f"oft_blocks.{i}"], 3) for i in range(len(t)) if f"oft_blocks.{i}" in t]
    parts = numbered or [t["oft_blocks"]]
    require(len(numbered) == sum(key.startswith("oft_blocks.") for key in t), "a gap in the parts")
    require(not numbered or "oft_blocks" not in t, "two forms")
    require(not alpha or alpha > 0, "a negative limit")
    for blocks in parts:
        require(blocks.dim() in (3, 4) and blocks.shape[-1] == blocks.shape[-2], "no blocks")
    rows = [math.prod(blocks.shape[-3:-1]) for blocks in parts]
    require(sum(rows) == len(W), "other rows")
    if parts[0].dim() == 4:
        stages, count, size, _ = parts[0].shape
        require(2 ** (stages - 1) == count and size % 2 == 0 and len(parts) == 1, "no butterfly")
    else:
        require(all(b.dim() == 3 for b in parts), "two forms")
    adapter: Any = SimpleNamespace(side="output", chosen={"constraint": alpha or 0.0})
    turned = [dense_oft({"oft_blocks": b}, adapter, w) for b, w in zip(parts, W.split(rows), strict=True)]
    new = torch.cat(turned)
    if "rescale" in t:
        require(t["rescale"].numel() == len(W) == len(t["rescale"]), "other rows of rescale")
        new = t["rescale"].reshape(-1, *[1] * (W.dim() - 1)) * new
    return new


def _oft_input(t: Tensors, W: Tensor, alpha: float | None) -> Tensor:
    G = t["oft_R.weight"]
    require(G.dim() == 2, "no triangles")
    size = next((n for n in range(2, 200) if n * (n - 1) == 2 * G.shape[1]), 0)
    columns = W[0].numel()
    require(size > 0 and (len(G) * size == columns or (len(G) == 1 and columns % size == 0)), "other columns")
    require(alpha is None, "an alpha")
    blocks = G.new_zeros(len(G), size, size)
    upper = torch.triu_indices(size, size, 1)
    blocks[:, upper[0], upper[1]] = G if W.dim() > 2 else -G
    adapter: Any = SimpleNamespace(side="columns", chosen={})
    return dense_oft({"oft_blocks": blocks}, adapter, W)


def _boft_input(t: Tensors, W: Tensor, alpha: float | None) -> Tensor:
    R = t["boft_R"]
    require(R.dim() == 4 and R.shape[2] == R.shape[3] and R.shape[1] * R.shape[2] == W[0].numel(), "other columns")
    stages, count, size, _ = R.shape
    require(stages == 1 or (size % 2 == 0 and count % 2 ** (stages - 1) == 0), "no butterfly")
    own = {"boft_R": R}
    if "boft_s" in t:
        require(t["boft_s"].numel() == len(W), "other rows")
        own["boft_s"] = t["boft_s"].reshape(-1, 1) - 1
    return dense_boft_input(own, None, W).reshape(W.shape)  # type: ignore[arg-type]


def _ia3(t: Tensors, W: Tensor, alpha: float | None) -> Tensor:
    axis = 1 if number(t["on_input"], "on_input") else 0
    w = t["weight"]
    require(max(w.shape, default=1) == w.numel() == W.shape[axis], "other features")
    size = [1] * W.dim()
    size[axis] = -1
    return W * (1 + w.reshape(size))


@dataclass(frozen=True)
class Algorithm:
    """Its layers have one of `required` and nothing but `keys`."""

    required: tuple[str, ...]
    keys: frozenset[str]
    delta: Callable[[Tensors, Tensor], tuple[Tensor, int]] | None = None
    weight: Callable[[Tensors, Tensor, float | None], Tensor] | None = None

    def marks(self, keys: Any) -> bool:
        return all(any(key in keys for key in group.split("|")) for group in self.required)


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALGORITHMS = (
    Algorithm(
        ("lora_down.weight", "lora_up.weight"), _keys("lora_down.weight lora_mid.weight lora_up.weight"), delta=_lora
    ),
    Algorithm(
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        _keys("hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2"),
        delta=_loha,
    ),
    Algorithm(
        ("lokr_w1|lokr_w1_a", "lokr_w1|lokr_w1_b", "lokr_w2|lokr_w2_a", "lokr_w2|lokr_w2_b"),
        _keys("lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2"),
        delta=_lokr,
    ),
    Algorithm(
        ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
        _keys("a1.weight a2.weight b1.weight b2.weight"),
        delta=_glora,
    ),
    Algorithm(("diff",), _keys("diff"), delta=_full),
    Algorithm(
        ("oft_blocks|oft_blocks.0",), _keys("oft_blocks oft_blocks.0 oft_blocks.1 oft_blocks.2 rescale"), weight=_oft
    ),
    Algorithm(("oft_R.weight",), _keys("oft_R.weight"), weight=_oft_input),
    Algorithm(("boft_R",), _keys("boft_R boft_s"), weight=_boft_input),
    Algorithm(("weight", "on_input"), _keys("weight on_input"), weight=_ia3),
)
