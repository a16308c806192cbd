"""A whole step, forward and backward, of the trainers' own models, shrunken; the layers that ours takes by default."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn

from .cases import CASES, Case, Step
from .hosts import imported
from .layers import FROZEN
from .peers import Peer, fitted, network_of, trained
from .report import Table
from .setting import Setting
from .timing import seconds

DIM = 8
HEAD = 32  # channels of an attention head
PEERS = ("ours", "sds", "mus", "peft")


@dataclass(frozen=True)
class Model:
    """A trainer's model.

    Attributes:
        title: in the table.
        trainer: the short name of the checkout that has it.
        build: channels -> the model, on the CPU, with random weights.
        call: (model, x, channels) -> its output.
        shape: of x.
    """

    title: str
    trainer: str
    build: Callable[[int], nn.Module]
    call: Callable[[nn.Module, Tensor, int], Tensor]
    shape: Callable[[int], tuple[int, ...]]


# -- SDXL

CONTEXT, VECTOR = 128, 64  # widths of texts; they are no part of what is measured


def _sdxl(channels: int) -> nn.Module:
    file = imported("library.sdxl_original_unet")
    block = functools.partial(_narrow, file.Transformer2DModel)
    sizes = {"MODEL_CHANNELS": channels, "TIME_EMBED_DIM": 4 * channels, "ADM_IN_CHANNELS": VECTOR}
    with mock.patch.dict(vars(file), {**sizes, "Transformer2DModel": block}):
        model: nn.Module = file.SdxlUNet2DConditionModel()
    return model


def _narrow(cls: Any, *args: Any, **kwargs: Any) -> Any:
    return cls(*args, **{**kwargs, "cross_attention_dim": CONTEXT})


def _call_sdxl(model: nn.Module, x: Tensor, channels: int) -> Tensor:
    time = torch.full((len(x),), 500, device=x.device)
    context, vector = x.new_ones(len(x), 77, CONTEXT), x.new_ones(len(x), VECTOR)
    result: Tensor = model(x, time, context.detach(), vector.detach())
    return result


# -- FLUX


def _flux(channels: int) -> nn.Module:
    file = imported("library.flux_models")
    model: nn.Module = file.Flux(
        file.FluxParams(
            in_channels=64, vec_in_dim=VECTOR, context_in_dim=CONTEXT, hidden_size=channels, mlp_ratio=4.0,
            num_heads=channels // HEAD, depth=6, depth_single_blocks=12, axes_dim=[8, 12, 12], theta=10_000,
            qkv_bias=True, guidance_embed=True,
        )
    )  # fmt: skip
    return model


def _call_flux(model: nn.Module, x: Tensor, channels: int) -> Tensor:
    one, texts = x.new_ones(len(x)).detach(), 77
    result: Tensor = model(
        img=x, img_ids=torch.zeros(len(x), x.shape[1], 3, device=x.device), timesteps=one, guidance=one,
        txt=x.new_ones(len(x), texts, CONTEXT).detach(), txt_ids=torch.zeros(len(x), texts, 3, device=x.device),
        y=x.new_ones(len(x), VECTOR).detach(),
    )  # fmt: skip
    return result


# -- Wan


def _wan(channels: int) -> nn.Module:
    file = imported("musubi_tuner.wan.modules.model")
    model: nn.Module = file.WanModel(
        dim=channels, ffn_dim=4 * channels, freq_dim=64, text_dim=CONTEXT, num_heads=channels // HEAD, num_layers=12,
        text_len=77, attn_mode="torch",
    )  # fmt: skip
    return model


def _call_wan(model: nn.Module, x: Tensor, channels: int) -> Tensor:
    time = torch.full((len(x),), 500.0, device=x.device)
    tokens = x.shape[2] * x.shape[3] * x.shape[4] // 4
    found = model(list(x), t=time, context=[x.new_ones(77, CONTEXT).detach() for _ in x], seq_len=tokens)
    return torch.stack([each.to(x.dtype) for each in found])


MODELS = (
    Model("SDXL", "sds", _sdxl, _call_sdxl, lambda channels: (1, 4, 16, 16)),
    Model("FLUX", "sds", _flux, _call_flux, lambda channels: (1, 64, 64)),
    Model("Wan", "mus", _wan, _call_wan, lambda channels: (1, 16, 1, 16, 16)),
)
WIDE = ("time_embedding", "time_projection")  # parts that their models call in fp32, as all LayerNorms


def frozen_model(model: Model, channels: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """It with no gradients of its own.

    Args:
        model: which.
        channels: its narrowest width.
        dtype: in which it is.
        device: where it is.
    """
    torch.manual_seed(0)
    built = model.build(channels).to(device, dtype).requires_grad_(False).train()
    for name in WIDE:
        if isinstance(part := getattr(built, name, None), nn.Module):
            part.float()
    for module in built.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    return built


def twin(model: nn.Module) -> nn.Module:
    """Another of its structure, with the same weights in memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def adapt(peer: Peer, model: nn.Module, case: Case) -> list[nn.Parameter] | None:
    """Put an adapter on a model, and return what is trained of it; None where the peer has none such.

    Args:
        peer: whose; ours makes a network, as a trainer has it.
        model: which is not adapted yet.
        case: the adapter.
    """
    case = replace(case, dim=DIM)
    network = network_of(model, case)
    if peer.name == "ours":
        return trained([network])
    names = [row.dotted_name for row, _ in network.layers]
    network.detach()
    made = fitted(peer, model, names, case)
    return None if made is None else trained(made)


