"""What the tests must know of every algorithm: one entry each in ALGORITHMS.

The dense formulas are written from the definitions (LyCORIS sheet, the papers) over the keys of a file. They share no
code with the package, so that a mistake in it cannot hide in both. Letters: O x J weight, N = O * J, K positions of a
kernel, R rank, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from networks.algos import Adapter

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class AlgoData:
    """Of one algorithm. Either `delta` or `weight`; the rest where it differs from the default.

    Attributes:
        delta: of an additive one, (tensors, shape of the weight) -> dW without scale and scalar. The tensors stand
            under their suffixes in a file, buffers under their own names, the base weight under `base`.
        weight: of a multiplicative one, (tensors, adapter, W) -> W'.
        values: the values under which an option is tested that is no switch.
        same_shapes: options that change no shape of any layer; tests of their own show what they do.
        steady: options under which a pass has no random choice, and is the same at all timesteps.
        effects: an argument of its own -> (other arguments, its value) for which something of a network on Stable
            Diffusion changes.
        rank_axes: suffix -> axis of the rank index which a rank mask weighs, in `tucker_axes` that of the Tucker form;
            with twice as many values as the dim, each has its part of the mask.
        files: network arguments -> (suffix -> shape of a saved Linear at dim 4, its alpha at alpha 3), by hand from
            what other programs read; "O/8" = an eighth of its rows.
        flops: (adapter, T) -> FLOPs of forward and backward beside the frozen layer's 4TN.
        kept: (adapter, T) -> bytes kept for backward beside x and the parameters; None = not held to a number.
        least_dim: for layers of any width.
        learning_rate: of four steps on the demo's model, after which the loss has fallen.
        rate: the same relative to others', in tiny models.
        rounding: how many times as far as LoRA's its gradients are from the exact ones where activations have few bits.
        reloaded: how near, relative, a network from a file in fp32 is to the trained one.
        lycoris: the class there, `module:class`; "" = it has none, or none alike, see `unlike_lycoris`.
        unlike_lycoris: why its algorithm of this name is not compared.
    """

    delta: Callable[[Tensors, tuple[int, ...]], Tensor] | None = None
    weight: Callable[[Tensors, Adapter, Tensor], Tensor] | None = None
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    same_shapes: frozenset[str] = frozenset()
    steady: Mapping[str, Any] = field(default_factory=dict)
    effects: Mapping[str, tuple[Mapping[str, str], str]] = field(default_factory=dict)
    rank_axes: Mapping[str, int] = field(default_factory=dict)
    tucker_axes: Mapping[str, int] = field(default_factory=dict)
    files: tuple[tuple[Mapping[str, str], Mapping[str, tuple[Any, ...]], float | None], ...] = ()
    flops: Callable[[Adapter, int], float] | None = None
    kept: Callable[[Adapter, int], float] | None = None
    least_dim: int = 1
    learning_rate: float = 1e-3
    rate: float = 1.0
    rounding: float = 1.0
    reloaded: float | None = None
    lycoris: str = ""
    unlike_lycoris: str = ""


# -- the definitions


def dense_lora(t: Tensors, shape: tuple[int, ...]) -> Tensor:
    """up . down; Tucker sum_ab up[o, a] mid[a, b, k] down[b, i]."""
    up = t["lora_up.weight"].flatten(1)
    if "lora_mid.weight" in t:
        mid, down = t["lora_mid.weight"], t["lora_down.weight"].flatten(1)
        return torch.einsum("oa,ab...,bi->oi...", up, mid, down)
    return torch.einsum("or,r...->o...", up, t["lora_down.weight"]).reshape(shape)


def dense_loha(t: Tensors, shape: tuple[int, ...]) -> Tensor:
    """(w1_a w1_b) .* (w2_a w2_b); Tucker: each half sum_ab w_a[a, o] t[a, b, k] w_b[b, i]."""
    halves = []
    for n in (1, 2):
        a, b = t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]
        if f"hada_t{n}" in t:
            halves.append(torch.einsum("ao,ab...,bi->oi...", a, t[f"hada_t{n}"], b))
        else:
            halves.append(torch.einsum("or,rc->oc", a, b).reshape(shape))
    return halves[0] * halves[1]


def dense_lokr(t: Tensors, shape: tuple[int, ...]) -> Tensor:
    """kron(w1, w2), by torch.kron."""
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    kernel = shape[2:]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = torch.einsum("ab,ac...,cd->bd...", t["lokr_w2_a"], t["lokr_t2"], t["lokr_w2_b"])
    else:
        w2 = (t["lokr_w2_a"] @ t["lokr_w2_b"]).reshape(t["lokr_w2_a"].shape[0], -1, *kernel)
    return torch.kron(w1.reshape(*w1.shape, *[1] * len(kernel)), w2.contiguous())


def dense_glora(t: Tensors, shape: tuple[int, ...]) -> Tensor:
    """W a1 a2 + b1 b2; the first product on the channels."""
    a1, a2, b1, b2 = (t[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    on_channels = torch.einsum("oi...,ij->oj...", t["base"], a1.flatten(1) @ a2.flatten(1))
    return on_channels + torch.einsum("or,r...->o...", b1.flatten(1), b2).reshape(shape)


def dense_tlora(t: Tensors, shape: tuple[int, ...]) -> Tensor:
    """P diag(lam) Q - P0 diag(lam0) Q0, of changes and start."""
    p0, q0, lam0 = t["p0"].flatten(1), t["q0"].flatten(1), t["lam0"]
    p, q, lam = p0 + t["p_layer.weight"].flatten(1), q0 + t["q_layer.weight"].flatten(1), lam0 + t["lambda_layer"]
    return ((p @ torch.diag(lam[0])) @ q - (p0 @ torch.diag(lam0[0])) @ q0).reshape(shape)


def dense_oft(t: Tensors, adapter: Adapter, W: Tensor) -> Tensor:
    """T W, T made of dense matrices: Cayley's rotations of blocks, in stages for BOFT; or W T on the input side, where
    their series is cut off: of channels, or of columns, where one block may stand for all."""
    blocks = t["oft_blocks"]
    turned = {"output": W.flatten(1).T, "input": W.transpose(1, -1), "columns": W.flatten(1)}[adapter.side]
    features = turned.shape[-1]
    Q = blocks - blocks.transpose(-1, -2)
    constraint = adapter.chosen.get("constraint", 0) * features
    if constraint and Q.norm() > constraint:
        blocks = blocks * constraint / Q.norm()
    if adapter.side != "output":
        times = features // len(blocks) // blocks.shape[-1]
        turned = turned @ torch.block_diag(*[_series(B) for B in blocks] * times)
        return turned.transpose(1, -1) if adapter.side == "input" else turned.reshape(W.shape)
    T = torch.eye(len(W), dtype=W.dtype)
    for i, stage in enumerate(blocks[None] if blocks.dim() == 3 else blocks):
        R = torch.block_diag(*(_cayley(B) for B in stage))
        if blocks.dim() == 3:
            T = R.T @ T
            continue
        half = 2**i * stage.shape[-1] // 2  # features that lie `half` apart come side by side
        P = torch.eye(len(W), dtype=W.dtype)[torch.arange(len(W)).reshape(-1, 2, half).transpose(1, 2).flatten()]
        T = P.T @ R @ P @ T
    if "rescale" in t:  # of a live adapter, where it is a difference from 1
        T = (1 + t["rescale"].reshape(-1, 1)) * T
    return (T @ W.flatten(1)).reshape(W.shape)


def dense_boft_input(t: Tensors, adapter: Adapter, W: Tensor) -> Tensor:
    """s W R^T with R = P_p D_p P_p^T ... P_0 D_0 P_0^T of dense matrices, where P_i brings every second half block of
    2^i blocks together."""
    blocks = t["boft_R"]
    n, half = blocks[0].shape[0] * blocks.shape[-1], blocks.shape[-1] // 2
    R = torch.eye(n, dtype=W.dtype)
    for i, stage in enumerate(blocks):
        P = torch.eye(n, dtype=W.dtype)
        if len(blocks) > 1:
            P = P[torch.arange(n).reshape(-1, 2**i, 2, half).transpose(1, 2).flatten()]
        R = P @ torch.block_diag(*(_cayley(-B / 2) for B in stage)) @ P.T @ R
    s = 1 + t["boft_s"] if "boft_s" in t else 1  # of a live adapter, where it is a difference from 1
    return (s * (W.flatten(1) @ R.T)).reshape(W.shape)


def _cayley(B: Tensor) -> Tensor:
    Q = B - B.T
    one = torch.eye(len(Q), dtype=Q.dtype)
    return (one + Q) @ torch.linalg.inv(one - Q)


def _series(B: Tensor) -> Tensor:
    """The same of the input side: what its readers make of it."""
    Q = B - B.T
    return torch.eye(len(Q), dtype=Q.dtype) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q


def dense_ia3(t: Tensors, adapter: Adapter, W: Tensor) -> Tensor:
    """W (1 + w), by column or by row."""
    shape = (1, -1) if adapter.side == "input" else (-1, 1)
    return W * (1 + t["weight"]).reshape(*shape, *[1] * (W.dim() - 2))


# -- the cost


def low_rank_flops(a: Adapter, T: int) -> float:
    return 6 * T * a.dim * (a.geometry.columns + a.geometry.out_features)


def _loha_flops(a: Adapter, T: int) -> float:
    O, J, R = a.geometry.out_features, a.geometry.columns, a.dim
    return min(6 * T * R * R * (J + O), 6 * T * O * J + 16 * O * J * R)


def _lokr_sizes(a: Adapter) -> tuple[int, int, int, int, int]:
    A, C = a.laid_out.shapes["w1"]
    return A, a.geometry.out_features // A, C, a.geometry.in_features // C, a.geometry.kernel_size


def _lokr_flops(a: Adapter, T: int) -> float:
    A, B, C, D, K = _lokr_sizes(a)
    if "w2" in a.laid_out.shapes:
        return 6 * T * min(B * C * D * K + A * B * C, A * C * D + A * B * D * K)
    return 6 * T * a.dim * (a.geometry.columns + A * C + a.geometry.out_features)


def _lokr_kept(a: Adapter, T: int) -> float:
    A, B, C, D, K = _lokr_sizes(a)
    if "w2" not in a.laid_out.shapes:
        return 4 * T * a.dim * (A + C)
    w1_last = B * C * D * K + A * B * C <= A * C * D + A * B * D * K
    return 4 * T * (B * C if w1_last else A * D)


def _glora_flops(a: Adapter, T: int) -> float:
    """Two chains, and the product with the base weight; with a kernel one of them in front of the base."""
    g, R = a.geometry, a.dim
    first = 12 * T * R * g.in_features if g.has_kernel else 6 * T * R * (g.in_features + g.out_features)
    return low_rank_flops(a, T) + first + (0 if g.has_kernel else 4 * g.out_features * g.columns * R)


def _glora_kept(a: Adapter, T: int) -> float:
    """Both rank activations, and but for kernels the joined factors."""
    g, R = a.geometry, a.dim
    return 4 * (2 * T * R + (0 if g.has_kernel else 2 * R * (g.out_features + g.columns)))


def _dylora_ranks(a: Adapter) -> tuple[int, int]:
    """How many act, and learn."""
    assert a.number is not None
    last = (int(a.number) % -(-a.dim // a.block_size) + 1) * a.block_size
    return min(last, a.dim), min(last, a.dim) - last + a.block_size


def _dylora_flops(a: Adapter, T: int) -> float:
    acting, learning = _dylora_ranks(a)
    return 2 * T * (2 * acting + learning) * (a.geometry.columns + a.geometry.out_features)


def _rotation_flops(a: Adapter, T: int) -> float:
    """In blocks; 2 Q (1 - Q)^-1 by the inverse, and two products in its gradient, whatever the tokens."""
    shape, on_input = a.laid_out.shapes["blocks"], a.side == "input"
    features, size = a.geometry.in_features if on_input else a.geometry.out_features, shape[-1]
    one = 2 * features * size * size
    if len(shape) == 4 and shape[0] > 1:
        return _butterfly_flops(features, size, shape[0], T) + 3 * shape[0] * one
    turns, series = 6 * T * features * size, on_input and len(shape) == 3
    if series:  # 2 Q + 2 Q^2 + 2 Q^3 + Q^4: three products forward, six in their gradients
        return turns + 9 * one
    solved = bool(a.chosen.get("constraint")) or (len(shape) == 3 and len(a.laid_out.shapes) > 1)
    return turns + (one if solved else 3 * one)


def _butterfly_flops(features: int, size: int, stages: int, T: int) -> float:
    """Two stages are one rotation of twice the size: forward, its two gradients, and all but the last once more."""
    sizes = [2 * size] * (stages // 2) + [size] * (stages % 2)
    passes = sum(2 * T * features * n * (3 if i == len(sizes) - 1 else 4) for i, n in enumerate(sizes))
    return passes + 3 * (stages // 2) * 2 * features * (2 * size) ** 2


def _column_flops(a: Adapter, T: int) -> float:
    """The input is turned, or the columns of a weight with a kernel, whose change is a layer of its own."""
    stages, _, size, _ = a.laid_out.shapes["blocks"]
    O, J = a.geometry.out_features, a.geometry.columns
    turned = 6 * T * J * size if a.side == "input" else 4 * O * J * size + 6 * T * O * J
    return stages * (
        turned + (6 if a.side == "input" else 2) * J * size * size
    )  # the inverse, with one product or three


def _reweighted_kept(a: Adapter, T: int) -> float:
    """What comes out of the base; on the input side nothing but x."""
    return 4 * T * a.geometry.out_features if a.side == "output" else 0


_INTO_DIM = {"lora_down.weight": (4, "I"), "lora_up.weight": ("O", 4)}
_LOKR8 = {"lokr_w1": (8, 8), "lokr_w2_a": ("O/8", 4), "lokr_w2_b": (4, "I/8")}

# -- the algorithms

ALGORITHMS: dict[str, AlgoData] = {
    "lora": AlgoData(
        delta=dense_lora,
        rank_axes={"lora_up.weight": 1},
        files=(
            ({}, _INTO_DIM, 3),
            ({"use_dora": "True"}, {**_INTO_DIM, "dora_scale": ("O", 1)}, 3),
        ),
        flops=low_rank_flops,
        kept=lambda a, T: 4 * T * a.dim,
        lycoris="lycoris.modules.locon:LoConModule",
    ),
    "loha": AlgoData(
        delta=dense_loha,
        rank_axes={"hada_w1_a": 1},
        tucker_axes={"hada_w1_a": 0},
        files=(({}, {"hada_w1_a": ("O", 4), "hada_w1_b": (4, "I"), "hada_w2_a": ("O", 4), "hada_w2_b": (4, "I")}, 3),),
        flops=_loha_flops,
        lycoris="lycoris.modules.loha:LohaModule",
    ),
    "lokr": AlgoData(
        delta=dense_lokr,
        values={"factor": (9,)},
        effects={
            "factor": ({}, "2"),
            "decompose_both": ({"network_reg_dims": ".*=1"}, "True"),
            "full_matrix": ({"factor": "2", "network_reg_dims": ".*=2"}, "True"),
            "unbalanced_factorization": ({"factor": "2"}, "True"),
            "init_lokr_norm": ({"full_matrix": "True"}, "0.01"),
        },
        rank_axes={"lokr_w2_a": 1},
        tucker_axes={"lokr_w2_a": 0},
        files=(
            ({"factor": "8"}, _LOKR8, 3),
            ({"factor": "8", "full_matrix": "True"}, {"lokr_w1": (8, 8), "lokr_w2": ("O/8", "I/8")}, 4),
            ({"factor": "8", "use_dora": "True", "wd_on_output": "False"}, {**_LOKR8, "dora_scale": (1, "I")}, 3),
        ),
        flops=_lokr_flops,
        kept=_lokr_kept,
        lycoris="lycoris.modules.lokr:LokrModule",
    ),
    "dylora": AlgoData(
        delta=dense_lora,
        values={"block_size": (3,)},
        same_shapes=frozenset({"block_size"}),
        steady={"block_size": 1 << 30},
        effects={"block_size": ({}, "2")},
        rank_axes={"lora_up.weight": 1},
        files=(({}, _INTO_DIM, 3),),
        flops=_dylora_flops,
        kept=lambda a, T: 4 * T * _dylora_ranks(a)[0],
        unlike_lycoris="it scales by the block, not by the rank",
    ),
    "lora_fa": AlgoData(
        delta=dense_lora,
        rank_axes={"lora_up.weight": 1},
        files=(({}, _INTO_DIM, 3),),
        flops=lambda a, T: T * a.dim * (4 * a.geometry.columns + 6 * a.geometry.out_features),
        kept=lambda a, T: 4 * T * a.dim,
    ),
    "glora": AlgoData(
        delta=dense_glora,
        rank_axes={"a2.weight": 0, "b1.weight": 1},
        files=(({}, {"a1.weight": ("I", 4), "a2.weight": (4, "I"), "b1.weight": ("O", 4), "b2.weight": (4, "I")}, 3),),
        flops=_glora_flops,
        kept=_glora_kept,
        lycoris="lycoris.modules.glora:GLoRAModule",
    ),
    "tlora": AlgoData(
        delta=dense_tlora,
        # What the last three do shows in time alone: test_tlora.py.
        values={
            "sig_type": ("middle",),
            "use_data_init": (False,),
            "min_rank": (),
            "alpha_rank_scale": (),
            "mask_group_id": (),
        },
        same_shapes=frozenset({"sig_type", "use_data_init"}),
        steady={"alpha_rank_scale": 0.0},
        effects={
            "sig_type": ({}, "last"),
            "use_data_init": ({}, "False"),
            "min_rank": ({}, "4"),
            "alpha_rank_scale": ({}, "8"),
        },
        rank_axes={"lambda_layer": 1, "lam0": 1},
        files=(({}, {"lora_down.weight": (8, "I"), "lora_up.weight": ("O", 8)}, 6),),
        flops=lambda a, T: 2 * low_rank_flops(a, T),
        reloaded=1e-4,  # its factors are divided anew into directions and lengths; float64: test_reparam.py
        unlike_lycoris="test_tlora.py compares it",
    ),
    "full": AlgoData(
        delta=lambda t, shape: t["diff"],
        # in fp32, in which W + s dW is one weight: the gradient of dW alone
        flops=lambda a, T: 2 * T * a.geometry.out_features * a.geometry.columns,
        kept=lambda a, T: 0,
        unlike_lycoris="the difference itself, with nothing to compute: test_full.py",
    ),
    "norm": AlgoData(delta=lambda t, shape: t["w_norm"]),
    "diag-oft": AlgoData(
        weight=dense_oft,
        values={"constraint": (2**-5,)},  # is exact in fp32, and limits random blocks
        same_shapes=frozenset({"constraint"}),
        effects={
            "constraint": ({}, "0.001"),
            "rescaled": ({}, "True"),
            "dim_is_count": ({"network_reg_dims": ".*=2"}, "True"),
            "train_on_input": ({}, "True"),
            "dim_is_size": ({"train_on_input": "True", "network_reg_dims": ".*=8"}, "True"),
            "block_share": ({"train_on_input": "True"}, "True"),
        },
        files=(
            ({}, {"oft_blocks": ("O/4", 4, 4)}, 0),
            ({"dim_is_count": "True"}, {"oft_blocks": (4, "O/4", "O/4")}, 0),
            # sd-scripts' networks.oft_v2 has no alpha
            ({"dim_is_count": "True", "train_on_input": "True"}, {"oft_R.weight": (4, "above the diagonal")}, None),
        ),
        flops=_rotation_flops,
        kept=_reweighted_kept,
        unlike_lycoris="test_reweight.py compares it",
    ),
    "boft": AlgoData(
        weight=dense_oft,
        values={"constraint": (2**-5,)},
        same_shapes=frozenset({"constraint"}),
        flops=_rotation_flops,
        kept=_reweighted_kept,
        least_dim=110,  # its blocks must divide every width
        rate=0.1,  # and are as wide as tiny layers
        rounding=2.0,  # five stages in a row
        unlike_lycoris="test_reweight.py compares it",
    ),
    "boft-input": AlgoData(
        weight=dense_boft_input,
        values={"butterflies": (2,)},
        effects={"butterflies": ({}, "2")},
        files=(({}, {"boft_R": (1, "I/4", 4, 4)}, None),),
        flops=_column_flops,
        unlike_lycoris="it has none",
    ),
    "ia3": AlgoData(
        weight=dense_ia3,
        files=(
            ({}, {"weight": ("O",), "on_input": ()}, 4),
            ({"train_on_input": "True"}, {"weight": ("I",), "on_input": ()}, 4),
        ),
        flops=lambda a, T: 0,
        kept=_reweighted_kept,
        unlike_lycoris="test_reweight.py compares it",
    ),
}


def data_of(algo: str) -> AlgoData:
    """The entry of an algorithm.

    Raises:
        LookupError: it has none, with what to write.
    """
    if algo not in ALGORITHMS:
        raise LookupError(
            f"tests/registry.py knows nothing of the algorithm {algo}: add an entry {algo!r} to its ALGORITHMS with a "
            "dense formula of dW (or of W') over the keys of a file, written from the paper, not from networks/"
        )
    return ALGORITHMS[algo]
