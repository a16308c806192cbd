"""Adapters from Python: on a diffusers pipeline, or on a model in a training loop of your own.

    from networks import api  # kohya_networks where a trainer's folder owns that name

    network = api.apply(unet.requires_grad_(False), algo="lokr", dim=8, factor=8)
    optimizer = torch.optim.AdamW(network.optimizer_groups(1e-4))
    ...  # call the unet as ever; loss.backward(); optimizer.step()
    network.save("my-lokr.safetensors")
    network.detach()

    api.load(pipe, "my-lokr.safetensors", strength=0.8)  # for pictures; api.merge puts it into the weights

`plan` says what `apply` would build. Keywords are the trainers' network arguments; mistakes are ValueErrors, as there.

Finished files, without a model: each returns a `Report` of what became of every layer.

    api.convert("my-lokr.safetensors", "my-lora.safetensors", to="lora", rule=api.RankRule(16))
    api.combine({"my-lokr.safetensors": 0.7, "my-lora.safetensors": 0.3}, "both.safetensors", rule=api.RankRule(8))
    api.resize("my-lora.safetensors", "small.safetensors", rule=api.RankRule(16, "energy", 0.99))
    print(api.compare("my-lora.safetensors", "small.safetensors").cosine)
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from .archs.detect import detect
from .archs.spec import ArchSpec, Part
from .args.coerce import named, whole
from .args.parse import Problems, parse
from .files.adapter_file import FileTensors
from .hosts.caller import DEFAULT_DIM, Caller
from .hosts.contract import HostNetwork, learning_rate
from .network.network import unfused
from .network.optim import text_encoder_rates
from .plan import file_format
from .plan.plan import Plan, Request
from .tools.average import average
from .tools.combine import combine
from .tools.compare import Comparison, compare
from .tools.convert import convert
from .tools.extract import extract
from .tools.merge import merge_checkpoint
from .tools.ranks import RankRule
from .tools.report import Report
from .tools.rescue import rescue
from .tools.resize import resize
from .tools.spectra import Spectra, spectra

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .args.options import Algo, Options

log = logging.getLogger(__name__)

HOST = "api"  # whose defaults the argument table has for this caller
_CALLER = Caller(__name__, "lora")
DENOISERS = ("unet", "transformer")  # among the components of a pipeline
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class Pipeline(Protocol):
    """What has its models by name, as all pipelines of diffusers do."""

    @property
    def components(self) -> Mapping[str, Any]: ...


Model = nn.Module | Pipeline
Encoders = bool | Sequence[nn.Module | None]
File = str | os.PathLike[str]


@dataclass(frozen=True)
class _Call:
    """What a network was made by, so that its files can tell, and be written in another form; dim None = by a file."""

    dim: int | None
    alpha: float
    options: Mapping[str, Any]


class AppliedNetwork(HostNetwork):
    """The adapters of one call, attached to its model: `parameters()`, `save`, `load`, `detach`, `set_multiplier`, and
    what is here. In training mode dropouts act; `eval()` stops them."""

    call: _Call

    def start(self, call: _Call) -> None:
        """Attach, on the devices of the models."""
        self.call = call
        self.attach()
        for row, layer in self.layers:
            device = next((p.device for p in self._roots[row.part].parameters()), torch.device("cpu"))
            if device.type != "meta":  # of a model whose weights come and go as it runs
                layer.to(device)

    def optimizer_groups(
        self, lr: float, *, text_encoder_lr: float | Sequence[float] | None = None
    ) -> list[dict[str, Any]]:
        """Parameter groups for any optimizer of torch, with the learning rates which the arguments ask for.

        Args:
            lr: learning rate of the denoiser, and of what has none of its own.
            text_encoder_lr: one for all text encoders, or one for each; 0 leaves them as they are.

        Raises:
            ValueError: a rate is no number, or nothing is left to train.
        """
        given = list(text_encoder_lr) if isinstance(text_encoder_lr, Sequence) else [text_encoder_lr]
        rates = [None if rate is None else learning_rate("text_encoder_lr", rate) for rate in given]
        default = learning_rate("lr", lr)
        encoders = [part.name for part in self.arch.text_encoders]
        of_parts = text_encoder_rates([default if rate is None else rate for rate in rates], default, encoders)
        return self.groups({**of_parts, self.arch.denoiser.name: default})[0]

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model without its adapters, inside a `with`: for a reference pass. Those of `training_adapter` stay."""
        former = self.runtime.enabled
        self.set_enabled(False)
        try:
            yield
        finally:
            self.set_enabled(former)

    def save(
        self,
        path: File,
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
        *,
        save_format: str | None = None,
    ) -> None:
        """As the function of this name."""
        call, former = self.call, self.file_format
        own = {
            "ss_network_module": f"networks.{self.arch.entry}",
            "ss_network_dim": str(call.dim),
            "ss_network_alpha": str(call.alpha),
            "ss_network_args": json.dumps(call.options, default=str),
        }
        self.file_format = former if save_format is None else self._format_for(save_format)
        try:
            super().save(path, dtype, {**(own if call.dim else {}), **(metadata or {})})
        finally:
            self.file_format = former

    def _format_for(self, save_format: str) -> file_format.FileFormat:
        """The form of its files with another `save_format`.

        Raises:
            ValueError: there is none of this name, or it has no place for something of this network.
        """
        call, problems = self.call, Problems(__name__)
        raw = {**call.options, "save_format": save_format}
        limits = {"network_dim": call.dim or DEFAULT_DIM, "network_alpha": call.alpha}
        args = parse(raw, _CALLER.algo, problems, HOST, limits)
        parts = {part.name: part for part in self.arch.parts}
        roots = tuple((parts[name], root) for name, root in self._roots.items())
        request = Request(self.arch, roots, call.dim or DEFAULT_DIM, call.alpha, args, rs_lora=self.file_format.rs_lora)
        problems.raise_if_any()
        form, _ = file_format.review(self.plan, request, problems)
        problems.raise_if_any()
        return form


