"""What all hosts' calls have in common on the side of the network: its methods.

How a call becomes a network is in caller.py; the calls by name and signature are in sd_scripts.py and musubi.py.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..archs.spec import ArchSpec
from ..args.coerce import named
from ..network.network import Network
from ..network.optim import Groups, parameter_groups
from ..plan.report import LoadReport, summary
from . import trainer_options
from .zero_masters import masters_follow

log = logging.getLogger("networks")

TextEncoders = nn.Module | Sequence[nn.Module | None] | None


class HostNetwork(Network):
    """A network with the methods that all hosts call alike. Where they differ in arguments, `*models` takes any: what
    the host hands over is known from the creation."""

    _waits = False  # for a first step that the host announces

    def __init__(self, arch: ArchSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.arch = arch
        self._passes = 0
        self.timesteps[arch.denoiser.name] = arch.timestep
        self.told_of_half = False
        self.unannounced = ""  # how what is trained is told, once that is known: as a "table" or in "lines"
        self._told_of = frozenset[str]()  # warnings

    @classmethod
    def with_noise(cls) -> type[HostNetwork] | None:
        """The class for networks with noise on their weights (GGPO), which hosts know by its methods; None where the
        host does not tell a network when a step is over, which such noise needs."""
        return None

    # -- set up

    def apply_to(
        self,
        text_encoder: TextEncoders,
        unet: nn.Module | None,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """Attach to the models that were given at the creation; parts that are not to be trained leave the network.

        Args:
            text_encoder, unet: not looked at.
            apply_text_encoder, apply_unet: whether the text encoders, and the denoiser, are adapted.

        Raises:
            ValueError: no layer is left.
        """
        parts = [self.arch.denoiser.name] if apply_unet else []
        parts += [part.name for part in self.arch.text_encoders] if apply_text_encoder else []
        self.attach(parts)

    def attach(self, parts: Sequence[str] | None = None) -> None:
        """As that of all networks; the first time the log says what is trained, since the host has said which parts."""
        super().attach(parts)
        how, self.unannounced = self.unannounced, ""
        for line in self.plan.to_text().splitlines() if how == "table" else summary(self.plan) if how else ():
            log.info("%s", line)
        told = how == "lines" and log.isEnabledFor(logging.INFO)  # it takes longer than a plan
        for line in self.plan.readers() if told else ():
            log.info("%s", line)
        self.tell_warnings()

    def tell_warnings(self) -> None:
        """Those of the plan, each once."""
        for warning in self.plan.warnings:
            if warning not in self._told_of:
                log.warning("%s", warning)
        self._told_of |= {*self.plan.warnings}

    def prepare_network(self, options: Any) -> None:
        """See the trainer's own options.

        Raises:
            ValueError: they do not go with this network.
        """
        trainer_options.check(self, options)
        self.follow(self.plan.told(self.arch.parts, options))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HostNetwork:
        """Casts and moves, from `.to()`, `.half()` and the like: what half precision means is told."""
        super()._apply(fn, recurse)
        trainer_options.see_dtype(self)
        return self

    def load_weights(self, file: str) -> LoadReport:
        """Take over an adapter file; the report is printed by the host."""
        return self.load(file)

    def enable_gradient_checkpointing(self) -> None:
        """The base model checkpoints its own blocks; an adapter needs nothing for it."""

    def prepare_grad_etc(self, *models: Any) -> None:
        """Gradients were settled with the optimizer groups; a part with learning rate 0 has none."""
        self._waits = True

    def set_multiplier(self, multiplier: float | Sequence[float] | Tensor) -> None:
        """As that of all networks. LECO's trainers announce no step, and set the strength before and after each."""
        super().set_multiplier(multiplier)
        if self._waits:
            self.see_step()

    # -- optimizer

    def groups(self, rates: Mapping[str, float | None]) -> Groups:
        """(groups, descriptions) for the optimizer.

        Args:
            rates: part -> learning rate; None or 0 leaves it out.

        Raises:
            ValueError: nothing is left.
        """
        groups, descriptions = parameter_groups(self.layers, rates)
        if not groups:
            raise ValueError("nothing to train: every learning rate is 0; give --learning_rate")
        parts = dict.fromkeys(row.part for row, _ in self.layers)
        off = [part for part in parts if not rates[part] and not any(text.startswith(part) for text in descriptions)]
        if off:
            trained = [p for group in groups for p in group["params"]]
            log.info(
                "learning rate 0 for %s: in the files as at the start; %s parameters are trained",
                " and ".join(off), f"{sum(p.numel() for p in trained):,}",
            )  # fmt: skip
        return groups, descriptions

    def get_trainable_params(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    # -- training

    def on_epoch_start(self, *models: Any) -> None:
        self.train()

    def on_step_start(self, *models: Any) -> None:
        """Passes are counted, and what is random about a pass is drawn."""
        self._waits, self.average.is_told = False, True
        self.see_step()
        self._passes += 1
        self.follow_step(0, self._passes)

    def see_step(self) -> None:
        """What the last step of the optimizer did is averaged, and layers that do not learn are told."""
        self.average.follow(self.layers)
        self.diagnosis.step(self.layers)

    def follow_step(self, seed: int, step: int) -> None:
        """What is random about a step is that of these two, in all processes alike. A host that knows them calls it
        after on_step_start, which counts passes."""
        self.draws.begin(seed, step)

    def apply_max_norm_regularization(self, max_norm_value: float, device: Any = None) -> tuple[int, float, float]:
        """(layers shrunk, mean norm, maximum norm) of the true, scaled updates."""
        with masters_follow(self.parameters()), self.average.no_step():
            return self.limit_norms(named("scale_weight_norms", max_norm_value, 0))

    def save_weights(
        self, file: str | os.PathLike[str], dtype: torch.dtype | None, metadata: Mapping[str, str] | None
    ) -> None:
        self.save(file, dtype, metadata)

    # -- inference

    def is_mergeable(self) -> bool:
        return True

    def merge_to(
        self,
        text_encoder: TextEncoders,
        unet: nn.Module | None,
        weights_sd: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        non_blocking: bool = False,
    ) -> None:
        """Merge at the network's multiplier, in fp32 or wider; rounded once, to the dtype of each base weight.

        Args:
            text_encoder, unet: not looked at; the models are known from the creation.
            weights_sd: tensors of a file, which the network takes over first; None = it has its values.
            dtype, non_blocking: the host's wishes for intermediate results and copies, which change nothing here.
            device: where W' is computed; None = where the weight is.

        Raises:
            ValueError: the model has the network already (a network for each file, as the hosts make them), a tensor
                does not fit, or a base weight cannot be read or written.
        """
        self.refuse_second_merge()
        if weights_sd:
            self.load_tensors(weights_sd)
        self.merge(torch.device(device) if device is not None else None)

    def set_enabled(self, is_enabled: bool) -> None:
        """In training, too: some hosts run a teacher's pass with the adapters off."""
        self.runtime.enabled = is_enabled

    # -- lists that the hosts' tools read

    @property
    def unet_loras(self) -> list[nn.Module]:
        return [layer for row, layer in self.layers if row.part == self.arch.denoiser.name]

    @property
    def text_encoder_loras(self) -> list[nn.Module]:
        return [layer for row, layer in self.layers if row.part != self.arch.denoiser.name]


def learning_rate(name: str, value: Any) -> float:
    """A learning rate that a host hands over.

    Raises:
        ValueError: it is no number, negative or not finite; text, too, which would reach the optimizer.
    """
    if isinstance(value, str):
        raise ValueError(f"{name}={value!r} is no learning rate: write a number, without quotes in a TOML file")
    return named(name, value, 0)
