"""From a host's call to a network: the models handed over, the arguments, the file, the plan.

The calls themselves, by name and signature, are in sd_scripts.py and musubi.py.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._version import __version__
from ..archs.detect import detect, recognised
from ..archs.spec import ArchSpec, Part
from ..args import hints
from ..args.coerce import named, whole
from ..args.parse import NetArgs, Problems, parse
from ..args.table import UNET_STYLES
from ..files.adapter_file import AdapterFile, FileTensors
from ..files.places import Allowance
from ..network.average import Average
from ..network.diagnosis import Diagnosis
from ..plan.plan import Plan, Request
from ..plan.planner import build_plan, explained_plan
from . import training_adapters
from .beside import origin
from .contract import HostNetwork, TextEncoders
from .documented import documented
from .of_file import of_file
from .own_words import in_our_words
from .stops import show_help, stop_for_dry_run, without_stops

log = logging.getLogger("networks")

_DEVICES = {"adapter": None, "cpu": torch.device("cpu")}  # of ema_device
DEFAULT_DIM = 4  # of every module of these hosts, when --network_dim is not given

Kind = TypeVar("Kind", bound=HostNetwork)
Call = TypeVar("Call", bound=Callable[..., Any])


def given_once(call: Call) -> Call:
    """A function of an entry, with an error for what it is given twice: hosts hand over options of their own by
    position, and network_args by name; Python's own error would name neither."""
    _, *names = inspect.signature(call).parameters

    @functools.wraps(call)
    def checked(self: Caller, *args: Any, **kwargs: Any) -> Any:
        for name in names[: len(args)]:
            if name in kwargs:
                known = hints.of_name(name, kwargs[name]) or "the trainer hands that over itself, so leave it out"
                raise ValueError(f"{self.name}: {name} is among the network_args: {known}")
        return call(self, *args, **kwargs)

    return checked  # type: ignore[return-value]