def apply(
    model: Model,
    *,
    algo: Algo = "lora",
    dim: int = DEFAULT_DIM,
    alpha: float | None = None,
    text_encoders: Encoders = False,
    multiplier: float = 1.0,
    **options: Unpack[Options],
) -> AppliedNetwork:
    """Put new adapters on a model, ready to be trained. The base model keeps its weights and its own gradients' state:
    `requires_grad_(False)` on it saves their memory.

    Args:
        model: a denoiser, of a trainer's class or diffusers', or a diffusers pipeline, whose denoiser is taken.
        algo: the algorithm.
        dim: rank.
        alpha: scale is alpha / dim; None = dim, so that it is 1.
        text_encoders: True = the pipeline's own, too; or a list of models in the trainers' order, None where one stays
            as it is.
        multiplier: strength at which it acts.
        options: every network argument, see `kohya-networks args`.

    Returns:
        The network, attached, on the devices of its model, in fp32.

    Raises:
        ValueError: all mistakes of the call in one message.
    """
    call, parts = _call(algo, dim, alpha, options), _Parts.of(model, text_encoders)
    network = _CALLER.new(
        AppliedNetwork, HOST, multiplier, call.dim, call.alpha, parts.encoders, parts.denoiser, call.options
    )
    network.start(call)
    return network


def plan(
    model: Model,
    *,
    algo: Algo = "lora",
    dim: int = DEFAULT_DIM,
    alpha: float | None = None,
    text_encoders: Encoders = False,
    **options: Unpack[Options],
) -> Plan:
    """What `apply` would build: one row per layer, with the reason where it is left out. `print(plan.to_text())`.

    Args:
        model, algo, dim, alpha, text_encoders, options: as for `apply`; the model may be on the meta device.

    Raises:
        ValueError: as `apply`.
    """
    call, parts = _call(algo, dim, alpha, options), _Parts.of(model, text_encoders)
    return _CALLER.plan(call.dim, call.alpha, parts.encoders, parts.denoiser, host=HOST, **call.options)


def load(
    model: Model,
    file: File,
    *,
    strength: float = 1.0,
    text_encoders: Encoders = True,
    **options: Unpack[Options],
) -> AppliedNetwork:
    """Put the adapters of a file on a model, for pictures: its algorithm, dims and scales are the file's own.

    Args:
        model: as for `apply`.
        file: a file of any form that this package writes or reads, or a folder which PEFT wrote.
        strength: 0 = the base model, 1 = as it was trained.
        text_encoders: as for `apply`; True does without, where the model is no pipeline.
        options: network arguments which a file does not say (`allow_missing=True`, T-LoRA's schedule).

    Returns:
        The network, attached, without dropouts. `detach` takes it off again.

    Raises:
        ValueError: the file is broken, contradicts the arguments, or has too little for this model.
    """
    network = _read(_Parts.of(model, text_encoders, needed=False), file, strength, options)
    network.start(_Call(None, 0.0, dict(options)))
    return network


def merge(
    model: Model,
    files: File | Sequence[File] | Mapping[File, float],
    *,
    strength: float = 1.0,
    text_encoders: Encoders = True,
    device: torch.device | str | None = None,
    **options: Unpack[Options],
) -> None:
    """Put adapter files into the weights of a model, in their order, computed in fp32 and rounded once for each file.

    Args:
        model: as for `apply`.
        files: one, several, or each with a strength of its own.
        strength: of those that have none of their own.
        text_encoders: as for `load`.
        device: where it is computed; None = where the weights are.
        options: as for `load`.

    Raises:
        ValueError: a file is as it must not be for `load`, or a weight cannot be read or written. No weight is changed
            before all files were opened and found to fit.
    """
    parts = _Parts.of(model, text_encoders, needed=False)
    given = {files: strength} if isinstance(files, (str, os.PathLike)) else files
    pairs = list(given.items()) if isinstance(given, Mapping) else [(file, strength) for file in given]
    for file, own in pairs[1:]:
        _read(parts, file, own, options)
    for file, own in pairs:  # each is made on the weights which those before it left
        _read(parts, file, own, options).merge(None if device is None else torch.device(device))


