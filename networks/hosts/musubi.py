"""kohya-ss/musubi-tuner and its forks (Sarania's and DustyL's blissful-tuner). They never train text encoders."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..network.optim import Groups
from .caller import Caller, given_once
from .contract import HostNetwork, learning_rate

log = logging.getLogger("networks")

HOST = "musubi"
# What a branch of the trainer and DustyL's fork add to --network_args by themselves -> why it is not looked at.
OF_THE_TRAINER = {
    "architecture": "the model's class decides",
    "metadata_factor": "the shapes in the file decide",
}


class MusubiNetwork(HostNetwork):
    """A network with the methods that these trainers call."""

    def prepare_optimizer_params(self, unet_lr: float | None = 1e-4, **kwargs: Any) -> Groups:
        """(groups, descriptions). A fork also sends `text_encoder_lr=0`, which has no meaning without encoders, and one
        for LTX-2 its own options for groups of layers, which ask for nothing as None, False or an empty list.

        Raises:
            ValueError: the learning rate is 0 or missing; one of those options asks for something.
        """
        kwargs.pop("text_encoder_lr", None)
        asked = [name for name, value in kwargs.items() if not (value is None or value is False or value == [])]
        if asked:
            raise ValueError(
                f"--{' --'.join(asked)}: this network has no such groups of layers, so leave that out; learning rates "
                "of some layers are a network argument: network_reg_lrs={'.*audio_.*': 1e-5}, with your own values"
            )
        rate = None if unet_lr is None else learning_rate("learning_rate", unet_lr)
        return self.groups({self.arch.denoiser.name: rate})


class MusubiCalls(Caller):
    """The functions which these hosts call in an entry."""

    @given_once
    def create_arch_network(
        self,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: Any,
        text_encoders: Sequence[nn.Module] | None,
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **kwargs: Any,
    ) -> MusubiNetwork:
        """A new network for training.

        Args:
            multiplier: strength of the update, any finite number; 1 in training.
            network_dim: --network_dim, the rank of layers for which no argument says another; None = 4.
            network_alpha: --network_alpha, the numerator of their scale alpha / dim; 0 = the dim, None = 1.
            vae, text_encoders: not looked at; these hosts train the denoiser alone.
            unet: the denoiser, on any device, in any precision; its class decides the architecture.
            neuron_dropout: --network_dropout, on the rank activation, in [0, 1); None and 0 = off.
            kwargs: --network_args as text, and what the host adds of its own.

        Raises:
            ValueError: all mistakes of the call in one message: unknown and contradictory arguments with the nearest
                valid ones, a model that this module is not for, a selection in which no layer is left.
        """
        raw = {"neuron_dropout": neuron_dropout or None, **without_the_trainers(kwargs)}
        return self.new(MusubiNetwork, HOST, multiplier, network_dim, network_alpha, None, unet, raw)

    def prepare_network(self, network: MusubiNetwork, options: Any) -> None:
        """That an entry has this name makes the trainer call it on the network."""
        network.prepare_network(options)

    @given_once
    def create_arch_network_from_weights(
        self,
        multiplier: float,
        weights_sd: Mapping[str, Tensor],
        text_encoders: Sequence[nn.Module] | None = None,
        unet: nn.Module | None = None,
        for_inference: bool = False,
        **kwargs: Any,
    ) -> MusubiNetwork:
        """A network with the dims, forms, alphas and values of a file's tensors.

        Args:
            multiplier: strength of the update, any finite number.
            weights_sd: key -> tensor of the file; what its metadata said is lost.
            text_encoders: not looked at.
            unet: the denoiser.
            for_inference: dropouts and noise never act.
            kwargs: network arguments for training.

        Raises:
            ValueError: all mistakes of the call in one message.
        """
        if unet is None:
            raise ValueError(
                f"{self.name}: no model was given (unet=None), so there is nothing to adapt: hand over one"
            )
        raw = without_the_trainers(kwargs)
        return self.from_weights(MusubiNetwork, HOST, multiplier, weights_sd, None, unet, for_inference, raw)


def without_the_trainers(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are the user's own."""
    for name in OF_THE_TRAINER.keys() & kwargs.keys():
        log.info("%s=%s is not looked at: %s", name, kwargs[name], OF_THE_TRAINER[name])
    return {key: value for key, value in kwargs.items() if key not in OF_THE_TRAINER}
