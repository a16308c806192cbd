"""What a network has to say to the options of the trainer that are not its own: both trainers show them to it before
training."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .contract import HostNetwork

log = logging.getLogger("networks")

ONE_RATE = ("prodigy", "dadapt", "d-adapt")  # optimizers that find one learning rate for all groups
BY_SIZE = ("sgd",)  # optimizers whose step grows with the gradient


def check(network: HostNetwork, options: Any) -> None:
    """Refuse what would train something else than the arguments say, warn of what is seldom meant.

    Args:
        options: the trainer's parsed command line; what it does not have is skipped.

    Raises:
        ValueError: DoRA with two experts.
    """
    rows = network.plan.trained
    dora = any(row.dora for row in rows)
    if dora and getattr(options, "dit_high_noise", None):
        raise ValueError(
            "use_dora does not go with two experts (--dit_high_noise): a magnitude belongs to the base weight of one "
            "of them; train each expert by itself, or leave out use_dora"
        )
    if dora and getattr(options, "turbo_dit", None):
        log.warning(
            "use_dora with --turbo_dit: samples are drawn on other base weights than the magnitudes are learnt for"
        )
    optimizer = str(getattr(options, "optimizer_type", "") or "").lower()
    plus = any(row.plus_ratio != 1 for row in rows)
    if any(name in optimizer for name in ONE_RATE) and (plus or any(row.lr or row.block_rate for row in rows)):
        remedy = ": loraplus_mode=reparam does LoRA+ with one rate" if plus else ""
        log.warning("%s expects one learning rate, these arguments ask for several%s", optimizer, remedy)
    if any(name in optimizer for name in BY_SIZE) and any(row.plus_unit != 1 for row in rows):
        log.warning("under %s, loraplus_mode=reparam acts as the square of the ratio: use loraplus_mode=lr", optimizer)