def save(
    network: AppliedNetwork,
    path: File,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    save_format: str | None = None,
) -> None:
    """Write an adapter file, whole or not at all.

    Args:
        network: of `apply` or `load`.
        path: ends in .safetensors; a file that is there is replaced.
        dtype: of the saved values; None = as they are, fp32.
        metadata: more entries for the header; the arguments of the call stand there in any case.
        save_format: `portable`, `comfyui`, `diffusers` and the others of the argument; None = that of the call.

    Raises:
        ValueError: a value is not finite, or the form has no place for something of this network.
    """
    network.save(path, dtype, metadata, save_format=save_format)


def _call(algo: str, dim: int, alpha: float | None, options: Mapping[str, Any]) -> _Call:
    """An alpha of 0 stands for the dim, in convolutions for theirs.

    Raises:
        ValueError: dim or alpha is no such number.
    """
    rank = int(named("dim", dim, 1, whole))
    return _Call(rank, 0.0 if alpha is None else named("alpha", alpha, 0), {"algo": algo, **options})


def _read(parts: _Parts, file: File, strength: float, options: Mapping[str, Any]) -> AppliedNetwork:
    tensors = FileTensors(file)
    return _CALLER.from_weights(
        AppliedNetwork, HOST, strength, tensors, parts.encoders, parts.denoiser, True, options, tensors.source
    )


@dataclass(frozen=True)
class _Parts:
    """The models of a call: the denoiser, and text encoders in the order of the architecture's record."""

    denoiser: nn.Module
    encoders: list[nn.Module | None]

    @classmethod
    def of(cls, model: Model, text_encoders: Encoders, needed: bool = True) -> _Parts:
        """Of a denoiser or a pipeline.

        Args:
            needed: that True finds no encoder is a mistake.

        Raises:
            ValueError: it is neither, or there is no such text encoder.
        """
        components: Mapping[str, Any] = {} if isinstance(model, nn.Module) else getattr(model, "components", {})
        denoiser = model if isinstance(model, nn.Module) else _denoiser(model, components)
        if not isinstance(text_encoders, bool):
            return cls(denoiser, list(text_encoders))
        encoders = _in_order(detect(denoiser), [components.get(name) for name in ENCODERS]) if text_encoders else []
        if text_encoders and needed and all(each is None for each in encoders):
            raise ValueError(
                f"{__name__}: text_encoders=True, but {type(model).__name__} has none that can be trained; leave it "
                "out, or give a list of them beside the denoiser"
            )
        return cls(denoiser, encoders)


def _denoiser(pipeline: Any, components: Mapping[str, Any]) -> nn.Module:
    found = next((components[name] for name in DENOISERS if isinstance(components.get(name), nn.Module)), None)
    if found is None:
        raise ValueError(
            f"{__name__}: {type(pipeline).__name__} is neither a model nor a pipeline with a "
            f"{' or a '.join(DENOISERS)}; "
            "give the denoiser itself"
        )
    if isinstance(components.get("transformer_2"), nn.Module):
        log.warning("this pipeline has two experts, of which only the first is adapted: give transformer_2 itself")
    model: nn.Module = found
    return model


def _in_order(arch: ArchSpec, models: Sequence[Any]) -> list[nn.Module | None]:
    """A pipeline's encoders where the architecture has them; one that its record does not know at its own place takes
    the next that fits."""
    places: list[nn.Module | None] = [None] * len(arch.text_encoders)
    for i, model in enumerate(models):
        fitting = (
            k for k in range(i, len(places)) if isinstance(model, nn.Module) and _fits(arch.text_encoders[k], model)
        )
        place = next((k for k in fitting if places[k] is None), None)
        if place is not None:
            places[place] = model
    return places


def _fits(part: Part, model: nn.Module) -> bool:
    return any(type(each).__name__ in part.containers for each in model.modules())


__all__ = [
    "AppliedNetwork",
    "Comparison",
    "Plan",
    "RankRule",
    "Report",
    "Spectra",
    "apply",
    "average",
    "combine",
    "compare",
    "convert",
    "extract",
    "load",
    "merge",
    "merge_checkpoint",
    "plan",
    "rescue",
    "resize",
    "save",
    "spectra",
    "unfused",
]
