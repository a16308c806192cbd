"""Who is compared: every package that puts adapters on layers, each asked by its own calls for the same adapter."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from networks import api
from networks.algos import ALGOS
from networks.layers.adapted import AdaptedLayer
from networks.tensors.geometry import Geometry

from . import hosts
from .cases import Case, Layer

SCALE = 0.5  # alpha / rank of all of them
WHOLE = 10_000  # the rank for which some build LoKr's second factor whole
SPREAD = 0.02  # of what is added to start values, so that no factor is 0


class Peer(Protocol):
    """A package with adapters.

    Attributes:
        name: in the tables.
        title: with its version, in the legend.
    """

    name: str
    title: str

    def fit(self, model: nn.Module, names: Sequence[str], case: Case) -> list[nn.Module] | None:
        """Put an adapter on layers of a model.

        Args:
            model: whose layers are frozen.
            names: dotted, of its layers.
            case: the adapter.

        Returns:
            Modules whose parameters that want gradients are the adapter's; None = it has no such adapter.
        """
        ...


@dataclass
class Adapted:
    """A layer with an adapter."""

    call: nn.Module
    parameters: list[nn.Parameter]  # that are trained
    known: list[Tensor]  # all that is there before a pass


def adapted(peer: Peer | None, layer: Layer, case: Case, dtype: torch.dtype, device: torch.device) -> Adapted | None:
    """A layer with an adapter.

    Args:
        peer: whose; None = the frozen layer alone.
        layer, case: what it is.
        dtype: of the base layer; the adapter is in fp32.
        device: of both.

    Returns:
        It; None where the peer has no such adapter for this layer.
    """
    model = nn.Sequential()
    model.add_module("layer", layer.build(dtype, device))
    made = [] if peer is None else fitted(peer, model, ["layer"], case)
    if made is None:
        return None
    modules = [model, *made]
    known = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return Adapted(model.get_submodule("layer"), trained(made), list(known.values()))


def fitted(peer: Peer, model: nn.Module, names: Sequence[str], case: Case) -> list[nn.Module] | None:
    """The adapter of a peer on a model: in fp32, on its device, in training, with no factor at 0.

    Args:
        peer, model, names, case: as for `Peer.fit`. An adapter that a peer refuses it has not.
    """
    device = next(model.parameters()).device
    try:
        made = peer.fit(model, names, case)
    except (ValueError, AssertionError, NotImplementedError, AttributeError, TypeError) as error:
        logging.getLogger(__name__).info("%s: %s", peer.name, error)
        return None
    for module in made or []:
        module.to(device).train()
        with torch.no_grad():
            for p in trained([module]):
                p.data = p.data.float()
                p.add_(torch.randn_like(p), alpha=SPREAD)
    return made


def trained(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """What wants gradients, each once."""
    return list({id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values())


class Ours:
    """This package."""

    name = "ours"

    def __init__(self) -> None:
        from networks._version import __version__

        self.title = f"ours: kohya-networks {__version__}"

    def fit(self, model: nn.Module, names: Sequence[str], case: Case) -> list[nn.Module]:
        return [self._layer(model.get_submodule(name), name, case) for name in names]

    def _layer(self, base: nn.Module, name: str, case: Case) -> nn.Module:
        geometry = Geometry.of(base)
        assert geometry is not None
        adapter = ALGOS[case.algo](geometry, case.dim, dict(case.options)).to(next(base.parameters()).device)
        adapter.mark_initialised_()
        scale = SCALE if adapter.laid_out.rank is not None else 1.0
        layer = AdaptedLayer(name, base, adapter, scale, dora="output" if case.dora else "")
        layer.attach()
        return layer


def network_of(model: nn.Module, case: Case) -> Any:
    """A network of ours on a model, attached, as its users make it."""
    apply: Any = api.apply
    more = {"use_dora": True} if case.dora else {}
    return apply(model, algo=case.algo, dim=case.dim, alpha=case.dim * SCALE, **case.options, **more)


_FIXED = {"lora_fa": ("lora_down",)}  # what the trainer's network of a module does not train


class Kohya:
    """A package whose modules take a layer and have `apply_to`, as those of the trainers.

    Args:
        name, title: as of every peer.
        make: case -> what makes its module for a name and a layer; None = there is none.
    """

    def __init__(
        self, name: str, title: str, make: Callable[[Case], Callable[[str, nn.Module], nn.Module] | None]
    ) -> None:
        self.name, self.title, self._make = name, title, make

    def fit(self, model: nn.Module, names: Sequence[str], case: Case) -> list[nn.Module] | None:
        make, made = self._make(case), []
        if make is None:
            return None
        for name in names:
            module = make(name.replace(".", "_"), model.get_submodule(name))
            module.apply_to()  # type: ignore[operator]
            for fixed in _FIXED.get(case.algo, ()):
                module.get_submodule(fixed).requires_grad_(False)
            made.append(module)
        return made


# -- LyCORIS

_LYCORIS = {
    "lora": "locon.LoConModule",
    "loha": "loha.LohaModule",
    "lokr": "lokr.LokrModule",
    "glora": "glora.GLoRAModule",
    "ia3": "ia3.IA3Module",
    "diag-oft": "diag_oft.DiagOFTModule",
    "boft": "boft.ButterflyOFTModule",
    "dylora": "dylora.DyLoraModule",
    "tlora": "tlora.TLoraModule",
    "full": "full.FullModule",
}


_ONE_WAY = {"full", "dylora"}  # which have no other way


def lycoris(bypass: bool) -> Peer:
    """LyCORIS as it is by default, or with `bypass_mode=True`.

    Raises:
        ImportError: it is not installed.
    """
    importlib.import_module("lycoris")

    def make(case: Case) -> Callable[[str, nn.Module], nn.Module] | None:
        if case.algo not in _LYCORIS or (bypass and (case.dora or case.algo in _ONE_WAY)):
            return None
        file, _, cls = _LYCORIS[case.algo].partition(".")
        kind = getattr(importlib.import_module(f"lycoris.modules.{file}"), cls)
        options = dict(case.options) | ({"weight_decompose": True} if case.dora else {})
        return lambda name, base: kind(name, base, 1.0, case.dim, case.dim * SCALE, bypass_mode=bypass, **options)

    name, how = ("lyc-byp", ", bypass_mode=True") if bypass else ("lyc", "")
    return Kohya(name, f"{name}: lycoris-lora {version('lycoris-lora')}{how}", make)


# -- the trainers' own modules


def trainer(name: str, title: str, checkout: hosts.Checkout) -> Peer:
    """The modules of a checkout; those that are not in it, it has not."""

    def make(case: Case) -> Callable[[str, nn.Module], nn.Module] | None:
        if case.algo not in _OF_TRAINERS or case.dora:
            return None
        file, cls, options = _OF_TRAINERS[case.algo]
        try:
            kind = getattr(checkout.network_module(file), cls)
        except ImportError:
            return None
        return lambda saved, base: kind(saved, base, 1.0, *options(case, base)[0], **options(case, base)[1])

    return Kohya(name, title, make)


def _plain(case: Case, base: Any) -> tuple[tuple[float, ...], dict[str, Any]]:
    return (case.dim, case.dim * SCALE), {}


def _kronecker(case: Case, base: Any) -> tuple[tuple[float, ...], dict[str, Any]]:
    dim = WHOLE if case.options.get("full_matrix") else case.dim
    return (dim, dim * SCALE), {"factor": case.options.get("factor", -1)}


def _blocks(case: Case, base: Any) -> tuple[tuple[float, ...], dict[str, Any]]:
    return (base.weight.shape[0] // case.dim, 1.0), {}  # their dim is the number of blocks, alpha the constraint


def _units(case: Case, base: Any) -> tuple[tuple[float, ...], dict[str, Any]]:
    return (case.dim, case.dim * SCALE), {"unit": case.options["block_size"]}


_OF_TRAINERS = {
    "lora": ("lora", "LoRAModule", _plain),
    "lora_fa": ("lora_fa", "LoRAModule", _plain),
    "loha": ("loha", "LoHaModule", _plain),
    "lokr": ("lokr", "LoKrModule", _kronecker),
    "dylora": ("dylora", "DyLoRAModule", _units),
    "diag-oft": ("oft", "OFTModule", _blocks),
}


# -- PEFT


_DORA = {"lora"}  # what has magnitudes in PEFT


class Peft:
    """PEFT, by `inject_adapter_in_model`.

    Raises:
        ImportError: it is not installed.
    """

    name = "peft"

    def __init__(self) -> None:
        self._peft: Any = importlib.import_module("peft")
        self.title = f"peft: PEFT {version('peft')}"

    def fit(self, model: nn.Module, names: Sequence[str], case: Case) -> list[nn.Module] | None:
        config = self._config(case, list(names))
        if config is None:
            return None
        self._peft.inject_adapter_in_model(config, model)
        return [model]

    def _config(self, case: Case, names: list[str]) -> Any:
        peft, dim, alpha = self._peft, case.dim, case.dim * SCALE
        whole = case.options.get("full_matrix")
        makers: dict[str, Callable[[], Any]] = {
            "lora": lambda: peft.LoraConfig(r=dim, lora_alpha=alpha, target_modules=names, use_dora=case.dora),
            "loha": lambda: peft.LoHaConfig(r=dim, alpha=alpha, target_modules=names),
            "lokr": lambda: peft.LoKrConfig(
                r=WHOLE if whole else dim, alpha=alpha, target_modules=names,
                decompose_factor=case.options.get("factor", -1),
            ),
            "ia3": lambda: peft.IA3Config(target_modules=names, feedforward_modules=[]),
            "diag-oft": lambda: peft.OFTConfig(
                r=0, oft_block_size=dim, target_modules=names, use_cayley_neumann=False,  # exact, as everybody's
            ),
            "boft": lambda: peft.BOFTConfig(boft_block_size=dim, boft_n_butterfly_factor=1, target_modules=names),
            "glora": lambda: peft.GloraConfig(r=dim, target_modules=names, config_C="none", config_D_E="none"),
        }  # fmt: skip
        has = case.algo in (_DORA if case.dora else makers)
        return makers[case.algo]() if has else None


def peers_of(checkouts: Mapping[str, hosts.Checkout]) -> tuple[list[Peer], list[str]]:
    """All that are there, ours first, and a line for each that is not.

    Args:
        checkouts: of the trainers, by their short names.
    """
    makers: dict[str, Callable[[], Peer]] = {
        "lycoris-lora": lambda: lycoris(False),
        "lycoris-lora with bypass_mode": lambda: lycoris(True),
        "sd-scripts": lambda: _of_checkout("sds", "sd-scripts", checkouts, "--sd_scripts"),
        "musubi-tuner": lambda: _of_checkout("mus", "musubi-tuner", checkouts, "--musubi"),
        "peft": Peft,
    }
    found, lines = list[Peer]([Ours()]), []
    for title, make in makers.items():
        try:
            found.append(make())
        except ImportError as error:
            lines.append(f"{title} is left out: {error}")
    return found, lines


def _of_checkout(name: str, title: str, checkouts: Mapping[str, hosts.Checkout], option: str) -> Peer:
    if name not in checkouts:
        raise ImportError(f"give its checkout by {option}")
    checkouts[name].network_module("lora")
    return trainer(name, f"{name}: the checkout of {title}", checkouts[name])
