"""What makes the golden files and what checks them: toy models, the call of a case, its training step, its updates.

Of the package it uses only what hosts use, the functions of an entry and the methods of a network, so that it runs
beside every version. No value here is random and none depends on a platform: all come from integer arithmetic.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Models = dict[str, nn.Module]
LR = 1e-2
# So large that a gradient which is 0 but for rounding moves nothing: Adam would make a whole step of it.
EPS = 1e-4


@dataclass(frozen=True)
class Case:
    """One golden adapter: who made it, with which call.

    Attributes:
        what: it is, for people.
        entry: the module that is typed, `networks.lora`.
        host: whose functions are called, "sd_scripts" or "musubi".
        model: of models.json.
        args: network_args, as a host hands them over.
        preset: text of a TOML file that they name as PRESET.
        time: of the training steps, as the denoiser is told it.
        block: the one which DyLoRA trains, -1 = it has no choice.
        decay: weight decay; 0 where values start far from 0, so that it does not matter from where they are counted.
        computed: suffixes of saved values that are results of arithmetic, beside those of COMPUTED.
        product: the factors of a file are not unique, only their product is; it has `product` times the dim.
        saved: how far a computed value may be off when it is saved again, in parts of the largest of its tensor.
        unmerged: layers without a weight are trained, so that updates show in outputs alone.
        exact: its updates are bits of the file.
    """

    what: str
    model: str
    args: Mapping[str, str] = field(default_factory=dict)
    entry: str = "networks.lora"
    host: str = "sd_scripts"
    dim: int = 2
    alpha: float = 1.0
    preset: str = ""
    time: float = 0.0
    block: int = -1
    decay: float = 0.01
    computed: Sequence[str] = ()
    product: int = 0
    saved: float = 1e-6
    unmerged: bool = False
    exact: bool = False

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults."""
        plain = asdict(Case("", ""))
        return {name: value for name, value in asdict(self).items() if value != plain[name]}


PRESET = "PRESET"  # stands for the path of the case's preset


# -- numbers and models


@functools.cache
def numbers(name: str, *shape: int) -> Tensor:
    """Multiples of 1/512 from -1 to below 1, by name and place; not to be changed."""
    prime, start = 65537, zlib.crc32(name.encode())
    values = (torch.arange(torch.Size(shape).numel()) + start % prime) % prime
    for shift in (0, start // prime):
        values = (values + shift) % prime
        values = values * values % prime * values % prime  # cubes of a field of this size are a permutation of it
    return ((values % 1024 - 512) / 512).float().reshape(shape)


class _Rms(nn.Module):
    """The trainers' own RMS norms, which differ in the names of their attributes."""

    def __init__(self, size: int, weight: str = "weight", says_size: bool = True) -> None:
        super().__init__()
        self.name, self.size = weight, size
        self.register_parameter(weight, nn.Parameter(torch.ones(size)))
        if says_size:
            self.dim, self.eps = size, 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * getattr(self, self.name)


KINDS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _Rms)
}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Root:
    """A forward pass: every layer by itself, on numbers of its own. It can be told the time by any of the names that
    the trainers' models have for it."""

    def forward(  # type: ignore[misc]
        self: nn.Module, timestep: Any = None, timesteps: Any = None, t: Any = None, time: Any = None
    ) -> list[Tensor]:
        return [layer(_input(name, layer).to(_dtype(self))) for name, layer in layers(self)]


def layers(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in root.named_modules() if isinstance(module, tuple(KINDS.values())))


def _dtype(root: nn.Module) -> torch.dtype:
    return next(root.parameters()).dtype


