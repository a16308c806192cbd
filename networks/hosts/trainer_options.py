"""What a network has to say to the options of the trainer that are not its own: both trainers show them to it before
training."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from ..args.coerce import named

if TYPE_CHECKING:
    from ..plan.plan import Plan, PlanRow
    from .contract import HostNetwork

log = logging.getLogger("networks")

ONE_RATE = ("prodigy", "dadapt", "d-adapt")  # optimizers that find one learning rate for all groups
BY_SIZE = ("sgd",)  # optimizers whose step grows with the gradient
AVERAGES = "schedulefree"  # in the names of optimizers that put an average into the parameters and take it out again
HALF = {"full_bf16": torch.bfloat16, "full_fp16": torch.float16}  # options that cast what is trained
COARSE = {
    torch.bfloat16: "bf16 has two to three digits, so a step below 1/500 of a value is rounded away: at a learning "
    "rate of 1e-4 values above 0.1 stay where they are (in 40 steps 97 % of LoHa's random factors, 85 % of LoKr's)",
    torch.float16: "fp16 has three digits, so a step below 1/2000 of a value is rounded away, and Adam's eps of 1e-8 "
    "is 0 there, which makes NaN of the first step",
}
NUMBERS = ("learning_rate", "unet_lr", "text_encoder_lr", "scale_weight_norms", "network_dropout", "network_alpha")


def check(network: HostNetwork, options: Any) -> None:
    """Refuse what would train something else than the arguments say, warn of what is seldom meant.

    Args:
        options: the trainer's parsed command line; what it does not have is skipped.

    Raises:
        ValueError: as `remarks`.
    """
    for text in remarks(network.plan, options, network.runtime.keeps_fp32 or network.told_of_half):
        log.warning("%s", text)
    network.told_of_half |= any(getattr(options, option, False) for option in HALF)


def remarks(plan: Plan, options: Any, keeps_fp32: bool) -> list[str]:
    """What a user should know of his options beside this plan, one sentence each.

    Args:
        options: as for `check`.
        keeps_fp32: whether what is trained stays in fp32, or it was told what half precision means.

    Raises:
        ValueError: DoRA with two experts, an average beside another one, or a number that is NaN or infinite.
    """
    _check_numbers(options)
    if plan.average:
        _check_average(options)
    told = []
    if getattr(options, "dim_from_weights", False) and getattr(options, "network_dim", None) is not None:
        told.append(f"--network_dim {options.network_dim} is not used: --dim_from_weights takes the dims of the file")
    for option, dtype in HALF.items():
        if getattr(options, option, False) and not keeps_fp32:
            told.append(_of_half(f"--{option}", dtype))
    if any(row.dora for row in plan.trained):
        told += _of_dora(options)
    return [*told, *_of_rates(plan, str(getattr(options, "optimizer_type", "") or "").lower())]


def _check_average(options: Any) -> None:
    """
    Raises:
        ValueError: the optimizer or the trainer has an average of its own, and puts it into the parameters.
    """
    optimizer = str(getattr(options, "optimizer_type", "") or "")
    if AVERAGES in optimizer.lower().replace("_", "") or getattr(options, "optimizer_schedulefree_wrapper", False):
        raise ValueError(
            f"ema_decay does not go with {optimizer or 'a schedule-free optimizer'}, which saves an average of its "
            "own already: leave ema_decay out"
        )
    if getattr(options, "self_flow", False):
        raise ValueError("ema_decay does not go with --self_flow, which has an average of its own: leave ema_decay out")


def _of_dora(options: Any) -> list[str]:
    if getattr(options, "dit_high_noise", None):
        raise ValueError(
            "use_dora does not go with two experts (--dit_high_noise): a magnitude belongs to the base weight of one "
            "of them; train each expert by itself, or leave out use_dora"
        )
    if not getattr(options, "turbo_dit", None):
        return []
    return ["use_dora with --turbo_dit: samples are drawn on other base weights than the magnitudes are learnt for"]


def _of_rates(plan: Plan, optimizer: str) -> list[str]:
    """Optimizers which do not take learning rates as they are given."""
    rows, told = plan.trained, []
    plus = any(row.plus_ratio != 1 for row in rows)
    if any(name in optimizer for name in ONE_RATE) and (plus or any(map(_has_own_rate, rows))):
        remedy = ": loraplus_mode=reparam does LoRA+ with one rate" if plus else ""
        told.append(f"{optimizer} expects one learning rate, these arguments ask for several{remedy}")
    if any(name in optimizer for name in BY_SIZE) and any(row.plus_unit != 1 for row in rows):
        told.append(f"under {optimizer}, loraplus_mode=reparam acts as the square of the ratio: use loraplus_mode=lr")
    return told


def _has_own_rate(row: PlanRow) -> bool:
    return bool(row.lr or row.block_rate) or row.dora_ratio != 1


def see_dtype(network: HostNetwork) -> None:
    """After a cast: one to half precision is told, unless the network only generates."""
    if network.training and not network.runtime.for_inference:
        coarse = next((p.dtype for p in network.parameters() if p.dtype in COARSE), None)
        if coarse is not None:
            tell_half(network, f"the trainer casts the network to {str(coarse).removeprefix('torch.')}", coarse)


def tell_half(network: HostNetwork, cause: str, dtype: torch.dtype) -> None:
    """What half precision means for what is trained, once."""
    if not network.told_of_half and not network.runtime.keeps_fp32:
        network.told_of_half = True
        log.warning("%s", _of_half(cause, dtype))


def _of_half(cause: str, dtype: torch.dtype) -> str:
    return f"{cause}: {COARSE[dtype]}; adapter_dtype=fp32 keeps the adapter in fp32"


def _check_numbers(options: Any) -> None:
    """The numbers that the trainer hands to the network during the run, before it starts."""
    for name in NUMBERS:
        value = getattr(options, name, None)
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(number, float):  # text and the like is the trainer's to refuse
                named(f"--{name}", number)
