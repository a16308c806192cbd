"""Dividing the frozen model over processes: FSDP and DeepSpeed's ZeRO 3, as `accelerate launch` was told.

Only the frozen model is divided; it is what needs the memory. The adapter stays whole in each process, its gradients
are averaged as under plain data parallelism, and so its file, its norms and its state are those of any other run.
The weights of a divided model are there while the part that they belong to computes, and at no other time: base
networks are merged and DoRA's first lengths are taken before.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from networks.cli.command_line import import_network_module, nearest

from .families import Family


class Sharding:
    """A way of dividing a model.

    Attributes:
        title: for people.
        mixed: whether one part of the model may have weights of several dtypes.
    """

    title: str
    mixed = False

    def check(self, args: argparse.Namespace) -> None:
        """Raise ValueError when the trainer's options ask for weights that cannot be divided."""
        if args.quantize:
            raise ValueError(
                f"--quantize {args.quantize} packs weights into a form that {self.title} cannot divide. Remove it, or "
                "configure plain multi-GPU."
            )
        if args.fp8_base and not self.mixed:
            raise ValueError(
                f"--fp8_base: {self.title} cannot divide blocks of several number formats. Remove it, or configure "
                "FSDP2 (fsdp_version: 2)."
            )

    def divide(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Leave each process its share of the model, on `device`. Returns what is to be called in its place.

        Raises ValueError when the configuration does not fit the model.
        """
        raise NotImplementedError


def take_sharding() -> Sharding | None:
    """What accelerate's environment asks for, taken out of it: accelerate itself shall treat the adapter as any other
    small model. None when nothing is to be divided.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        from accelerate import FullyShardedDataParallelPlugin

        # every process reads the model's files itself: nothing is to be sent round at the start
        options: dict[str, Any] = {"cpu_ram_efficient_loading": False}
        if os.environ.get("FSDP_VERSION", "1") == "1":
            options["sync_module_states"] = False
        plugin = FullyShardedDataParallelPlugin(**options)
        del os.environ["ACCELERATE_USE_FSDP"]
        return Fsdp(plugin)
    if deepspeed_configured():
        from accelerate import DeepSpeedPlugin

        deepspeed = DeepSpeedPlugin()
        if deepspeed.zero_stage == 3:
            del os.environ["ACCELERATE_USE_DEEPSPEED"]
            return Zero3(deepspeed)
    return None


def check_division(sharding: Sharding | None, args: argparse.Namespace, network_args: Mapping[str, str]) -> None:
    """Refuse what cannot be done with a divided model or optimizer, before anything is loaded.

    Raises:
        ValueError: it names the option.
    """
    if sharding is not None:
        sharding.check(args)
    title = sharding.title if sharding else "DeepSpeed" if deepspeed_configured() else ""
    perturbed = [name for name in ("ggpo_sigma", "ggpo_beta") if name in network_args]
    if title and perturbed:
        raise ValueError(
            f"--network_args {perturbed[0]}: under {title} the base weights, or the gradients, that GGPO measures are "
            "divided. Remove it, or configure plain multi-GPU."
        )
    module = import_network_module(args.network_module)
    if sharding is not None and args.scale_weight_norms and hasattr(module, "plan"):
        from networks.models.skeleton import skeleton

        model = skeleton(args.pretrained_model_name_or_path)
        plan = module.plan(args.network_dim, args.network_alpha, model.text_encoders, model.unet, **network_args)
        check_plan(sharding, args, plan)


def check_plan(sharding: Sharding | None, args: argparse.Namespace, plan: Any) -> None:
    """Raise ValueError when norms are to be limited that only base weights tell."""
    rows = [row for row in plan.trained if row.relative] if sharding and args.scale_weight_norms and plan else []
    if sharding is not None and rows:
        raise ValueError(
            f"--scale_weight_norms: the norm of {rows[0].algo} ({rows[0].shown_name}) is that of a change of the base "
            f"weight, which {sharding.title} divides. Remove it, or configure plain multi-GPU."
        )


def deepspeed_configured() -> bool:
    """Whether accelerate was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def divide(sharding: Sharding, family: Family, device: torch.device, batch_size: int) -> str:
    """Divide the denoiser of a loaded model, which is still in memory as a whole. Returns what was done, for people.

    Args:
        sharding: how.
        family: the model, with its network attached; its denoiser is replaced.
        device: of this process.
        batch_size: examples of a process at a time.

    Raises:
        ValueError: processes would call the denoiser unequally often, and each wait for the others for ever.
    """
    if batch_size > 1 and not family.one_call:
        raise ValueError(
            f"--train_batch_size {batch_size}: {family.title} takes captions of unequal length one by one, and "
            f"processes that share it by {sharding.title} must keep step. Give 1, and --gradient_accumulation_steps."
        )
    family.place = device
    if not torch.distributed.is_initialized():
        family.denoiser.to(device)
        return f"{sharding.title}: one process has the whole model"
    before = _bytes(family.denoiser)
    setattr(family.pipeline, family.denoiser_name, sharding.divide(family.denoiser, device))
    share = f"{_bytes(family.denoiser) / 1e6:.1f} of {before / 1e6:.1f} MB"
    return f"{sharding.title}: the first process keeps {share} of the model, the adapter is whole in each"


def _bytes(model: nn.Module) -> int:
    local = [getattr(p, "ds_tensor", getattr(p, "_local_tensor", p)) for p in model.parameters()]
    return sum(p.untyped_storage().nbytes() for p in {p.untyped_storage().data_ptr(): p for p in local}.values())


class Fsdp(Sharding):
    """torch's FSDP, first or second version.

    Args:
        plugin: accelerate's.
    """

    def __init__(self, plugin: Any) -> None:
        self.plugin, self.title = plugin, f"FSDP{plugin.fsdp_version}"
        self.mixed = plugin.fsdp_version == 2

    def divide(self, model: nn.Module, device: torch.device) -> nn.Module:
        names = self.plugin.transformer_cls_names_to_wrap
        units = list(units_of_class(model, names) if names else blocks(model))
        for unit in units:
            unit.register_forward_pre_hook(_contiguous, with_kwargs=True)
        return (
            self._second(model, units, device) if self.plugin.fsdp_version == 2 else self._first(model, units, device)
        )

    def _second(self, model: nn.Module, units: list[nn.Module], device: torch.device) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (torch.distributed.get_world_size(),)),
            "reshard_after_forward": self.plugin.reshard_after_forward,
        }
        if self.plugin.cpu_offload:
            options["offload_policy"] = self.plugin.cpu_offload
        for unit in (*units, model):
            fully_shard(unit, **options)
        return model

    def _first(self, model: nn.Module, units: list[nn.Module], device: torch.device) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

        chosen = {id(unit) for unit in units}
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda part: id(part) in chosen),
            sharding_strategy=self.plugin.sharding_strategy or self.plugin.reshard_after_forward,
            cpu_offload=self.plugin.cpu_offload,
            backward_prefetch=self.plugin.backward_prefetch,
            limit_all_gathers=self.plugin.limit_all_gathers,
            device_id=torch.device("cpu") if device.type == "cpu" else device,  # it knows no number of a CPU
            use_orig_params=True,  # layers find their weights under the names that they know
        )


class Zero3(Sharding):
    """DeepSpeed's third stage, for parameters that are not trained.

    Args:
        plugin: accelerate's; what its configuration says of the optimizer has no object here.
    """

    title = "ZeRO 3"
    mixed = True

    def __init__(self, plugin: Any) -> None:
        self.plugin = plugin

    def check(self, args: argparse.Namespace) -> None:
        super().check(args)
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError("DeepSpeed is configured, but not installed. Install it: pip install deepspeed")

    def divide(self, model: nn.Module, device: torch.device) -> nn.Module:
        import deepspeed

        dtype = next(model.parameters()).dtype
        zero = self.plugin.deepspeed_config["zero_optimization"]
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # it asks; this is the loader's business
            "zero_optimization": {k: v for k, v in zero.items() if k != "offload_optimizer" and v != "auto"},
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
        }
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        deepspeed.zero.Init(module=model, config_dict_or_path=config)  # parameter by parameter onto the device
        self.engine = deepspeed.initialize(model=model, config=config)[0]
        return model


def _contiguous(unit: nn.Module, args: Any, kwargs: Any) -> Any:
    """FSDP's first pass through a block changes strides of axes of length 1, its recomputation in the backward does
    not; torch multiplies such matrices in another way, and checkpointing finds other tensors than it kept."""
    return tuple(map(_plain, args)), {key: _plain(value) for key, value in kwargs.items()}


def _plain(value: Any) -> Any:
    return value.contiguous() if isinstance(value, torch.Tensor) else value


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost numbered parts: what a model computes one after the other."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)


def units_of_class(model: nn.Module, names: list[str]) -> Iterator[nn.Module]:
    """Parts of the classes that accelerate's fsdp_transformer_layer_cls_to_wrap names, inner ones first."""
    known = {type(part).__name__ for part in model.modules()}
    for name in names:
        if name not in known:
            raise ValueError(
                f"fsdp_transformer_layer_cls_to_wrap: {type(model).__name__} has no {name}.{nearest(name, known)} "
                "Leave the line out to divide by the model's own blocks."
            )
    parts = [part for part in model.modules() if type(part).__name__ in names]
    yield from reversed(parts)
