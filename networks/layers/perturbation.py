"""GGPO, gradient-guided perturbation: noise on the weight in training, so that flat minima are found.

    y += m op(x, E)      E[o] ~ N(0, I) * (sigma sqrt(n0^2 + ||s dW[o]||^2) + beta ||d(s dW)[o]||^2) / sqrt(O)

n0 is the mean row norm of the base weight, s dW the true, scaled update, d(s dW) its change along the gradients of the
last step. The noise has no gradient; it is that of the step, the same in all processes, where steps are counted.
Nothing is computed, kept or drawn while it is off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tensors.geometry import Geometry
from ..tensors.seeding import seeded_normal

if TYPE_CHECKING:
    from .adapted import AdaptedLayer


class Perturbation:
    """The noise of one layer; statistics follow the optimizer's steps.

    Attributes:
        weight_norms: ||s dW|| by row [O]; None before the first step.
        combined_norms: sqrt(n0^2 + ||s dW||^2).
        gradient_norms: ||d(s dW)||.
        number: 0-d, what the noise of this step is drawn from; None = each pass draws its own.
    """

    _STATISTICS = ("weight_norms", "combined_norms", "gradient_norms")

    def __init__(self, sigma: float, beta: float) -> None:
        self.sigma, self.beta = sigma, beta
        self.weight_norms: Tensor | None = None
        self.combined_norms: Tensor | None = None
        self.gradient_norms: Tensor | None = None
        self.number: Tensor | None = None
        self._base_norm: float | None = None

    def statistics(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: value for name in self._STATISTICS if (value := getattr(self, name)) is not None}

    def set_statistics(self, statistics: Mapping[str, Tensor], device: torch.device) -> None:
        """The inverse, on a device; names that are missing are forgotten."""
        for name in self._STATISTICS:
            value = statistics.get(name)
            setattr(self, name, None if value is None else value.to(device))

    @torch.no_grad()
    def see_weights(self, layer: AdaptedLayer) -> None:
        """At every optimizer step: the size of the update."""
        if self._base_norm is None:
            whole = layer.whole_weight()
            self._base_norm = float(whole.flatten(1).norm(dim=1).mean())
        parameter = next(layer.adapter.parameters())
        nothing = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        squares = layer.acting.norm_sq(nothing.expand(layer.adapter.geometry.weight_shape), layer.strength, True)
        self.weight_norms = squares.sqrt()
        self.combined_norms = (self._base_norm**2 + squares).sqrt()

    @torch.no_grad()
    def see_gradients(self, layer: AdaptedLayer) -> None:
        """Before the gradients are cleared: the change that they ask for."""
        self.gradient_norms = (layer.strength * layer.acting.gradient_norm_sq().sqrt()).abs()

    def output(self, geometry: Geometry, x: Tensor, rows: Callable[[Tensor], Tensor], first: int = 0) -> Tensor | None:
        """op(x, E) for some rows of the layer; None before there are statistics.

        Args:
            geometry: of the whole layer.
            x: its input.
            rows: takes these rows of something that has one (axis 0) for each output feature.
            first: of these rows, which tells their noise apart from that of others.
        """
        if self.combined_norms is None or self.gradient_norms is None:
            return None
        with torch.no_grad():
            size = self.sigma * self.combined_norms + self.beta * self.gradient_norms.square()
            size = rows((size / geometry.out_features**0.5).to(x))
            shape = [size.shape[0], *geometry.weight_shape[1:]]
            if self.number is None:
                noise = torch.randn(shape, dtype=x.dtype, device=x.device)
            else:
                noise = seeded_normal(self.number + first, shape, x)
            return geometry.op(x, noise * size.reshape(-1, 1, *geometry.ones))
