"""Normalisation layers against an independent formula in float64, their own classes, and lycoris-lora."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from diffusers.models.normalization import FP32LayerNorm, MochiRMSNorm
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
from helpers_numeric import assert_close
from torch import Tensor, nn

from networks.algos.norm import Norm
from networks.files import codec
from networks.files.merge import merged_bias, merged_weight
from networks.layers.adapted import AdaptedLayer
from networks.layers.dropout import Dropouts
from networks.layers.runtime import Runtime
from networks.tensors.norms import NormGeometry

C = 24


class ScaledRMSNorm(nn.Module):
    """As in FLUX.1's trainers: the weight is called scale, eps stands in the code."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale


ScaledRMSNorm.__name__ = "RMSNorm"

# name -> (layer, shape of an input, "layer" / "group" / "rms")
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "layer": (lambda: nn.LayerNorm(C, eps=1e-3), (2, 5, C), "layer"),
    "layer_no_bias": (lambda: nn.LayerNorm(C, bias=False), (2, 5, C), "layer"),
    "layer_bare": (lambda: nn.LayerNorm(C, elementwise_affine=False), (2, 5, C), "layer"),
    "layer_two_axes": (lambda: nn.LayerNorm((3, C)), (2, 5, 3, C), "layer"),
    "layer_fp32": (lambda: FP32LayerNorm(C), (2, 5, C), "layer"),
    "group": (lambda: nn.GroupNorm(4, C, eps=1e-3), (2, C, 3, 5), "group"),
    "group_1d": (lambda: nn.GroupNorm(6, C), (2, C, 7), "group"),
    "group_flat": (lambda: nn.GroupNorm(6, C), (4, C), "group"),
    "group_bare": (lambda: nn.GroupNorm(4, C, affine=False), (2, C, 3, 5), "group"),
    "rms": (lambda: nn.RMSNorm(C), (2, 5, C), "rms"),
    "rms_eps": (lambda: nn.RMSNorm(C, eps=1e-2), (2, 5, C), "rms"),
    "rms_bare": (lambda: nn.RMSNorm(C, eps=1e-2, elementwise_affine=False), (2, 5, C), "rms"),
    "rms_diffusers": (lambda: DiffusersRMSNorm(C, 1e-2), (2, 5, C), "rms"),
    "rms_diffusers_bias": (lambda: DiffusersRMSNorm(C, 1e-2, bias=True), (2, 5, C), "rms"),
    "rms_diffusers_bare": (lambda: DiffusersRMSNorm(C, 1e-2, elementwise_affine=False), (2, 5, C), "rms"),
    "rms_mochi": (lambda: MochiRMSNorm(C, 1e-2), (2, 5, C), "rms"),
    "rms_scale": (lambda: ScaledRMSNorm(C), (2, 3, 5, C), "rms"),
    "t5": (lambda: transformers.models.t5.modeling_t5.T5LayerNorm(C, 1e-2), (2, 5, C), "rms"),
    "llama": (lambda: transformers.models.llama.modeling_llama.LlamaRMSNorm(C, 1e-2), (2, 5, C), "rms"),
    "qwen3": (lambda: transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm(C, 1e-2), (2, 5, C), "rms"),
    "gemma2": (lambda: transformers.models.gemma2.modeling_gemma2.Gemma2RMSNorm(C, 1e-2), (2, 5, C), "rms"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
# These compute in fp32, whatever goes in.
IN_FP32 = {"layer_fp32", "rms_mochi", "t5", "llama", "qwen3", "gemma2"} | {k for k in KINDS if "diffusers" in k}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def weight_of(base: nn.Module) -> Tensor | None:
    return getattr(base, "weight", getattr(base, "scale", None))


def single(kind: str, multiplier: Any = 0.7, dtype: torch.dtype = torch.float64) -> tuple[AdaptedLayer, Tensor]:
    """A layer with random weight and bias, and its randomised adapter, not attached."""
    make, shape, _ = KINDS[kind]
    base = make().to(dtype).requires_grad_(False)
    for p in base.parameters():
        p.copy_(torch.randn_like(p))
    geometry = NormGeometry.of(base)
    assert geometry is not None and not geometry.unfit
    adapter = Norm(geometry, 4).to(dtype if dtype == torch.float64 else torch.float32)
    for p in adapter.parameters():
        nn.init.normal_(p)
    layer = AdaptedLayer("lora_unet_x", base, adapter, 1.0, runtime=Runtime(multiplier))
    return layer, 2 * torch.randn(*shape, dtype=dtype) + 0.5


def normalised(kind: str, base: nn.Module, x: Tensor) -> Tensor:
    """xhat, from its definition."""
    eps = getattr(base, "eps", getattr(base, "variance_epsilon", 1e-6))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if KINDS[kind][2] == "rms":
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    if KINDS[kind][2] == "group":
        parts = x.reshape(x.shape[0], base.num_groups, -1)
        mean, variance = parts.mean(-1, keepdim=True), parts.var(-1, keepdim=True, correction=0)
        return ((parts - mean) / (variance + eps).sqrt()).reshape(x.shape)
    axes = tuple(range(-len(base.normalized_shape), 0))
    mean, variance = x.mean(axes, keepdim=True), x.var(axes, keepdim=True, correction=0)
    return (x - mean) / (variance + eps).sqrt()


def definition(kind: str, layer: AdaptedLayer, x: Tensor, multiplier: float) -> Tensor:
    """m (xhat w_norm + b_norm)."""

    def broadcast(v: Tensor) -> Tensor:
        return v.reshape(-1, *[1] * (x.dim() - 2)) if KINDS[kind][2] == "group" else v

    change = normalised(kind, layer.base, x) * broadcast(layer.adapter.w_norm)
    shift = layer.adapter.bias_change()
    return multiplier * (change if shift is None else change + broadcast(shift))


@every_kind
def test_forward_and_gradients_are_the_definition(kind: str) -> None:
    layer, x = single(kind)
    plain = copy.deepcopy(layer.base)
    wanted = definition(kind, layer, x, 0.7)
    layer.attach()
    y = layer.base(x)
    # Where a class rounds its own output to fp32, the update can only be seen to that.
    tolerance = 1e-6 if kind in IN_FP32 else 1e-9
    assert_close(y - plain(x), wanted, "update", tolerance)
    upstream = torch.randn_like(wanted)
    values = list(layer.parameters())
    for a, b in zip(
        torch.autograd.grad(layer.update(x) if len(values) == 1 else y, values, upstream),
        torch.autograd.grad(wanted, values, upstream), strict=True,
    ):  # fmt: skip
        assert_close(a, b, "gradient", tolerance)


@every_kind
def test_the_bias_that_is_trained(kind: str) -> None:
    """The layer's own; without a weight, that which a LayerNorm and a GroupNorm would have."""
    layer, _ = single(kind)
    has = getattr(layer.base, "bias", None) is not None or kind in ("layer_bare", "group_bare")
    assert ("b_norm" in layer.adapter.laid_out.shapes) is has


@every_kind
def test_merge_and_file_are_the_forward(kind: str) -> None:
    """By the class's own formula: the merged layer is the adapted one, eps and all."""
    layer, x = single(kind)
    base, weight = layer.base, weight_of(layer.base)
    layer.attach()
    wanted = base(x)
    layer.detach()
    tensors = codec.encode([layer])
    assert set(tensors) == {f"lora_unet_x.{name}" for name in layer.adapter.laid_out.shapes}, "no alpha, as in LyCORIS"
    saved = codec.decode(tensors)[0]["lora_unet_x"]
    assert saved.algorithm is Norm and saved.describe(layer.adapter.geometry)[1]["bias"] is ("b_norm" in saved.tensors)
    if weight is None:
        with pytest.raises(ValueError, match="has no weight that could be changed.*train_norm=affine"):
            layer.backup()
        with pytest.raises(ValueError, match="has no weight that could be changed"):
            layer.merge()
        return
    before = {name: p.clone() for name, p in base.named_parameters()}
    if weight.dim() == 1:
        if "b_norm" in saved.tensors:
            with pytest.raises(ValueError, match="b_norm"):
                merged_weight(saved, weight, 0.7)
            assert_close(
                merged_bias(saved, base.bias, 0.7), base.bias + 0.7 * layer.adapter.b_norm, "bias from the file"
            )
        assert_close(
            merged_weight(saved, weight, 0.7, bias_too=True), weight + 0.7 * layer.adapter.w_norm, "from the file"
        )
    layer.backup()
    layer.merge()
    tolerance = 1e-6 if kind in IN_FP32 else 1e-9
    assert_close(base(x), wanted, "merged", tolerance)
    layer.restore()
    for name, p in base.named_parameters():
        assert torch.equal(p, before[name]), name


@every_kind
def test_start_and_multiplier_0_are_the_base_bit_for_bit(kind: str) -> None:
    layer, x = single(kind)
    plain = layer.base(x)
    for p in layer.parameters():
        nn.init.zeros_(p)
    layer.attach()
    assert torch.equal(layer.base(x), plain)
    for p in layer.parameters():
        nn.init.normal_(p)
    assert not torch.equal(layer.base(x), plain)
    layer.runtime.multiplier = 0.0
    assert torch.equal(layer.base(x), plain)
    weight = weight_of(layer.base)
    if weight is not None:
        kept = weight.clone()
        layer.merge()
        assert torch.equal(weight, kept)


@every_kind
def test_one_multiplier_per_sample_and_module_dropout(kind: str) -> None:
    values = [0.25, -0.5]
    layer, x = single(kind, torch.tensor(values, dtype=torch.float64))
    plain = layer.base(x)
    layer.attach()
    y = layer.base(x)
    for i in range(len(x)):
        layer.runtime.multiplier = values[i % 2]
        assert_close(y[i : i + 1] - plain[i : i + 1], layer.base(x[i : i + 1]) - plain[i : i + 1], f"sample {i}", 1e-6)
    layer.runtime.multiplier, layer.dropouts = 1.0, Dropouts(module_dropout=0.5)
    kept = [not torch.equal(layer.base(x), plain) for _ in range(20)]
    assert any(kept) and not all(kept)
    layer.eval()
    assert all(not torch.equal(layer.base(x), plain) for _ in range(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_kind
def test_small_updates_survive_low_precision(kind: str, dtype: torch.dtype) -> None:
    """An update 2000 times smaller than the weight, which a weight of this dtype could not even hold."""
    layer, x = single(kind, 1.0, dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2**-11)
    twin = AdaptedLayer("x", copy.deepcopy(layer.base).double(), copy.deepcopy(layer.adapter).double(), 1.0)
    if "b_norm" in twin.adapter.laid_out.shapes:  # is added apart
        nn.init.zeros_(twin.adapter.b_norm)
    assert_close(layer.update(x).double(), definition(kind, twin, x.double(), 1.0), "update", 1e-5)
    layer.attach()
    y = layer.base(x)
    assert y.dtype == KINDS[kind][0]().to(dtype)(x).dtype
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
