"""One adapted layer outside any network, for programs that build their networks themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .._errors import located
from ..algos import ALGOS
from ..args.coerce import named, whole
from ..layers.adapted import AdaptedLayer
from ..layers.dropout import Dropouts
from ..layers.runtime import Runtime
from ..tensors.geometry import Geometry


class SingleLayer(AdaptedLayer):
    """An adapter of `algo` with its own strength on one Linear or convolution.

    Args:
        name: the saved name.
        module: Linear or convolution.
        algo: key of ALGOS, with its default options.
        dim: rank.
        alpha: scale is alpha / dim; None and 0 stand for the dim.
        dropouts: dropout, rank_dropout, module_dropout -> probability.
        multiplier: strength.
        for_inference: dropouts never act.

    Raises:
        ValueError: the layer is of another kind, or a number is none that the formula can take.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        algo: str,
        dim: int,
        alpha: float | None,
        dropouts: Mapping[str, Any],
        multiplier: float = 1.0,
        for_inference: bool = False,
    ) -> None:
        geometry = Geometry.of(module)
        if geometry is None:
            raise ValueError(f"{name}: {type(module).__name__} is neither a Linear nor a convolution: leave it out")
        with located(name):
            runtime = Runtime(named("multiplier", multiplier), for_inference=for_inference)
            scale = named("alpha", alpha or 0, 0)
            adapter = ALGOS[algo](geometry, int(named("lora_dim", dim, 1, whole)))
        super().__init__(name, module, adapter, 1.0, Dropouts(**dropouts), runtime)
        self.set_alpha(scale)
