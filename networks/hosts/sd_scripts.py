"""kohya-ss/sd-scripts and every host with its calling convention (ours included)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..archs.detect import detect, unwrap
from ..archs.spec import ArchSpec, Part
from ..args.parse import NetArgs, Problems, parse
from ..core.network import Network
from ..core.optim import Groups, parameter_groups, text_encoder_rates
from ..core.plan import Plan, Request, build_plan
from ..core.report import LoadReport, summary
from ..files import codec, reader

log = logging.getLogger("networks")

TextEncoders = nn.Module | Sequence[nn.Module | None] | None
DEFAULT_DIM = 4  # of every module of this host, when --network_dim is not given
CONV_ALPHA = 1.0  # of this host, when conv_dim is given without conv_alpha


class LoRANetwork(Network):
    """A network with the methods that sd-scripts calls. The name is the one which its files import."""

    def __init__(self, arch: ArchSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.arch = arch
        # FLUX.1's and SD3's trainers read it to decide which encoders stay in memory.
        self.train_t5xxl = any(row.part == "text_encoder3" for row in self.plan.trained)

    # -- set up

    def apply_to(
        self,
        text_encoder: TextEncoders,
        unet: nn.Module | None,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """Attach; parts that are not to be trained leave the network."""
        parts = [self.arch.denoiser.name] if apply_unet else []
        parts += [part.name for part in self.arch.text_encoders] if apply_text_encoder else []
        self.attach(parts)

    def load_weights(self, file: str) -> LoadReport:
        """Take over an adapter file; the report is printed by the host."""
        report = self.load(file)
        if report.missing or report.unexpected:
            log.warning("%s", report)
        return report

    def enable_gradient_checkpointing(self) -> None:
        """The base model checkpoints its own blocks; an adapter needs nothing for it."""

    def prepare_grad_etc(self, text_encoder: TextEncoders, unet: nn.Module | None) -> None:
        """Gradients were settled with the optimizer groups; a part with learning rate 0 has none."""

    # -- optimizer

    def prepare_optimizer_params_with_multiple_te_lrs(
        self,
        text_encoder_lr: float | Sequence[float] | None,
        unet_lr: float | None,
        default_lr: float | None = None,
    ) -> Groups:
        """(groups, descriptions); None takes the default, 0 leaves a part out."""
        encoders = [part.name for part in self.arch.text_encoders]
        if isinstance(text_encoder_lr, Sequence) and len(text_encoder_lr) > len(encoders):
            surplus = list(text_encoder_lr)[len(encoders) :]
            log.warning(
                "text_encoder_lr: %s not used, %s has %d text encoders", surplus, self.arch.title, len(encoders)
            )
        rates = text_encoder_rates(text_encoder_lr, default_lr, encoders)
        rates[self.arch.denoiser.name] = default_lr if unet_lr is None else unet_lr
        groups, descriptions = parameter_groups(self.layers, rates)
        for part in sorted({row.part for row, _ in self.layers}):
            if not rates[part] and not any(text.startswith(part) for text in descriptions):
                log.warning("%s: learning rate 0, not trained", part)
        if not groups:
            raise ValueError("nothing to train: every learning rate is 0; give --learning_rate")
        return groups, descriptions

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> Groups:
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    def get_trainable_params(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    # -- training

    def on_epoch_start(self, text_encoder: TextEncoders, unet: nn.Module | None) -> None:
        self.train()

    def apply_max_norm_regularization(self, max_norm_value: float, device: Any = None) -> tuple[int, float, float]:
        """(layers shrunk, mean norm, maximum norm) of the true, scaled updates."""
        return self.limit_norms(float(max_norm_value))

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
    ) -> None:
        """Merge at the network's multiplier. `dtype` is the host's wish for the intermediate result; we compute in
        fp32 or wider and round once, to the dtype of the base weight."""
        if weights_sd:
            self.take(weights_sd)
        self.merge(torch.device(device) if device is not None else None)

    def set_enabled(self, is_enabled: bool) -> None:
        self.runtime.enabled = is_enabled

    def set_region(self, sub_prompt_index: int, is_last_network: bool, mask: Tensor) -> None:
        """Act in a region of the picture, for the sub-prompt of this number; mask [H, W], 0 to 1.

        Raises:
            ValueError: the architecture has no regional prompts.
        """
        if not self.arch.regions:
            raise ValueError(f"regional prompts are for Stable Diffusion and SDXL, this model is {self.arch.title}")
        denoiser = self.arch.denoiser
        roles = {
            row.saved_name: self.arch.region_role(denoiser.trainer_name(row.dotted_name)) if row.part == denoiser.name
            else "encoder"
            for row, _ in self.layers
        }  # fmt: skip
        model = unwrap(self._roots[denoiser.name])
        attention = [(self.arch.region_role(name), layer) for name, layer in model.named_modules() if is_last_network]
        self.enter_region(sub_prompt_index, mask, roles, attention)

    def set_current_generation(
        self,
        batch_size: int,
        num_sub_prompts: int,
        width: int,
        height: int,
        shared: dict[Any, Any],
        ds_ratio: float | None = None,
    ) -> None:
        """A batch begins; `shared` is the same dict for all networks. Sizes need no `ds_ratio`: layers tell theirs."""
        assert self.runtime.region is not None, "set_current_generation before set_region"
        self.runtime.region.start(batch_size, num_sub_prompts, (height, width), shared)

    # -- lists that the host's tools read

    @property
    def unet_loras(self) -> list[nn.Module]:
        return [layer for row, layer in self.layers if row.part == self.arch.denoiser.name]

    @property
    def text_encoder_loras(self) -> list[nn.Module]:
        return [layer for row, layer in self.layers if row.part != self.arch.denoiser.name]


@dataclass(frozen=True)
class Entry:
    """A name that users type, `networks.lokr`, and the functions which the host calls in it.

    Attributes:
        name: the module's own.
        algo: the algorithm it stands for.
        archs: architectures that the name asserts; none = every one.
    """

    name: str
    algo: str
    archs: tuple[str, ...] = ()

    def create_network(
        self,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: Any,
        text_encoder: TextEncoders,
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **kwargs: Any,
    ) -> LoRANetwork:
        """A new network for training.

        Raises:
            ValueError: all mistakes of the call in one message.
        """
        problems = Problems(self.name)
        # The host sends --network_dropout twice, once as a keyword of its own.
        args = parse({"neuron_dropout": neuron_dropout or None, **kwargs}, self.algo, problems)
        models = _Models.of(self, unet, text_encoder, problems)
        request = models.request(network_dim, network_alpha, args, problems)
        return self._build(models, request, problems, multiplier)

    def create_network_from_weights(
        self,
        multiplier: float,
        file: str | None,
        vae: Any,
        text_encoder: TextEncoders,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        **kwargs: Any,
    ) -> tuple[LoRANetwork, Mapping[str, Tensor]]:
        """A network with the dims, forms, alphas and values of a file; options for training may be given too.

        Returns:
            The network, its values loaded, and the file's tensors.

        Raises:
            ValueError: all mistakes of the call in one message.
        """
        problems = Problems(self.name)
        args = parse(kwargs, self.algo, problems)
        if weights_sd is None:
            if file is None:
                raise ValueError(f"{self.name}: neither a file nor its tensors were given")
            weights_sd = reader.read_tensors(file)[0]
        saved, unknown = codec.decode(weights_sd)
        source = str(file or "the file")
        if unknown and not saved:
            problems.add(f"{source}: no adapter that we know; its keys look like {unknown[0]}")
        forms = {name: suffix for name, _, suffix in (key.partition(".") for key in unknown)}
        models = _Models.of(self, unet, text_encoder, problems)
        request = replace(models.request(None, None, args, problems), saved=saved, source=source, unknown=forms)
        network = self._build(models, request, problems, multiplier, for_inference)
        report = network.take(weights_sd, source)
        if report.unexpected:
            log.warning("%s", report)
        return network, weights_sd

    def plan(
        self,
        network_dim: int | None,
        network_alpha: float | None,
        text_encoder: TextEncoders,
        unet: nn.Module,
        **kwargs: Any,
    ) -> Plan:
        """What `create_network` would build; models may be on the meta device.

        Raises:
            ValueError: as `create_network`.
        """
        problems = Problems(self.name)
        args = parse(kwargs, self.algo, problems)
        models = _Models.of(self, unet, text_encoder, problems)
        plan, _ = build_plan(models.request(network_dim, network_alpha, args, problems), problems)
        problems.stop()
        return plan

    def _build(
        self, models: _Models, request: Request, problems: Problems, multiplier: float, for_inference: bool = False
    ) -> LoRANetwork:
        plan, modules = build_plan(request, problems)
        problems.stop()
        dropouts = request.args.pick(("dropout", "rank_dropout", "module_dropout"))
        network = LoRANetwork(request.arch, plan, modules, models.roots, dropouts, multiplier, for_inference)
        log.info("%s %s from %s: %s", self.name, __version__, Path(__file__).parent.parent, plan.title)
        for line in plan.to_text().splitlines() if request.args.verbose else summary(plan):
            log.info("%s", line)
        for warning in plan.warnings:
            log.warning("%s", warning)
        return network


@dataclass(frozen=True)
class _Models:
    """The host's models, told apart: which architecture, and which part each of them is."""

    arch: ArchSpec
    parts: tuple[tuple[Part, nn.Module], ...]

    @classmethod
    def of(cls, entry: Entry, unet: nn.Module, text_encoder: TextEncoders, problems: Problems) -> _Models:
        """Text encoders come as a model, a list with gaps, or None."""
        try:
            arch = detect(unet)
        except ValueError as error:
            problems.add(str(error))
            problems.stop()
            raise
        if entry.archs and arch.name not in entry.archs:
            problems.add(f"this model is {arch.title}: use --network_module networks.{arch.entry}")
        encoders = list(text_encoder) if isinstance(text_encoder, Sequence) else [text_encoder]
        if (
            arch.text_encoders
            and len(encoders) > len(arch.text_encoders)
            and any(m is not None for m in encoders[len(arch.text_encoders) :])
        ):
            problems.add(f"{arch.title} has {len(arch.text_encoders)} text encoders, but {len(encoders)} were given")
        pairs = zip(arch.text_encoders, encoders, strict=False)  # hosts may hand over fewer than there are
        given = [(part, model) for part, model in pairs if model is not None]
        return cls(arch, (*given, (arch.denoiser, unet)))

    @property
    def roots(self) -> dict[str, nn.Module]:
        return {part.name: model for part, model in self.parts}

    def request(self, dim: int | None, alpha: float | None, args: NetArgs, problems: Problems) -> Request:
        rank = DEFAULT_DIM if dim is None else int(dim)
        if rank < 1:
            problems.add(f"network_dim={dim} is too small; the least is 1")
        strength = 1.0 if alpha is None else float(alpha)
        if strength < 0:
            problems.add(f"network_alpha={alpha} is negative; write a positive number, or 0 for the dim itself")
        return Request(self.arch, self.parts, max(1, rank), strength, args, CONV_ALPHA)
