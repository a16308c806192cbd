"""kohya-ss/sd-scripts and every host with its calling convention (ours included)."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..archs import ARCHS
from ..archs.detect import unwrap
from ..archs.spec import ArchSpec
from ..files.adapter_file import FileTensors
from ..network.changes import Steps
from ..network.optim import Groups, text_encoder_rates
from .caller import Caller, given_once
from .contract import HostNetwork, TextEncoders, learning_rate

log = logging.getLogger("networks")

HOST = "sd_scripts"


class LoRANetwork(HostNetwork):
    """A network with the methods that sd-scripts calls. The name is the one which its files import."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # FLUX.1's and SD3's trainers read it to decide which encoders stay in memory.
        self.train_t5xxl = any(row.part == "text_encoder3" for row in self.plan.trained)

    @classmethod
    def with_noise(cls) -> type[LoRANetwork]:
        return perturbed(cls)  # type: ignore[arg-type]

    def prepare_optimizer_params_with_multiple_te_lrs(
        self,
        text_encoder_lr: float | Sequence[float] | None,
        unet_lr: float | None,
        default_lr: float | None = None,
    ) -> Groups:
        """(groups, descriptions); None takes the default, 0 leaves a part out.

        Raises:
            ValueError: a rate is no number, or nothing is left to train. Never a TypeError: the host would take it for
                an older signature, call again without the default rate, and hide the message.
        """
        return self.groups(part_rates(self.arch, text_encoder_lr, unet_lr, default_lr))

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> Groups:
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    def train(self, mode: bool = True) -> LoRANetwork:
        """This trainer puts a network into eval mode for its validation, and for no picture."""
        super().train(mode)
        self.runtime.validating = not mode
        return self

    # -- regional prompts

    def set_region(self, sub_prompt_index: int, is_last_network: bool, mask: Tensor) -> None:
        """Act in a region of the picture, for the sub-prompt of this number; mask [H, W], 0 to 1.

        Raises:
            ValueError: the architecture has no regional prompts.
        """
        if not self.arch.regions:
            known = " and ".join(arch.title for arch in ARCHS if arch.regions)
            raise ValueError(f"regional prompts are for {known}, this model is {self.arch.title}: leave them out")
        denoiser = self.arch.denoiser
        roles = {
            row.saved_name: self.arch.region_role(row.trainer_name) if row.part == denoiser.name
            else "encoder"
            for row, _ in self.layers
        }  # fmt: skip
        model = unwrap(self._roots[denoiser.name])
        attention = [(self.arch.region_role(name), layer) for name, layer in model.named_modules() if is_last_network]
        self.enter_region(sub_prompt_index, mask, roles, attention)

    def set_current_generation(
        self,
        batch_size: int,
        num_sub_prompts: int,
        width: int,
        height: int,
        shared: dict[Any, Any],
        ds_ratio: float | None = None,
    ) -> None:
        """A batch of a picture with regions begins.

        Args:
            batch_size, ds_ratio: not looked at; layers tell their sizes themselves.
            num_sub_prompts: number of regions.
            width, height: of the picture, in pixels.
            shared: the same dict for all networks of the batch.
        """
        assert self.runtime.region is not None, "set_current_generation before set_region"
        self.runtime.region.start(batch_size, num_sub_prompts, (height, width), shared)


def part_rates(
    arch: ArchSpec,
    text_encoder_lr: float | Sequence[float] | None,
    unet_lr: float | None,
    default_lr: float | None = None,
) -> dict[str, float | None]:
    """Part -> its learning rate: None takes the default, 0 leaves a part out.

    Args:
        arch: whose parts.
        text_encoder_lr, unet_lr, default_lr: --text_encoder_lr, --unet_lr and --learning_rate.

    Raises:
        ValueError: a rate is no number.
    """
    given = [*text_encoder_lr] if isinstance(text_encoder_lr, (list, tuple)) else [text_encoder_lr]
    names = *["text_encoder_lr"] * len(given), "unet_lr", "learning_rate"
    for name, rate in zip(names, (*given, unet_lr, default_lr), strict=True):
        if rate is not None:
            learning_rate(name, rate)
    encoders = [part.name for part in arch.text_encoders]
    if isinstance(text_encoder_lr, Sequence) and len(text_encoder_lr) > len(encoders):
        surplus = list(text_encoder_lr)[len(encoders) :]
        log.warning("text_encoder_lr: %s not used, %s has %d text encoders", surplus, arch.title, len(encoders))
    rates = text_encoder_rates(text_encoder_lr, default_lr, encoders)
    return {**rates, arch.denoiser.name: default_lr if unet_lr is None else unet_lr}


STEPS_WITHOUT_NORMS = 3  # of the optimizer, after which a trainer is known not to call update_norms


