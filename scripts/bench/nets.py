"""Whole networks: how long they take to create, save and load, and to merge into the weights of a model."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from networks.models.skeleton import skeleton

from .cases import Case
from .hosts import imported
from .peers import SCALE, Peer, fitted, network_of
from .report import Table
from .setting import Setting
from .timing import now, once

DIM = 16
TASKS = ("create", "save", "load", "from file")


Module = Callable[[str], Any]  # algorithm -> a module with `create_network`


@dataclass(frozen=True)
class Contest:
    """A model without weights, its text encoders, who makes networks on it, and how often."""

    title: str
    unet: nn.Module
    encoders: list[nn.Module | None]
    makers: dict[str, Module]
    samples: int = 2


def networks(setting: Setting) -> Iterator[Table]:
    """Seconds for a network on a model without weights."""
    for contest in _contests(setting):
        rows = []
        for algo in setting.sizes.networks:
            found = {}
            for name, maker in contest.makers.items():
                setting.progress.step(f"networks: {name} {algo} on {contest.title}")
                try:
                    module = maker(algo)
                    found[name] = [_tasks(module, contest) for _ in range(contest.samples)]
                except (ImportError, ValueError, TypeError, RuntimeError) as error:
                    setting.lines.append(f"no network {algo} of {name} on {contest.title}: {_first_line(error)}")
            for task in TASKS:
                best = {name: min(each[task] for each in samples) for name, samples in found.items()}
                cells = [f"{best[name]:.2f}" if name in best else "-" for name in contest.makers]
                rows.append([f"{algo}, {task}", *cells])
        yield Table(
            f"Networks of rank {DIM} on {contest.title}: seconds",
            "On the model without weights. Files are in bf16. From file: as the generators call it, "
            "create_network_from_weights, apply_to, load_state_dict.",
            ["network", *contest.makers],
            rows,
        )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


_LATE = {"sds": ("library.train_util", "library.sdxl_model_util"), "mus": ("musubi_tuner.utils.model_utils",)}


def _contests(setting: Setting) -> Iterator[Contest]:
    """SDXL with text encoders, of the trainer's class where its checkout is there; Wan, where musubi's is."""
    for trainer in setting.checkouts:
        for name in _LATE[trainer]:  # what it would import in the midst of a call
            imported(name)
    makers: dict[str, Module] = {"ours": _ours}
    if any(peer.name == "lyc" for peer in setting.peers):
        makers["lyc"] = _Lycoris
    if not setting.sizes.release:
        with torch.device("meta"):
            stack = Stack(64, 2)
        yield Contest("a small model", stack, [], {"ours": _ours})
        return
    made = skeleton(setting.sizes.release)
    if "sds" in setting.checkouts:
        with torch.device("meta"):
            unet = imported("library.sdxl_original_unet").SdxlUNet2DConditionModel()
        theirs: dict[str, Module] = {"sds": setting.checkouts["sds"].network_module}
        yield Contest("SDXL with its text encoders", unet, made.text_encoders, makers | theirs)
    else:
        yield Contest("SDXL with its text encoders", made.unet, made.text_encoders, makers)
    if "mus" in setting.checkouts:
        with torch.device("meta"):
            wan = imported("musubi_tuner.wan.modules.model").WanModel(
                dim=5120, ffn_dim=13824, num_heads=40, num_layers=40
            )
        checkout = setting.checkouts["mus"]
        both: dict[str, Module] = {
            "ours": lambda algo: _Musubi(_ours(algo)),
            "mus": lambda algo: _Musubi(checkout.network_module(_WAN.get(algo, algo))),
        }
        yield Contest("Wan 14B", wan, [], both, samples=1)


_WAN = {"lora": "lora_wan"}  # musubi's entry
_LYCORIS = {"lora": "locon"}  # its word


def _ours(algo: str) -> Any:
    return importlib.import_module(f"networks.{algo}")


class _Lycoris:
    """LyCORIS' entry, which has its algorithm as an argument, with the calls of sd-scripts."""

    def __init__(self, algo: str) -> None:
        self._entry: Any = importlib.import_module("lycoris.kohya")
        self._algo = _LYCORIS.get(algo, algo)

    def create_network(self, *args: Any, **kwargs: Any) -> Any:
        return self._entry.create_network(*args, algo=self._algo, preset="attn-mlp", **kwargs)

    def create_network_from_weights(self, *args: Any, **kwargs: Any) -> Any:
        return self._entry.create_network_from_weights(*args, **kwargs)


class _Musubi:
    """An entry with musubi's calls, with those of sd-scripts."""

    def __init__(self, entry: Any) -> None:
        self._entry = entry

    def create_network(self, *args: Any, **kwargs: Any) -> Any:
        return self._entry.create_arch_network(*args, **kwargs)

    def create_network_from_weights(self, multiplier: float, file: str, vae: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = load_file(file)
        return self._entry.create_arch_network_from_weights(multiplier, tensors, *args, **kwargs), tensors


def _tasks(module: Any, contest: Contest) -> dict[str, float]:
    """Seconds of each task, once."""
    cpu, unet, encoders = torch.device("cpu"), contest.unet, contest.encoders
    clocks = [now(cpu)]
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "adapter.safetensors")
        network = module.create_network(1.0, DIM, DIM * SCALE, None, encoders, unet)
        network.apply_to(encoders, unet, bool(encoders), True)
        clocks.append(now(cpu))
        network.save_weights(file, torch.bfloat16, {"ss_network_dim": str(DIM)})  # with any metadata, hashes too
        clocks.append(now(cpu))
        network.load_weights(file)
        clocks.append(now(cpu))
        _free(network, [unet, *encoders])
        start = now(cpu)
        network, tensors = module.create_network_from_weights(1.0, file, None, encoders, unet, for_inference=True)
        network.apply_to(encoders, unet, bool(encoders), True)
        network.load_state_dict(tensors, False)
        taken = now(cpu) - start
        _free(network, [unet, *encoders])
    return dict(zip(TASKS, [*(b - a for a, b in zip(clocks, clocks[1:], strict=False)), taken], strict=True))