def step_of(setting: Setting, model: Model, step: Step, built: nn.Module, params: list[nn.Parameter]) -> Any:
    """A call that runs forward and backward.

    Args:
        setting: of the run.
        model, step: of which kind the model is, of which width and in which precision.
        built: it, adapted or not.
        params: whose gradients are computed.
    """
    x = torch.randn(model.shape(step.channels), dtype=_dtype(step), device=setting.device).requires_grad_()

    def run() -> None:
        for t in (x, *params):
            t.grad = None
        with setting.autocast(not step.fp32):
            loss = model.call(built, x, step.channels).float().square().mean()
        loss.backward()

    return run


def _dtype(step: Step) -> torch.dtype:
    return torch.float32 if step.fp32 else torch.bfloat16


def steps(setting: Setting) -> Iterator[Table]:
    """One table for all models."""
    names = [peer.name for peer in setting.peers if peer.name in PEERS]
    chart: dict[str, dict[str, float]] = {}
    for model in (each for each in MODELS if each.title in setting.sizes.models):
        if model.trainer in setting.checkouts:
            chart |= _of_model(setting, model)
        else:
            setting.lines.append(f"no step of {model.title}: there is no checkout of its trainer ({model.trainer})")
    if chart:
        rows = [
            [row, *(f"{found[name]:.2f}" if name in found else "-" for name in names), _overhead(found)]
            for row, found in chart.items()
        ]
        yield Table(
            f"A step over that of the frozen model, rank {DIM}, autocast where the row does not say fp32",
            "The last column is our overhead over that of the least of the others.",
            ["model", *names, "overhead"],
            rows,
            chart,
        )


def _of_model(setting: Setting, model: Model) -> dict[str, dict[str, float]]:
    """Row -> peer -> time over the frozen step."""
    found, bases = {}, dict[tuple[int, torch.dtype], nn.Module]()
    for step in setting.sizes.steps:
        kind = step.channels, _dtype(step)
        if kind not in bases:
            bases = {kind: frozen_model(model, *kind, setting.device)}
        row = f"{model.title}, {step.channels} channels, {step.case}"
        row += ", checkpointing" * step.checkpointing + ", fp32" * step.fp32
        setting.progress.step(f"steps: {row}")
        found[row] = _row(setting, model, step, bases[kind])
    return found


def _row(setting: Setting, model: Model, step: Step, base: nn.Module) -> dict[str, float]:
    """Times over the frozen step. The trainer's own module is that of the model's trainer."""
    runs = {}
    others = {"sds", "mus"} - {model.trainer}
    for peer in (None, *(each for each in setting.peers if each.name in PEERS and each.name not in others)):
        built = twin(base)
        if step.checkpointing:
            with mock.patch("builtins.print"):  # they tell it each time
                cast(Any, built).enable_gradient_checkpointing()
        params = [] if peer is None else adapt(peer, built, CASES[step.case])
        if params is not None:
            runs[FROZEN if peer is None else peer.name] = step_of(setting, model, step, built, params)
    found = seconds(runs, setting.sizes.seconds, setting.device)
    return {name: took / found[FROZEN] for name, took in found.items() if name != FROZEN}


def _overhead(found: dict[str, float]) -> str:
    others = [each - 1 for name, each in found.items() if name != "ours"]
    return f"{(found['ours'] - 1) / min(others):.2f}" if others and "ours" in found and min(others) > 0 else "-"