class PerturbedCalls(LoRANetwork):
    """With GGPO: what the host calls around a step, and logs, where a network has it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waited: int | None = 0  # steps of the optimizer without the call; None = it came, or its lack was told
        self._optimizer: Steps | None = None

    def see_step(self) -> None:
        """Beside what all do: hosts look for these calls on the wrapper which several processes put around a network,
        and do not find them there, and scripts for LECO have none of them."""
        super().see_step()
        if self._waited is None:
            return
        if self._optimizer is None:
            self._optimizer = Steps(self.parameters())
        self._waited += self._optimizer.taken()
        if self._waited == STEPS_WITHOUT_NORMS:
            self._waited = None
            log.warning(
                "ggpo_sigma and ggpo_beta have no effect: in %d steps this trainer has not called update_norms "
                "(sd-scripts does not with several processes, nor in LECO). Train with one process, or leave them out",
                STEPS_WITHOUT_NORMS,
            )

    def apply_max_norm_regularization(self, max_norm_value: float, device: Any = None) -> tuple[int, float, float]:
        with contextlib.nullcontext() if self._optimizer is None else self._optimizer.none():
            return super().apply_max_norm_regularization(max_norm_value, device)

    def update_grad_norms(self) -> None:
        """Before the gradients are cleared."""
        for layer in self.adapted_layers:
            if layer.perturbation is not None:
                layer.perturbation.see_gradients(layer)

    def update_norms(self) -> None:
        self._waited = None
        for layer in self.adapted_layers:
            if layer.perturbation is not None:
                layer.perturbation.see_weights(layer)

    def weight_norms(self) -> Tensor | None:
        """Mean row norm of each layer's true update; None before the first step."""
        return self._means("weight_norms")

    def grad_norms(self) -> Tensor | None:
        return self._means("gradient_norms")

    def combined_weight_norms(self) -> Tensor | None:
        return self._means("combined_norms")

    def step_state(self) -> dict[str, Tensor]:
        """What the last step leaves to the next one beside the parameters, for a state to go on from."""
        return {
            f"{layer.lora_name}.{name}": value
            for layer in self.adapted_layers
            if layer.perturbation is not None
            for name, value in layer.perturbation.statistics().items()
        }

    def load_step_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse."""
        of_layers: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            layer_name, _, name = key.rpartition(".")
            of_layers.setdefault(layer_name, {})[name] = value
        for layer in self.adapted_layers:
            if layer.perturbation is not None:
                layer.perturbation.set_statistics(of_layers.get(layer.lora_name, {}), next(layer.parameters()).device)

    def _means(self, name: str) -> Tensor | None:
        found = [getattr(layer.perturbation, name) for layer in self.adapted_layers if layer.perturbation is not None]
        means = [norms.mean() for norms in found if norms is not None]
        return torch.stack(means) if means else None


@functools.cache
def perturbed(kind: type[LoRANetwork]) -> type[LoRANetwork]:
    """The same class with the calls of GGPO. It is made here because this host asks a network for each of these methods
    (`hasattr`), so that one without GGPO must not have them, and because every entry has a class of its own, as in the
    host (`sd_compat.network_class`)."""

    class Perturbed(PerturbedCalls, kind):  # type: ignore[misc, valid-type]
        pass

    return Perturbed


class SdScriptsCalls(Caller):
    """The functions which this host calls in an entry."""

    @property
    def kind(self) -> type[LoRANetwork]:
        """The class of the networks."""
        return LoRANetwork

    @given_once
    def create_network(
        self,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: Any,
        text_encoder: TextEncoders,
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **kwargs: Any,
    ) -> LoRANetwork:
        """A new network for training.

        Args:
            multiplier: strength of the update, any finite number; 1 in training.
            network_dim: --network_dim, the rank of layers for which no argument says another; None = 4.
            network_alpha: --network_alpha, the numerator of their scale alpha / dim; 0 = the dim, None = the module's
                own default, 1 for most.
            vae: not looked at.
            text_encoder: the model, a list of models and None in the order of the architecture's encoders, or None.
            unet: the denoiser, on any device, in any precision; its class decides the architecture.
            neuron_dropout: --network_dropout, on the rank activation, in [0, 1); None and 0 = off.
            kwargs: --network_args as text, and what the host adds of its own.

        Raises:
            ValueError: all mistakes of the call in one message: unknown and contradictory arguments with the nearest
                valid ones, a model that this module is not for, a selection in which no layer is left.
        """
        # The host sends --network_dropout twice, once as a keyword of its own.
        raw = {"neuron_dropout": neuron_dropout or None, **kwargs}
        return self.new(self.kind, HOST, multiplier, network_dim, network_alpha, text_encoder, unet, raw)

    @given_once
    def create_network_from_weights(
        self,
        multiplier: float,
        file: str | None,
        vae: Any,
        text_encoder: TextEncoders,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        **kwargs: Any,
    ) -> tuple[LoRANetwork, Mapping[str, Tensor]]:
        """A network with the dims, forms, alphas and values of a file; options for training may be given too.

        Args:
            multiplier: strength of the update, any finite number.
            file: path of the file, or of the folder of one that PEFT wrote.
            vae: not looked at.
            text_encoder, unet: as for `create_network`.
            weights_sd: the file's tensors in its place; what its metadata said is lost then.
            for_inference: dropouts and noise never act.
            kwargs: network arguments for training.

        Returns:
            The network, its values loaded, and the file's tensors.

        Raises:
            ValueError: all mistakes of the call in one message.
        """
        if weights_sd is None:
            if file is None:
                raise ValueError(f"{self.name}: neither a file nor its tensors were given: hand over one of them")
            weights_sd = FileTensors(file)
        source = str(file or "the file")
        network = self.from_weights(
            self.kind, HOST, multiplier, weights_sd, text_encoder, unet, for_inference, kwargs, source
        )
        return network, weights_sd