@dataclass(frozen=True)
class Caller:
    """From a host's call to a network.

    Attributes:
        name: the module that users type, `networks.lokr`.
        algo: the algorithm it stands for.
        archs: architectures that the name asserts; none = every one.
        style: whose defaults go before the host's; "" = nobody's.
        alpha, dim: the network_alpha and network_dim of a call without them.
    """

    name: str
    algo: str
    archs: tuple[str, ...] = ()
    style: str = ""
    alpha: float = 1.0
    dim: int = DEFAULT_DIM

    def new(
        self,
        kind: type[Kind],
        host: str,
        multiplier: float,
        dim: int | None,
        alpha: float | None,
        text_encoder: TextEncoders,
        unet: nn.Module,
        raw: Mapping[str, Any],
    ) -> Kind:
        """A new network for training.

        Args:
            kind: the host's class of networks.
            host: whose defaults apply, a column of the argument table.
            multiplier: strength of the update, any finite number.
            dim: rank of the layers for which no argument says another; None = the entry's own.
            alpha: numerator of their scale alpha / dim, 0 = the dim; None = the entry's own.
            text_encoder: a model, a list of models and None in the order of the architecture's encoders, or None.
            unet: the denoiser.
            raw: the network arguments as the host hands them over, text or typed.

        Raises:
            ValueError: all mistakes of the call in one message.
        """
        problems = Problems(self.name)
        request = self._request(host, dim, alpha, text_encoder, unet, raw, problems)
        return self._build(kind, request, problems, multiplier)

    def from_weights(
        self,
        kind: type[Kind],
        host: str,
        multiplier: float,
        tensors: Mapping[str, Tensor],
        text_encoder: TextEncoders,
        unet: nn.Module,
        for_inference: bool,
        raw: Mapping[str, Any],
        source: str = "the file",
    ) -> Kind:
        """A network with the dims, forms, alphas and values of a file; options for training may be given too.

        Args:
            kind, host, multiplier, text_encoder, unet, raw: as for `new`.
            tensors: key -> tensor of the file; a FileTensors, if metadata are to count.
            for_inference: dropouts and noise never act.
            source: name of the file, for messages.

        Raises:
            ValueError: all mistakes of the call in one message.
        """
        problems = Problems(self.name)
        raw = without_stops(raw) if for_inference else raw
        request, file = self._file_request(host, tensors, text_encoder, unet, raw, source, problems)
        network = self._build(kind, request, problems, multiplier, for_inference)
        network.made_from = file
        report = network.load_opened(file)
        if report.strength and not report.incomplete:
            log.info("%s", report)
        return network

    def plan_from_weights(
        self,
        tensors: Mapping[str, Tensor],
        text_encoder: TextEncoders,
        unet: nn.Module,
        host: str = "sd_scripts",
        **kwargs: Any,
    ) -> Plan:
        """What `from_weights` would build; models may be on the meta device.

        Args:
            tensors, text_encoder, unet, host: as for `from_weights`.
            kwargs: the network arguments.

        Raises:
            ValueError: as the call itself.
        """
        source = tensors.source if isinstance(tensors, FileTensors) else "the file"
        return self.planned(host, None, None, text_encoder, unet, kwargs, Problems(self.name), tensors, source)

    def plan(
        self,
        network_dim: int | None,
        network_alpha: float | None,
        text_encoder: TextEncoders,
        unet: nn.Module,
        host: str = "sd_scripts",
        **kwargs: Any,
    ) -> Plan:
        """What that host's call would build; models may be on the meta device.

        Args:
            network_dim, network_alpha, text_encoder, unet, host: as for `new`.
            kwargs: the network arguments.

        Raises:
            ValueError: as the call itself.
        """
        return self.planned(host, network_dim, network_alpha, text_encoder, unet, kwargs, Problems(self.name))

    def planned(
        self,
        host: str,
        dim: int | None,
        alpha: float | None,
        text_encoder: TextEncoders,
        unet: nn.Module,
        raw: Mapping[str, Any],
        problems: Problems,
        tensors: Mapping[str, Tensor] | None = None,
        source: str = "the file",
    ) -> Plan:
        """The same, among other mistakes of the user.

        Args:
            host, dim, alpha, text_encoder, unet, raw: as for `new`.
            problems: what is wrong besides.
            tensors: of a file that decides dims, alphas and forms; None = the arguments decide.
            source: name of the file, for messages.

        Raises:
            ValueError: all mistakes in one message.
        """
        if tensors is None:
            request = self._request(host, dim, alpha, text_encoder, unet, raw, problems)
            plan = explained_plan(request, problems)
        else:
            request, _ = self._file_request(host, tensors, text_encoder, unet, raw, source, problems)
            plan, _ = build_plan(request, problems)
        beside = training_adapters.opened(request, problems)
        plan = replace(plan, beside=tuple(one.planned for one in beside))
        if host in self.kinds:
            self._class_for(self.kinds[host], request.args, problems)
        problems.raise_if_any()
        return plan

    @property
    def kinds(self) -> Mapping[str, type[HostNetwork]]:
        """Host -> the class of its networks."""
        return {}

    def _file_request(
        self,
        host: str,
        tensors: Mapping[str, Tensor],
        text_encoder: TextEncoders,
        unet: nn.Module,
        raw: Mapping[str, Any],
        source: str,
        problems: Problems,
    ) -> tuple[Request, AdapterFile]:
        request = self._request(host, None, None, text_encoder, unet, raw, problems, from_file=True)
        return of_file(request, tensors, source, problems)

    def _request(
        self,
        host: str,
        dim: int | None,
        alpha: float | None,
        text_encoder: TextEncoders,
        unet: nn.Module,
        raw: Mapping[str, Any],
        problems: Problems,
        from_file: bool = False,
    ) -> Request:
        if raw.get("algo") in (None, self.algo):
            raw, dim = in_our_words(self.style, raw, dim, problems)
        dim, alpha = self._dim(dim, problems), self._alpha(alpha, problems)
        options = {"network_dim": dim, "network_alpha": alpha}
        args = parse(raw, self.algo, problems, host, options, self.style)
        if args.help:
            show_help(self.name, self.algo, raw, args, options, recognised(unet))
        if args.style in UNET_STYLES and not from_file:
            text_encoder = None
        models = _Models.of(self, unet, text_encoder, problems)
        short = self.name.rpartition(".")[2]
        problems.documented = documented(host, short, self.algo, args.algo, self.style, models.arch.name)
        return models.request(dim, alpha, args)

    def _dim(self, dim: int | None, problems: Problems) -> int:
        """--network_dim, or the default."""
        try:
            return self.dim if dim is None else int(named("network_dim", dim, 1, whole))
        except ValueError as error:
            problems.add(str(error))
            return self.dim

    def _alpha(self, alpha: float | None, problems: Problems) -> float:
        """--network_alpha, or the default."""
        try:
            found = self.alpha if alpha is None else named("network_alpha", alpha)
        except ValueError as error:
            problems.add(str(error))
            return self.alpha
        if found < 0:
            problems.add(f"network_alpha={alpha} is negative; write a positive number, or 0 for the dim itself")
        return found

    def _build(
        self, kind: type[Kind], request: Request, problems: Problems, multiplier: float, for_inference: bool = False
    ) -> Kind:
        try:
            named("multiplier", multiplier)
        except ValueError as error:
            problems.add(str(error))
        plan, modules = build_plan(request, problems)
        beside = training_adapters.opened(request, problems)
        plan = replace(plan, beside=tuple(one.planned for one in beside))
        made = self._class_for(kind, request.args, problems)
        problems.raise_if_any()
        a = request.args
        stop_for_dry_run(a, plan)
        noise = None if a.ggpo_sigma is None or for_inference else (a.ggpo_sigma, a.ggpo_beta)
        roots = {part.name: model for part, model in request.parts}
        started, form = request.saved is None, plan.file_format
        network = made(request.arch, plan, modules, roots, multiplier, for_inference, noise, form, started)
        network.diagnosis = Diagnosis(0 if for_inference else a.diagnose_steps)
        network.average = Average(0 if for_inference else a.ema_decay, a.ema_save, _DEVICES[a.ema_device])
        network.runtime.factored, network.runtime.keeps_fp32 = a.bypass_mode, a.adapter_dtype == "fp32"
        network.allowance, network.resizes = Allowance(a.allow_missing), a.resume_resize
        network.accompany([one.network() for one in beside])
        layers = f", {len(plan.trained)} layers" if for_inference else ""
        log.info("%s %s from %s: %s%s", self.name, __version__, origin(self.name), plan.title, layers)
        network.tell_warnings()
        network.unannounced = "" if for_inference else "table" if a.verbose else "lines"
        return network

    @staticmethod
    def _class_for(kind: type[Kind], args: NetArgs, problems: Problems) -> type[Kind]:
        """The host's class, or what it has in its place for these arguments."""
        if args.ggpo_sigma is None:
            return kind
        noisy = kind.with_noise()
        if noisy is None:
            problems.idle("ggpo_sigma", " here: this trainer does not tell a network when a step is over; leave it out")
            return kind
        assert issubclass(noisy, kind)
        return noisy