def _free(network: Any, models: Sequence[nn.Module | None]) -> None:
    """The models as they were."""
    if hasattr(network, "detach"):
        network.detach()
    for module in (each for model in models if model is not None for each in model.modules()):
        for name in [name for name in vars(module) if name == "forward" or name.startswith("_lycoris")]:
            del vars(module)[name]


# -- merging


class Block(nn.Module):
    """Four square projections."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in "qkvo":
            self.add_module(name, nn.Linear(width, width, bias=False))


class Stack(nn.Module):
    """Blocks, as of any model."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])


MERGED = {"lora": Case("lora", 16), "loha": Case("loha", 8), "lokr": Case("lokr", 8, {"factor": 8})}


def merging(setting: Setting) -> Iterator[Table]:
    """Times over those of cast, change, sum and rounding."""
    width, count = setting.sizes.merged
    torch.manual_seed(0)
    model = Stack(width, max(1, count // 4)).to(setting.device, torch.bfloat16).requires_grad_(False)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    peers = [peer.name for peer in setting.peers if peer.name in _MERGES]
    rows = []
    for algo in setting.sizes.networks:
        case, makes = MERGED[algo], dict[str, Callable[[], Callable[[], object]]]()
        setting.progress.step(f"merging: {algo}")
        makes["floor"] = _floor(model, names, case)
        for peer in (each for each in setting.peers if each.name in _MERGES):
            make = _merge(peer, model, names, case)
            try:
                make()
            except (AttributeError, LookupError) as error:
                setting.lines.append(f"no merge of {algo} by {peer.name}: {_first_line(error)}")
                continue
            _restore(model)
            makes[peer.name] = make
        found = once(makes, setting.device)
        ratios = [f"{found[name] / found['floor']:.2f}" if name in found else "-" for name in peers]
        rows.append([algo, f"{found['floor']:.3f}", *ratios])
    yield Table(
        f"In-memory merge into {len(names)} weights {width} x {width} in bf16, over its floor",
        "The floor, in seconds: the weight in fp32, the change by the fewest products, their sum, rounding.",
        ["adapter", "floor", *peers],
        rows,
    )


def _floor(model: nn.Module, names: Sequence[str], case: Case) -> Callable[[], Callable[[], None]]:
    weights = [model.get_parameter(f"{name}.weight") for name in names]
    O, I = weights[0].shape
    shapes, add = _FLOORS[case.algo](O, I, case)
    factors = [torch.full(shape, 1e-3, device=weights[0].device) for shape in shapes]

    def run() -> None:
        with torch.no_grad():
            for weight in weights:
                weight.copy_(add(weight.float(), *factors))

    return lambda: run


Floor = tuple[list[tuple[int, ...]], Callable[..., Tensor]]  # shapes of factors; what adds their change to W


def _lora_floor(O: int, I: int, case: Case) -> Floor:
    return [(O, case.dim), (case.dim, I)], lambda W, up, down: W.addmm_(up, down, alpha=SCALE)


def _loha_floor(O: int, I: int, case: Case) -> Floor:
    half: list[tuple[int, ...]] = [(O, case.dim), (case.dim, I)]
    return half * 2, lambda W, a, b, c, d: W.addcmul_(a @ b, c @ d, value=SCALE)


def _lokr_floor(O: int, I: int, case: Case) -> Floor:
    f = case.options["factor"]

    def add(W: Tensor, w1: Tensor, a: Tensor, b: Tensor) -> Tensor:
        W.view(f, O // f, f, I // f).addcmul_(w1, (a @ b)[:, None], value=SCALE)
        return W

    return [(f, 1, f, 1), (O // f, case.dim), (case.dim, I // f)], add


_FLOORS: dict[str, Callable[[int, int, Case], Floor]] = {
    "lora": _lora_floor,
    "loha": _loha_floor,
    "lokr": _lokr_floor,
}


def _merge(peer: Peer, model: nn.Module, names: Sequence[str], case: Case) -> Callable[[], Callable[[], object]]:
    def make() -> Callable[[], object]:
        _restore(model)
        return _MERGES[peer.name](peer, model, names, case)

    return make


def _restore(model: nn.Module) -> None:
    _free(None, [model])
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer"):  # PEFT's layer, in the place of the model's
            above, _, own = name.rpartition(".")
            setattr(model.get_submodule(above), own, module.base_layer)


def _merge_ours(peer: Peer, model: nn.Module, names: Sequence[str], case: Case) -> Callable[[], object]:
    network = network_of(model, case)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p), alpha=1e-3)
    network.detach()
    return lambda: network.merge()


def _merge_peft(peer: Peer, model: nn.Module, names: Sequence[str], case: Case) -> Callable[[], object]:
    fitted(peer, model, names, case)
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "base_layer")]

    def run() -> None:
        for layer in layers:
            layer.merge()

    return run


def _merge_lycoris(peer: Peer, model: nn.Module, names: Sequence[str], case: Case) -> Callable[[], object]:
    made: list[Any] = fitted(peer, model, names, case) or []

    def run() -> None:
        for module in made:
            module.merge_to(1.0)

    return run


_MERGES: dict[str, Callable[[Peer, nn.Module, Sequence[str], Case], Callable[[], object]]] = {
    "ours": _merge_ours,
    "lyc": _merge_lycoris,
    "peft": _merge_peft,
}
