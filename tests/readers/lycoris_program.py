"""LyCORIS' own loader on stand-ins for the trainers' models, which have their names and classes."""

from __future__ import annotations

import functools
from typing import Any

import lycoris.kohya
import lycoris.wrapper
import torch
from common import Made, Trained, made
from registry_archs import SPECS, data_of
from tiny_parts import sd_unet
from torch import Tensor, nn
from toy_models import toy


@functools.cache
def models(arch: str) -> dict[str, nn.Module]:
    """Part name -> model; of SD a real one, whose time embedding has a class which LyCORIS looks for."""
    if arch == "sd":
        return {SPECS[arch].denoiser.name: sd_unet().requires_grad_(False)}
    return {name: model.eval().requires_grad_(False) for name, model in toy(arch, shrink=data_of(arch).shrink).items()}


def load(arch: str, parts: dict[str, nn.Module], trained: Trained) -> Made:
    """What LyCORIS makes of a file: its kohya side, or its wrapper where the names are of its files."""
    spec, network = SPECS[arch], None
    encoders = [parts[part.name] for part in spec.text_encoders if part.name in parts]
    lycoris.kohya.logger.setLevel("ERROR")
    try:
        network = _applied(str(trained.file), encoders, parts[spec.denoiser.name], spec.denoiser.prefix == "lycoris")
        return made(trained, functools.partial(_weight_at, network))
    except Exception as error:
        return Made(f"{type(error).__name__}: {error}")
    finally:
        if network is not None:
            network.restore()


def _applied(file: str, encoders: list[nn.Module], denoiser: nn.Module, wrapper: bool) -> Any:
    if wrapper:
        network, _ = lycoris.wrapper.create_lycoris_from_weights(1.0, file, denoiser)
        network.apply_to()
        return network
    given: Any = encoders[0] if len(encoders) == 1 else encoders
    network, _ = lycoris.kohya.create_network_from_weights(1.0, file, None, given, denoiser)
    network.apply_to(given, denoiser, bool(encoders), True)
    return network


@torch.no_grad()
def _weight_at(network: Any, target: nn.Module, strength: float) -> Tensor:
    """W' of a layer: what goes in as a unit comes out as a column."""
    network.set_multiplier(strength)
    if isinstance(target, nn.Linear):
        units = torch.eye(target.in_features)
        return (target(units) - target(torch.zeros_like(units))).T
    if not isinstance(target, nn.Conv2d):
        return target.weight.detach()
    size = target.weight[0].numel()
    units = torch.eye(size).reshape(size, *target.weight.shape[1:])
    out = target(units) - target(torch.zeros_like(units))
    middle = [side // 2 for side in target.kernel_size]
    return out[:, :, middle[0], middle[1]].T.reshape(target.weight.shape)