def _input(name: str, layer: Any) -> Tensor:
    """Two samples."""
    if isinstance(layer, _CONVOLUTIONS):
        return numbers(f"input {name}", 2, layer.in_channels, *[3 + size // 2 for size in layer.kernel_size])
    if isinstance(layer, nn.GroupNorm):
        return numbers(f"input {name}", 2, layer.num_channels, 2, 2)
    if isinstance(layer, nn.Linear):
        return numbers(f"input {name}", 2, 3, layer.in_features)
    return numbers(f"input {name}", 2, 3, layer.size if isinstance(layer, _Rms) else layer.normalized_shape[0])


def build(record: Mapping[str, Mapping[str, Any]]) -> Models:
    """Part -> model, text encoders first.

    Args:
        record: part -> dotted name ("" = the model itself) -> class name of a container, or [kind, arguments, class
            name, or "" for the kind's own].
    """
    models = {}
    for part, entries in record.items():
        root: nn.Module = type(entries[""], (_Root, nn.Module), {})()
        for dotted, entry in entries.items():
            if dotted:
                _place(root, dotted, entry)
        for name, parameter in root.named_parameters():
            value, last = numbers(f"{part} {name}", *parameter.shape), name.rpartition(".")[2]
            norm = parameter.dim() == 1 and last != "bias"
            parameter.data = 1 + value / 4 if norm else value / 4 if last == "bias" else value / 2
        models[part] = root.eval().requires_grad_(False)
    return models


def _place(root: nn.Module, dotted: str, entry: Any) -> None:
    *parents, last = dotted.split(".")
    at = root
    for name in parents:
        if name not in dict(at.named_children()):
            at.add_module(name, nn.Module())
        at = at.get_submodule(name)
    if isinstance(entry, str):
        at.add_module(last, type(entry, (nn.Module,), {})())
        return
    kind, arguments, name = entry
    cls = KINDS[kind]
    at.add_module(last, (type(name, (cls,), {}) if name else cls)(**arguments))


def digest(models: Models) -> str:
    """Of all base weights."""
    whole = hashlib.sha256()
    for part, model in models.items():
        for name, parameter in model.named_parameters():
            whole.update(f"{part} {name}".encode() + parameter.detach().numpy().tobytes())
    return whole.hexdigest()[:16]


def parts_of(models: Models) -> tuple[list[nn.Module], nn.Module]:
    """Text encoders and denoiser."""
    encoders = [model for part, model in models.items() if part.startswith("text_encoder")]
    return encoders, next(model for part, model in models.items() if not part.startswith("text_encoder"))


# -- calls


def _arguments(case: Case, folder: Path, only_names: bool = False) -> dict[str, str]:
    """Network arguments, with the preset written into a folder; `only_names`: those that decide names in a file."""
    if case.preset:
        (folder / "preset.toml").write_text(case.preset, encoding="utf-8")
    return {
        key: value.replace(PRESET, str(folder / "preset.toml"))
        for key, value in case.args.items()
        if not only_names or key == "preset"
    }


def create(case: Case, models: Models, folder: Path, for_file: bool = False) -> Any:
    """The network of the case, applied; `for_file`: of the dim that its file has."""
    entry, (encoders, denoiser) = importlib.import_module(case.entry), parts_of(models)
    dim, arguments = case.dim * (case.product or 1 if for_file else 1), _arguments(case, folder)
    if case.host == "musubi":
        network = entry.create_arch_network(
            1.0, dim, case.alpha, None, None, denoiser, neuron_dropout=None, **arguments
        )
        network.apply_to(None, denoiser, apply_text_encoder=False, apply_unet=True)
    else:
        network = entry.create_network(1.0, dim, case.alpha, None, encoders, denoiser, neuron_dropout=None, **arguments)
        network.apply_to(encoders, denoiser, bool(encoders), True)
    return network


def merge_file(case: Case, models: Models, path: Path, folder: Path) -> None:
    """Merge a file into the models by the functions for that."""
    from safetensors.torch import load_file

    entry, (encoders, denoiser) = importlib.import_module(case.entry), parts_of(models)
    arguments = _arguments(case, folder, only_names=True)
    if case.host == "musubi":
        weights = load_file(path)
        network = entry.create_arch_network_from_weights(1.0, weights, unet=denoiser, for_inference=True, **arguments)
    else:
        network, weights = entry.create_network_from_weights(
            1.0, str(path), None, encoders, denoiser, for_inference=True, **arguments
        )
    network.merge_to(encoders, denoiser, weights, torch.float32, "cpu")


def save(case: Case, network: Any, folder: Path) -> dict[str, Path]:
    """File name -> path of all that one save writes, in a folder of its own."""
    folder.mkdir()
    metadata = {"ss_network_module": case.entry, "ss_network_dim": str(case.dim)}
    metadata["ss_network_args"] = json.dumps({**case.args})
    network.save_weights(str(folder / "adapter.safetensors"), torch.float32, metadata)
    return {path.name: path for path in sorted(folder.glob("*.safetensors"))}


def make_optimizer(case: Case, network: Any) -> torch.optim.AdamW:
    if case.host == "musubi":
        groups, _ = network.prepare_optimizer_params(unet_lr=LR)
    else:
        groups, _ = network.prepare_optimizer_params(LR, LR, LR)
    return torch.optim.AdamW(groups, lr=LR, eps=EPS, weight_decay=case.decay)


# -- training


def step(case: Case, models: Models, network: Any, optimizer: torch.optim.Optimizer) -> float:
    """One step towards fixed outputs; the loss before it."""
    network.train()
    _pin(network, case.block)
    optimizer.zero_grad()
    loss = torch.zeros(())
    for part, model in models.items():
        times = torch.full((2,), case.time)
        for i, y in enumerate(model(timestep=times, timesteps=times, t=times, time=times)):
            loss = loss + (y - numbers(f"target {part} {i}", *y.shape)).square().mean()
    loss.backward()
    optimizer.step()
    network.eval()
    return float(loss.detach())


def _pin(network: nn.Module, block: int) -> None:
    """Take DyLoRA's choice away."""
    for module in network.modules():
        if block >= 0 and hasattr(module, "number"):  # of the step, from which the block follows
            vars(module)["number"] = torch.tensor(block)
        elif block >= 0 and hasattr(module, "block") and hasattr(module, "begin"):  # of 5cb7757
            vars(module)["begin"] = lambda *_, module=module: setattr(module, "block", torch.tensor(block))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The state of an optimizer: `number of the parameter.name` -> tensor, and the groups."""
    state = optimizer.state_dict()
    tensors = {f"{i}.{name}": tensor for i, values in state["state"].items() for name, tensor in values.items()}
    return tensors, state["param_groups"]


def optimizer_state(tensors: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Back from `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    return {"state": state, "param_groups": [dict(group) for group in groups]}


# -- what a network does


def weights(models: Models) -> dict[str, Tensor]:
    """A copy of all base weights, `part dotted.name` -> tensor."""
    return {
        f"{part} {key}": value.clone() for part, model in models.items() for key, value in model.state_dict().items()
    }


def set_weights(models: Models, values: Mapping[str, Tensor], more: Mapping[str, Tensor] | None = None) -> None:
    """The weights of `weights`, with changes added."""
    for part, model in models.items():
        for key, tensor in model.state_dict().items():
            tensor.copy_(values[f"{part} {key}"] + (more or {}).get(f"{part} {key}", 0.0))


def outputs(models: Models) -> dict[str, Tensor]:
    """Of every layer, `part dotted.output` -> tensor, at the end of denoising."""
    with torch.no_grad():
        return {
            f"{part} {name}.output": y
            for part, model in models.items()
            for (name, _), y in zip(layers(model), model(timestep=0, timesteps=0, t=0, time=0), strict=True)
        }


def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is not as before, as the difference in fp32."""
    return {key: (after[key] - before[key]).float() for key in before if not torch.equal(after[key], before[key])}


def updates(case: Case, models: Models, network: Any) -> dict[str, Tensor]:
    """W' - W of every layer at multiplier 1, and the change of its bias; the models are as before. It is measured on
    fp64 weights, so that W' is not rounded, or in outputs where a layer has no weight."""
    encoders, denoiser = parts_of(models)
    for model in models.values():
        model.double()
    if case.unmerged:
        with_adapter = outputs(models)
        network.set_multiplier(0.0)
        found = changes(outputs(models), with_adapter)
        network.set_multiplier(1.0)
    else:
        before = weights(models)
        network.backup_weights()
        network.merge_to(encoders, denoiser)
        found = changes(before, weights(models))
        network.restore_weights()
    for model in models.values():
        model.float()
    return found


# -- whole runs


def draw_images(folder: Path) -> None:
    """Three pictures with captions, the same bytes of pixels everywhere."""
    from PIL import Image

    folder.mkdir()
    for name in ("circle", "square", "star"):
        pixels = (
            (numbers(f"picture {name}", 6, 6, 3) * 127 + 128).byte().repeat_interleave(8, 0).repeat_interleave(8, 1)
        )
        Image.frombytes("RGB", (48, 48), pixels.contiguous().numpy().tobytes()).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name}\n", encoding="utf-8")


def run_arguments(checkout: Path, folder: Path) -> list[str]:
    """Of scripts/train_network.py: the embedded model, pictures in folder/images, results in folder/out."""
    return [
        f"--pretrained_model_name_or_path={checkout / 'scripts' / 'emoji' / 'model'}",
        f"--train_data_dir={folder / 'images'}",
        f"--output_dir={folder / 'out'}",
    ]