@dataclass(frozen=True)
class _Models:
    """The host's models, told apart: which architecture, and which part each of them is."""

    arch: ArchSpec
    parts: tuple[tuple[Part, nn.Module], ...]

    @classmethod
    def of(cls, caller: Caller, unet: nn.Module, text_encoder: TextEncoders, problems: Problems) -> _Models:
        """
        Args:
            caller: whose name may assert the architecture.
            unet: the denoiser.
            text_encoder: a model, a list with gaps, or None.
            problems: takes up what does not go together.

        Raises:
            ValueError: the denoiser is of no architecture that we know.
        """
        try:
            arch = detect(unet)
        except ValueError as error:
            problems.add(str(error))
            problems.raise_if_any()
            raise
        if caller.archs and arch.name not in caller.archs:
            package = caller.name.rpartition(".")[0]
            problems.add(f"this model is {arch.title}: use --network_module {package}.{arch.entry}")
        encoders = list(text_encoder) if isinstance(text_encoder, Sequence) else [text_encoder]
        surplus = encoders[len(arch.text_encoders) :]
        if arch.text_encoders and any(model is not None for model in surplus):
            known = len(arch.text_encoders)
            problems.add(
                f"{arch.title} has {known} text encoders, but {len(encoders)} were given: hand over those alone"
            )
        pairs = zip(arch.text_encoders, encoders, strict=False)  # hosts may hand over fewer than there are
        given = [(part, model) for part, model in pairs if model is not None]
        return cls(arch, (*given, (arch.denoiser, unet)))

    def request(self, dim: int, alpha: float, args: NetArgs) -> Request:
        return Request(self.arch, self.parts, dim, alpha, args)
