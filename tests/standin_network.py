"""A network module of the smallest kind: LoRA on attention projections, and a record of every call it gets.

The trainer and the generator are tested against it as well as against the real modules: it shows what they call, in
which order and with which arguments, and can fail on demand (`fail=interrupt`, `fail=full_disk`, `fail=memory`,
`fail=memory_later`).
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
"""Name, positional and keyword arguments of every call since the test cleared it."""


def note(name: str, *args: Any, **kwargs: Any) -> None:
    CALLS.append((name, args, kwargs))


class Layer(nn.Module):
    def __init__(self, base: nn.Linear, dim: int, scale: float) -> None:
        super().__init__()
        self.lora_down = nn.Linear(base.in_features, dim, bias=False)
        self.lora_up = nn.Linear(dim, base.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)
        self.scale, self.multiplier, self.base = scale, 1.0, [base]

    def attach(self) -> None:
        self.original = self.base[0].forward
        self.base[0].forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        update = self.lora_up(self.lora_down(x.to(self.lora_down.weight.dtype)))
        return self.original(x) + self.multiplier * self.scale * update.to(x.dtype)


class Network(nn.Module):
    def __init__(
        self, text_encoder: Any, unet: nn.Module, multiplier: float, dim: int, alpha: float, fail: str
    ) -> None:
        super().__init__()
        encoders = text_encoder if isinstance(text_encoder, list) else [text_encoder]
        self.layers, self.fail = nn.ModuleDict(), fail
        for prefix, model in [("unet", unet), *((f"te{number}", te) for number, te in enumerate(encoders))]:
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and name.endswith(("to_q", "to_v", "q_proj", "v_proj")):
                    self.layers[f"{prefix}_{name}".replace(".", "_")] = Layer(module, dim, alpha / dim)
        self.set_multiplier(multiplier)

    def set_multiplier(self, multiplier: float) -> None:
        for layer in self.layers.values():
            layer.multiplier = multiplier

    def prepare_network(self, args: Any) -> None:
        note("prepare_network", args)

    def apply_to(self, text_encoder: Any, unet: Any, train_text: bool = True, train_unet: bool = True) -> None:
        note("apply_to", text_encoder, unet, train_text, train_unet)
        for name in list(self.layers):
            if not (train_unet if name.startswith("unet_") else train_text):
                del self.layers[name]
        for layer in self.layers.values():
            layer.attach()

    def load_weights(self, path: str) -> str:
        note("load_weights", path)
        return str(self.load_state_dict(load_file(path), strict=False))

    def enable_gradient_checkpointing(self) -> None:
        note("enable_gradient_checkpointing")

    def prepare_optimizer_params_with_multiple_te_lrs(self, text_lrs: Any, unet_lr: Any, lr: float) -> Any:
        note("prepare_optimizer_params_with_multiple_te_lrs", text_lrs, unet_lr, lr)
        return [{"params": self.parameters(), "lr": unet_lr or lr}], ["all"]

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        note("prepare_grad_etc", text_encoder, unet)
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        note("on_epoch_start", text_encoder, unet)
        self.train()

    def on_step_start(self, text_encoder: Any, unet: Any) -> None:
        note("on_step_start", text_encoder, unet)
        if self.fail == "interrupt" and sum(name == "on_step_start" for name, *_ in CALLS) == 2:
            raise KeyboardInterrupt
        steps = sum(name == "on_step_start" for name, *_ in CALLS)
        if self.fail == "memory" or (self.fail == "memory_later" and steps == 3):
            raise torch.OutOfMemoryError("CUDA out of memory")

    def get_trainable_params(self) -> Any:
        note("get_trainable_params")
        return self.parameters()

    def apply_max_norm_regularization(self, maximum: float, device: Any) -> tuple[int, float, float]:
        note("apply_max_norm_regularization", maximum, device)
        return 0, 0.0, 0.0

    def save_weights(self, path: str, dtype: Any, metadata: dict[str, str]) -> None:
        note("save_weights", path, dtype, metadata)
        if self.fail == "full_disk":
            raise OSError(28, "No space left on device", path)
        state = {name: value.detach().to(dtype or value.dtype) for name, value in self.state_dict().items()}
        save_file(state, path, metadata)

    def merge_to(self, text_encoder: Any, unet: Any, weights: Any, dtype: Any = None, device: Any = None) -> None:
        note("merge_to", text_encoder, unet, dtype, device)
        self.load_state_dict(weights, strict=False)
        for layer in self.layers.values():
            update = layer.lora_up.weight @ layer.lora_down.weight * layer.scale * layer.multiplier
            layer.base[0].weight.data += update.detach()

    def backup_weights(self) -> None:
        note("backup_weights")
        self.backup = [layer.base[0].weight.detach().clone() for layer in self.layers.values()]

    def restore_weights(self) -> None:
        note("restore_weights")
        for layer, weight in zip(self.layers.values(), self.backup, strict=True):
            layer.base[0].weight.data.copy_(weight)
            layer.base[0].forward = layer.forward

    def pre_calculation(self) -> None:
        note("pre_calculation")
        for layer in self.layers.values():
            update = layer.lora_up.weight @ layer.lora_down.weight * layer.scale * layer.multiplier
            layer.base[0].weight.data += update.detach()
            layer.base[0].forward = layer.original


def create_network(
    multiplier: float,
    dim: Any,
    alpha: Any,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    neuron_dropout: Any = None,
    **kwargs: Any,
) -> Network:
    note("create_network", multiplier, dim, alpha, vae, text_encoder, unet, neuron_dropout=neuron_dropout, **kwargs)
    return Network(text_encoder, unet, multiplier, dim or 4, alpha or 1, kwargs.get("fail", ""))


def create_network_from_weights(
    multiplier: float, file: str, vae: Any, text_encoder: Any, unet: Any, for_inference: bool = False, **kwargs: Any
) -> tuple[Network, dict[str, Tensor]]:
    note(
        "create_network_from_weights", multiplier, file, vae, text_encoder, unet, for_inference=for_inference, **kwargs
    )
    weights = load_file(file)
    dim = next(len(value) for name, value in weights.items() if "lora_down" in name)
    network = Network(text_encoder, unet, multiplier, dim, dim, "")
    for name in list(network.layers):
        if f"layers.{name}.lora_down.weight" not in weights:
            del network.layers[name]
    return network, weights


__all__ = ["CALLS", "Network", "create_network", "create_network_from_weights", "torch"]
