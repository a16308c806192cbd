"""More ranks: the update stays, and the new ones learn. Updates by formulas of numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from networks.algos import ALGOS, make_adapter
from networks.files.codec import SavedLayer
from networks.files.resize import fitted, grown, shrunk
from networks.tensors.geometry import Geometry

LINEAR, SQUARE = nn.Linear(32, 48), nn.Linear(256, 256)
CONV = nn.Conv2d(32, 48, 3, padding=1)
CASES = [  # algorithm, options, layer
    ("lora", {}, LINEAR),
    ("lora", {}, CONV),
    ("lora", {"use_tucker": True}, CONV),
    ("lora_fa", {}, LINEAR),
    ("dylora", {"block_size": 2}, LINEAR),
    ("loha", {}, LINEAR),
    ("loha", {}, CONV),
    ("loha", {"use_tucker": True}, CONV),
    ("lokr", {"factor": 2}, LINEAR),
    ("lokr", {"factor": 2}, CONV),
    ("lokr", {"factor": 2, "use_tucker": True}, CONV),
    ("lokr", {"split": ((24, 2), (16, 2)), "decompose_both": True}, LINEAR),
    ("lokr", {"decompose_both": True}, SQUARE),
    ("glora", {}, LINEAR),
    ("glora", {}, CONV),
    ("tlora", {"use_data_init": False}, LINEAR),
]
NAMES = [f"{algo}-{'-'.join(options)}-{type(layer).__name__}" for algo, options, layer in CASES]


def dense(t: Mapping[str, Tensor], alpha: float, weight: np.ndarray) -> np.ndarray:
    """alpha / rank times what the tensors of a layer in a file are, [O, I, *kernel], in float64."""
    p = {key.removesuffix(".weight"): tensor.double().numpy() for key, tensor in t.items()}
    O, kernel = weight.shape[0], weight.shape[2:]
    if "lora_down" in p:
        rank = len(p["lora_down"])
        down, up = p["lora_down"].reshape(rank, -1), p["lora_up"].reshape(O, -1)
        if "lora_mid" in p:
            return alpha / rank * np.einsum("oa,abhw,bi->oihw", up, p["lora_mid"], down)
        return alpha / rank * (up @ down).reshape(weight.shape)
    if "hada_w1_a" in p:
        rank, halves = len(p["hada_w1_b"]), []
        for n in (1, 2):
            a, b = p[f"hada_w{n}_a"], p[f"hada_w{n}_b"]
            core = p.get(f"hada_t{n}")
            halves.append((a @ b).reshape(weight.shape) if core is None else np.einsum("ao,abhw,bi->oihw", a, core, b))
        return alpha / rank * halves[0] * halves[1]
    if "a1" in p:
        rank, a = len(p["a2"]), p["a1"].reshape(weight.shape[1], -1) @ p["a2"].reshape(-1, weight.shape[1])
        b = (p["b1"].reshape(O, -1) @ p["b2"].reshape(rank, -1)).reshape(weight.shape)
        return alpha / rank * (np.einsum("oi...,ij->oj...", weight, a) + b)
    low1, low2 = "lokr_w1_a" in p, "lokr_w2_a" in p
    w1 = p["lokr_w1_a"] @ p["lokr_w1_b"] if low1 else p["lokr_w1"]
    if "lokr_t2" in p:
        w2 = np.einsum("ab,achw,cd->bdhw", p["lokr_w2_a"], p["lokr_t2"], p["lokr_w2_b"])
    else:
        w2 = (p["lokr_w2_a"] @ p["lokr_w2_b"]) if low2 else p["lokr_w2"]
        w2 = w2.reshape(O // w1.shape[0], -1, *kernel)
    scale = alpha / len(p["lokr_w1_b"] if low1 else p["lokr_w2_b"]) if low1 or low2 else 1.0
    found = np.einsum("ac,bd...->abcd...", w1, w2)
    return scale * found.reshape(weight.shape)


def layer_of(algo: str, options: Mapping[str, Any], module: nn.Module, dim: int = 3) -> SavedLayer:
    """A trained layer, as a file has it."""
    torch.manual_seed(0)
    adapter = make_adapter(ALGOS[algo], Geometry.of(module), dim, options)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    spec = ALGOS[algo].spec
    return SavedLayer("layer", ALGOS[spec.file_algo], {k: t.clone() for k, t in adapter.pack().items()}, 5.0)


@pytest.mark.parametrize(("algo", "options", "module"), CASES, ids=NAMES)
def test_more_ranks_change_nothing_and_learn(algo: str, options: Mapping[str, Any], module: nn.Module) -> None:
    weight = module.weight.detach()
    W, saved, geometry = weight.double().numpy(), layer_of(algo, options, module), Geometry.of(module)
    adapter = make_adapter(ALGOS[algo], geometry, 7, options)
    by_tool = ALGOS[algo] if algo == "tlora" else saved.algorithm
    ways = {"network": fitted(saved, adapter)}
    if algo != "tlora":
        ways["tool"] = grown(saved, 7, tuple(weight.shape), by_tool, 0, lambda: None)
    before = dense(saved.tensors, 5.0, W)
    for way, new in ways.items():
        assert new.alpha is not None
        np.testing.assert_allclose(dense(new.tensors, new.alpha, W), before, rtol=1e-6, atol=1e-7, err_msg=way)
        for suffix, tensor in saved.tensors.items():  # bit for bit, in the first corner
            if algo != "tlora":
                assert torch.equal(new.tensors[suffix][tuple(map(slice, tensor.shape))], tensor), (way, suffix)
        adapter.unpack_(new.tensors)
        # What a step does to each rank: no rank may be one that never moves.
        torch.manual_seed(1)
        change = adapter.weight_change(weight, 1.0)
        (change * torch.randn_like(change)).sum().backward()
        for name, p in adapter.named_parameters():
            axes = [axis for axis in (0, 1) if p.dim() > 1 and p.shape[axis] == 7 and name in ALGOS[algo].spec.grows]
            for axis in axes:
                assert p.grad is not None
                assert bool((p.grad.abs().movedim(axis, 0).flatten(1).sum(1) > 0).all()), (way, name)
        adapter.zero_grad()


@pytest.mark.parametrize(("algo", "options", "module"), CASES, ids=NAMES)
def test_fewer_ranks_are_the_nearest_update(algo: str, options: Mapping[str, Any], module: nn.Module) -> None:
    """Of a matrix by its singular values; of a core, halves and A beside B, within a known bound."""
    W, saved = module.weight.detach().double().numpy(), layer_of(algo, options, module, 5)
    adapter = make_adapter(ALGOS[algo], Geometry.of(module), 2, options)
    small = fitted(saved, adapter)
    adapter.unpack_(small.tensors)
    assert small.alpha is not None
    before, after = dense(saved.tensors, 5.0, W), dense(small.tensors, small.alpha, W)
    lost = np.linalg.norm(after - before)
    values = np.linalg.svd(before.reshape(len(W), -1), compute_uv=False)
    if algo in ("lora", "lora_fa", "dylora") and not options.get("use_tucker"):
        assert lost == pytest.approx(np.linalg.norm(values[2:]), rel=1e-5)
        as_tool = shrunk(saved, lambda s: 2)
        for key, tensor in as_tool.tensors.items():
            torch.testing.assert_close(tensor, small.tensors[key])
    elif algo == "lokr" and options.get("use_tucker") is None and "decompose_both" not in options:
        w2 = saved.tensors["lokr_w2_a"].double() @ saved.tensors["lokr_w2_b"].double()
        s = torch.linalg.svdvals(w2)
        assert lost / np.linalg.norm(before) == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-5)
    elif algo == "loha" and not options.get("use_tucker"):  # as near as a LoRA of that rank, or nearer
        assert lost < np.linalg.norm(values[2:])
    elif algo == "tlora":  # the first pairs of start and change, since others would act at other times
        down, up = (saved.tensors[f"lora_{key}.weight"].double().numpy() for key in ("down", "up"))
        pairs = [0, 1, 5, 6]
        np.testing.assert_allclose(after, 5 / 10 * up[:, pairs] @ down[pairs], rtol=1e-4, atol=1e-6)
    else:
        assert lost < np.linalg.norm(before)
