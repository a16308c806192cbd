"""The exponential moving average (EMA) of what is trained, for samples and files in place of the newest values.

    average += (1 - d) (value - average)        d = min(decay, (1 + n) / (10 + n)), and 0 at the first step

after each step of the optimizer, n of them before: the warm-up of diffusers' EMAModel, in which start values count for
nothing. What is averaged are factors, not updates: mean(B A) is mean(B) mean(A) and their covariance, which is small
where values change little in the 1 / (1 - decay) steps that it covers.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..files.averages import METADATA, decay_at
from ..layers.adapted import AdaptedLayer
from ..plan.plan import PlanRow
from .changes import Steps

log = logging.getLogger(__name__)

STATE = "live_average."  # before its keys in a live state
STEPS = "steps"
ONLY, ALSO, OFF = "only", "also", "off"  # files hold the average; the trained values, and others the average; neither

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])
Layers = Sequence[tuple[PlanRow, AdaptedLayer]]


def _outside_graphs(method: Method) -> Method:
    """A method that no compiled graph takes up, as torch.compiler.disable makes it. That one imports the compiler at
    once, which takes longer than all else here together: it is asked where there is a compiler already."""
    made: list[Callable[..., Any]] = []

    @functools.wraps(method)
    def call(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return method(*args)
        if not made:
            made.append(torch.compiler.disable(method))
        return made[0](*args)

    return call  # type: ignore[return-value]


class Average:
    """The average of one network. It is kept in fp32 or wider, outside of the network's parameters, so that no cast of
    a host rounds it. Frozen values have none: theirs are what they are.

    Everything acts by the newest values, merging, too, but passes without gradients and files, if they ask for it.
    While it is in use the parameters stand on its tensors, and nothing is copied: their own come back untouched, and
    neither autograd nor an optimizer sees a change. It is used within passes of one thread at a time; training in one
    while another draws would train the average.

    Args:
        decay: in [0, 1); 0 = there is none.
        files: who holds it, ONLY, ALSO or OFF.
        device: where it is kept; None = where the adapter is.
    """

    def __init__(self, decay: float = 0.0, files: str = ONLY, device: torch.device | None = None) -> None:
        self.decay, self.files, self.device = decay, files, device
        self.steps = 0
        self._parameters: dict[str, nn.Parameter] = {}
        self._values: dict[str, Tensor] = {}
        self._optimizer = Steps(())
        self._trains = False  # what changes from now on is a step
        self.is_told = False  # the host calls at the start of each pass
        self._own: list[Tensor] = []  # the parameters' own values, while it is in use
        self._ready: list[Tensor] = []  # it as the parameters take it, as long as no step changes it
        self._depth = 0

    @property
    def is_shown(self) -> bool:
        """Whether samples and files ask for it."""
        return bool(self.decay) and self.files != OFF

    @property
    def in_use(self) -> bool:
        """Whether parameters have its values."""
        return bool(self._own)

    @property
    def exists(self) -> bool:
        """Whether training has begun."""
        return bool(self._values)

    @property
    def is_saved(self) -> bool:
        """Whether a file of this moment holds it."""
        return self.is_shown and self.exists

    # -- steps

    @_outside_graphs
    def follow(self, layers: Layers) -> None:
        """At the start of each pass with gradients, before or in it.

        Raises:
            ValueError: the first time, where parameters are divided over processes.
        """
        if not self.decay:
            return
        self.put_back()
        if not self.exists:
            self._begin(layers)
        self._catch_up()
        self._trains = True

    def no_step(self) -> AbstractContextManager[None]:
        """What is changed in here is part of the step before, or of none."""
        return self._optimizer.none()

    def _begin(self, layers: Layers) -> None:
        self._parameters = {
            f"{layer.lora_name}.{path}": parameter for row, layer in layers for path, parameter in _trained(row, layer)
        }
        with _plain():
            self._values = {key: self._wide(parameter).clone() for key, parameter in self._parameters.items()}
        self._optimizer, self._trains = Steps(self._parameters.values()), False
        self.steps, self._ready = 0, []

    def _wide(self, value: Tensor) -> Tensor:
        dtype = torch.promote_types(value.dtype, torch.float32)
        return value.detach().to(self.device or value.device, dtype)

    def _catch_up(self) -> None:
        """With the last step, if it has not seen it."""
        if self._depth or not self.exists:
            return
        if self._optimizer.taken() and self._trains:
            self._step()

    def _step(self) -> None:
        decay = decay_at(self.decay, self.steps)
        self.steps, self._ready = self.steps + 1, []
        with _plain():
            new = [self._wide(parameter) for parameter in self._parameters.values()]
            for key, value in zip(self._values, new, strict=True):
                self._values[key] = self._values[key].to(value.device)  # hosts move adapters
            torch._foreach_lerp_([*self._values.values()], new, 1 - decay)

    # -- its use

    @contextmanager
    def written(self, layers: Layers) -> Iterator[None]:
        """The layers have its values in here, with all their digits; their parameters are put aside for so long."""
        self.put_back()
        self._catch_up()
        aside: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
        try:
            for path, module in (pair for _, layer in layers for pair in layer.named_modules(prefix=layer.lora_name)):
                for name, own in [*module._parameters.items()]:
                    if own is not None:
                        value = self._values.get(f"{path}.{name}", own.detach())
                        value = value.to(own.device, torch.promote_types(own.dtype, torch.float32))
                        aside.append((module._parameters, name, own))
                        module._parameters[name] = nn.Parameter(value, requires_grad=False)
            yield
        finally:
            for parameters, name, own in aside:
                parameters[name] = own

    @_outside_graphs
    def enter(self) -> None:
        """A pass that draws begins; passes may be nested."""
        self._catch_up()
        self._depth += 1
        if self._depth > 1 or not self.exists:
            return
        with _plain():
            if not self._ready:
                pairs = zip(self._values.values(), self._parameters.values(), strict=True)
                self._ready = [value.to(parameter.device, parameter.dtype) for value, parameter in pairs]
            self._own = [parameter.data for parameter in self._parameters.values()]
            for parameter, value in zip(self._parameters.values(), self._ready, strict=True):
                parameter.data = value

    @_outside_graphs
    def leave(self) -> None:
        """It ends."""
        self._depth = max(0, self._depth - 1)
        if not self._depth:
            self.put_back()

    @_outside_graphs
    def put_back(self) -> None:
        """The parameters have their own values, also where a pass was broken off in a way that no hook learns of."""
        self._depth = 0
        if self._own:
            with _plain():
                for parameter, own in zip(self._parameters.values(), self._own, strict=True):
                    parameter.data = own
            self._own = []

    def told(self) -> dict[str, str]:
        """Metadata of a file with its values."""
        return {METADATA: json.dumps({"decay": self.decay, STEPS: self.steps})}

    # -- state

    def state(self) -> dict[str, Tensor]:
        """Its part of a live state; {} before training."""
        if not self.exists:
            return {}
        self.put_back()
        self._catch_up()
        found = {f"{STATE}{key}": value for key, value in self._values.items()}
        return {**found, f"{STATE}{STEPS}": torch.tensor(self.steps)}

    def take_state(self, found: Mapping[str, Tensor], layers: Layers) -> None:
        """Go on from a live state.

        Args:
            found: its part of the state, {} = there is none.
            layers: of the network, which has the values of the state already.
        """
        if not self.decay:
            if found:
                log.warning("the state has an average, which is not gone on with: give ema_decay to keep it")
            return
        self.put_back()
        self._values, self._parameters, self.steps = {}, {}, 0
        if not found:
            log.info("the state has no average: ema_decay begins one with the next step")
            return
        self._begin(layers)
        self.steps = int(found[STATE + STEPS])
        with _plain():
            for key, value in self._values.items():
                if f"{STATE}{key}" in found:
                    value.copy_(found[f"{STATE}{key}"])


def split_state(state: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """What belongs to a live state by its names, without an average's part, and that part."""
    own = {key: value for key, value in state.items() if not key.startswith(STATE)}
    return own, {key: value for key, value in state.items() if key.startswith(STATE)}


def _trained(row: PlanRow, layer: AdaptedLayer) -> Iterator[tuple[str, nn.Parameter]]:
    """
    Raises:
        ValueError: a process has a part of them alone.
    """
    every = list(layer.parameters())
    if sum(p.numel() for p in every) != row.parameters or any(hasattr(p, "placements") for p in every):
        raise ValueError(
            "ema_decay does not go with an adapter that is divided over processes (ZeRO 3, FSDP): divide the model "
            "alone, use ZeRO 1 or 2, or leave ema_decay out"
        )
    yield from ((path, parameter) for path, parameter in layer.learnt() if parameter.requires_grad)


@contextmanager
def _plain() -> Iterator[None]:
    """Tensors made in here are no less than others, also where a host draws in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield
