"""What a training run is made of: the data, the network and its optimizer, called as sd-scripts calls them."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from networks.cli.command_line import import_network_module, nearest, parse_network_args, write_atomically

from .families import Family
from .losses import DECIDES_LOSS, Loss
from .prior import Case
from .sharding import deepspeed_configured
from .train_options import keeps_prior
from .training_data import TrainingData


def make_accelerator(args: argparse.Namespace) -> Any:
    """accelerate as the options and `accelerate launch` configure it."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    deepspeed = deepspeed_configured()
    _check_accelerator(args, deepspeed)
    precision, handlers = args.mixed_precision, []
    bare = not (torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available())
    if deepspeed:
        precision = "bf16" if args.full_bf16 else "no"  # it would round what is trained; Objective has its own autocast
        handlers += [InitProcessGroupKwargs(backend="gloo")] if bare else []
    else:
        # SDXL does not use the last layers of its first text encoder, so their adapters get no gradient
        handlers.append(DistributedDataParallelKwargs(find_unused_parameters=True))
    accelerator = Accelerator(
        cpu=bare and not deepspeed,  # several processes without a GPU find each other only if it is said
        mixed_precision=precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        kwargs_handlers=handlers,
        log_with="tensorboard" if args.logging_dir else None,
        project_dir=args.logging_dir,
    )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:  # it asks for the loader's batch size, and ours is no loader that accelerate prepares
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        plugin.deepspeed_config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
        plugin.deepspeed_config["gradient_clipping"] = args.max_grad_norm
    if args.logging_dir:
        accelerator.init_trackers(log_name(Path(args.logging_dir), args.output_name, bool(args.resume)))
    return accelerator


def _check_accelerator(args: argparse.Namespace, deepspeed: bool) -> None:
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--mixed_precision fp16 needs a GPU. Use bf16 or no.")
    if args.mixed_precision == "fp16" and deepspeed:
        raise ValueError("--mixed_precision fp16: under DeepSpeed the adapter has no loss scale. Use bf16.")
    if args.logging_dir:
        from accelerate.utils import is_tensorboard_available

        if not is_tensorboard_available():
            raise ValueError("--logging_dir needs TensorBoard's writer. Install it: pip install tensorboardX")


def log_name(folder: Path, name: str, goes_on: bool) -> str:
    """Where a run's curves go: a folder of its own, `name`, `name-2`, ..., or the last one if it goes on."""
    number = 1
    while (folder / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    number -= goes_on and number > 1
    return name if number == 1 else f"{name}-{number}"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision as the run has it, whatever wraps the model."""
    return torch.autocast(device.type, dtype, enabled=dtype in (torch.float16, torch.bfloat16))


class Objective(nn.Module):
    """The loss as a module with the network as its child: data-parallel wrappers see the pass through its parameters.

    The model is no child: it is frozen, and neither wrapped nor saved.
    """

    def __init__(self, network: Any, family: Family, loss: Loss, prior_weight: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.family, self.loss, self.prior_weight = family, loss, prior_weight

    def forward(
        self,
        data: TrainingData,
        batch: dict[str, Any],
        latents: Tensor,
        noise: Tensor,
        u: Tensor,
        added: Tensor | None = None,
        kept: Case | None = None,
    ) -> Tensor:
        """Loss of the denoiser's answer for each sample, fp32 (B,); without `added`, the plain mean squared error, by
        which runs of any options can be compared.

        Args:
            latents, noise: (B, C, ...), fp32.
            u: (B,), where each sample's noise level lies in their distribution, 0 to 1.
            added: the noise in the denoiser's input.
            kept: beside each sample one on which the model shall answer as without the network.
        """
        times, noisy = self._noisy(latents, noise if added is None else added, u)
        answer = self._answer(data, batch, noisy, times)
        target = self.loss.noise.target(latents, noise, times)
        if added is None:
            return (answer.float() - target.float()).pow(2).flatten(1).mean(1)
        losses = self.loss(answer, target, times)
        return losses if kept is None else losses + self.prior_weight * self.moved(*kept)

    def moved(
        self, data: TrainingData, batch: dict[str, Any], latents: Tensor, noise: Tensor, u: Tensor, added: Tensor
    ) -> Tensor:
        """How far the network moves the model's answer for each sample, as the loss counts it, fp32 (B,).

        Args:
            latents, noise, u, added: as in a pass.
        """
        times, noisy = self._noisy(latents, added, u)
        with self._without_network():
            target = self._answer(data, batch, noisy, times)
        return self.loss(self._answer(data, batch, noisy, times), target, times)

    def _noisy(self, latents: Tensor, added: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Times of the levels, and the latents with so much noise."""
        times = self.loss.noise.times(u, latents.shape[2:]).to(latents.device)
        return times, self.loss.noise.add(latents, added, times)

    def _answer(self, data: TrainingData, batch: dict[str, Any], noisy: Tensor, times: Tensor) -> Tensor:
        with autocast(noisy.device, self.family.dtype):
            return self.family.predict(noisy, times, data.texts(batch), batch)

    @contextlib.contextmanager
    def _without_network(self) -> Iterator[None]:
        """The base model, text encoders included; training adapters stay, which the answer beside it has, too."""
        self.network.set_enabled(False)
        try:
            with torch.no_grad():
                yield
        finally:
            self.network.set_enabled(True)


def trains_text(args: argparse.Namespace, family: Family) -> bool:
    """Whether text encoders are trained."""
    return family.trains_text and not args.network_train_unet_only


def build_network(args: argparse.Namespace, family: Family, network_args: dict[str, str], dtype: torch.dtype) -> Any:
    """Import the module, merge base networks, create the network and attach it: sd-scripts' calls in its order.

    Args:
        args: the trainer's options; with --dim_from_weights, its dim and alpha become None.
        family: the loaded model.
        network_args: of --network_args.
        dtype: what base networks are merged in.

    Raises:
        ValueError: the module makes no network, or cannot do what the options ask for.
    """
    module = import_network_module(args.network_module)
    _merge_base_networks(args, module, family, dtype)
    network = _create_network(args, module, family, network_args)
    if hasattr(network, "prepare_network"):
        network.prepare_network(args)
    if args.scale_weight_norms and not hasattr(network, "apply_max_norm_regularization"):
        raise ValueError(f"{args.network_module} cannot do --scale_weight_norms. Remove the option.")
    if keeps_prior(args) and not hasattr(network, "set_enabled"):
        raise ValueError(
            f"{args.network_module} makes networks that cannot be switched off (set_enabled), as --prior_data_dir and "
            "--prior_prompt want. Remove them."
        )
    if args.network_train_text_encoder_only and not family.trains_text:
        raise ValueError(
            f"--network_train_text_encoder_only: the text encoder of {family.title} is not trained. Remove it."
        )
    text = trains_text(args, family)
    network.apply_to(family.text_encoder_argument, family.denoiser, text, not args.network_train_text_encoder_only)
    if args.network_weights:
        print(network.load_weights(args.network_weights))
    if args.gradient_checkpointing:
        _enable_checkpointing(network, family, text)
    return network


def _merge_base_networks(args: argparse.Namespace, module: ModuleType, family: Family, dtype: torch.dtype) -> None:
    text_encoder, unet = family.text_encoder_argument, family.denoiser
    multipliers = itertools.chain(args.base_weights_multiplier or (), itertools.repeat(1.0))
    for path, multiplier in zip(args.base_weights or (), multipliers, strict=False):
        base, weights = module.create_network_from_weights(
            multiplier, path, family.vae, text_encoder, unet, for_inference=True
        )
        base.merge_to(text_encoder, unet, weights, dtype, unet.device)
        print(f"merged {path} at strength {multiplier}")


def _create_network(args: argparse.Namespace, module: ModuleType, family: Family, network_args: dict[str, str]) -> Any:
    models = family.vae, family.text_encoder_argument, family.denoiser
    keywords: dict[str, Any] = dict(network_args)
    if args.network_dropout is not None:
        keywords.setdefault("dropout", args.network_dropout)
    if args.dim_from_weights:
        if args.network_dim is not None:
            print("--network_dim is not used: --dim_from_weights takes ranks and alphas from the file")
        args.network_dim = args.network_alpha = None  # and the metadata must not say otherwise
        network, _ = module.create_network_from_weights(1, args.network_weights, *models, **keywords)
    else:
        size = args.network_dim, args.network_alpha
        network = module.create_network(1.0, *size, *models, neuron_dropout=args.network_dropout, **keywords)
    if network is None:
        raise ValueError(f"--network_module {args.network_module} made no network. Look at what it printed.")
    return network


def _enable_checkpointing(network: Any, family: Family, text: bool) -> None:
    """Keep few intermediate results; of text encoders, too, where they are trained."""
    encoders = [encoder for encoder in family.text_encoders if encoder is not None] if text else []
    family.denoiser.enable_gradient_checkpointing()
    for encoder in encoders:
        encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (family.denoiser, *encoders):
        model.train()  # the libraries checkpoint in train mode only
        for part in model.modules():
            if isinstance(part, nn.Dropout) or isinstance(vars(part).get("dropout"), float):
                part.training = False  # T5 has some of both kinds, and a frozen model keeps its own answer
    network.enable_gradient_checkpointing()


def write_plan(network: Any, path: Path) -> bool:
    """Write path.txt and path.json, what is trained layer by layer; False when the network has no plan."""
    plan = getattr(network, "plan", None)
    if plan is None:
        return False
    for suffix, body in ((".txt", plan.to_text()), (".json", json.dumps(plan.to_json(), indent=1))):
        write_atomically(
            path.with_name(path.name + suffix), partial(Path.write_text, data=body + "\n", encoding="utf-8")
        )
    return True


def build_optimizer(args: argparse.Namespace, network: Any) -> torch.optim.Optimizer:
    """Ask the network for its parameter groups and make the optimizer that --optimizer_type names."""
    rates = args.text_encoder_lr
    if hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs"):
        groups = network.prepare_optimizer_params_with_multiple_te_lrs(rates, args.unet_lr, args.learning_rate)
    else:
        groups = network.prepare_optimizer_params(rates[0] if rates else None, args.unet_lr, args.learning_rate)
    names = None
    if type(groups) is tuple:
        groups, names = groups
    groups = [{**group, "params": list(group["params"])} for group in groups]
    for number, group in enumerate(groups):
        count = sum(parameter.numel() for parameter in group["params"])
        print(f"  {names[number] if names else number}: {count:,} parameters, lr {group.get('lr', args.learning_rate)}")
    options = parse_optimizer_args(args.optimizer_args)
    try:
        return optimizer_class(args.optimizer_type)(groups, lr=args.learning_rate, **options)
    except TypeError as error:
        raise ValueError(f"--optimizer_type {args.optimizer_type}: {error}. Check --optimizer_args.") from error


def optimizer_class(name: str) -> Any:
    """`AdamW`, `AdamW8bit`, `SGD` in any case, or a dotted class path. Raises ValueError for anything else."""
    known = {"adamw": "torch.optim.AdamW", "adamw8bit": "bitsandbytes.optim.AdamW8bit", "sgd": "torch.optim.SGD"}
    path = known.get(name.lower(), name)
    module, _, attribute = path.rpartition(".")
    if not module:
        raise ValueError(f"--optimizer_type {name}: unknown. Use AdamW, AdamW8bit, SGD or package.module.Class.")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--optimizer_type {name}: {error}. Install the package that has it, or use AdamW.") from error


def parse_optimizer_args(items: list[str] | None) -> dict[str, object]:
    """`key=value` items with Python values: `betas=0.9,0.99`, `weight_decay=0.01`, `fused=True`."""
    result: dict[str, object] = {}
    for key, text in parse_network_args(items, "--optimizer_args").items():
        try:
            result[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            hint = nearest(text, ("True", "False", "None"))
            raise ValueError(f'--optimizer_args {key}="{text}" is not a Python value.{hint}') from error
    return result


COPIED = (
    "network_module network_dim network_alpha network_dropout learning_rate unet_lr text_encoder_lr seed lr_scheduler "
    "lr_warmup_steps max_train_steps mixed_precision gradient_checkpointing gradient_accumulation_steps max_grad_norm "
    "scale_weight_norms training_comment output_name cache_latents"
).split()


def run_metadata(
    args: argparse.Namespace, family: Family, network_args: dict[str, str], more: dict[str, Any]
) -> dict[str, str]:
    """sd-scripts' metadata keys that apply here. No clock and no machine, so that equal runs give equal files.

    Args:
        args: the trainer's options.
        family: the model.
        network_args: of --network_args.
        more: further values by their keys.
    """
    values: dict[str, Any] = {f"ss_{name}": getattr(args, name) for name in COPIED}
    of_loss = {name.replace("estimation_loss", "estimation"): getattr(args, name) for name in DECIDES_LOSS}
    values.update({f"ss_{name}": value for name, value in of_loss.items() if value is not None})
    values.update(
        more,
        ss_base_model_version=family.base_model_version,
        ss_v2=family.is_v2,
        ss_optimizer=f"{args.optimizer_type}({','.join(args.optimizer_args or ())})",
        ss_batch_size_per_device=args.train_batch_size,
        ss_sd_model_name=Path(args.pretrained_model_name_or_path).name,
    )
    if network_args:
        values["ss_network_args"] = json.dumps(network_args)
    return {key: str(value) for key, value in values.items()}
