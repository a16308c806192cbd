"""Names that sd-scripts' files, and programs written for them, import from its own modules. Nothing of ours uses them.

The constants come from the architecture records; lists of classes end with the names that other libraries have.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..archs.anima import ANIMA
from ..archs.flux import FLUX
from ..archs.hunyuan_image import HUNYUAN_IMAGE
from ..archs.lumina import LUMINA
from ..archs.sd import SD, SDXL
from ..archs.sd3 import SD3
from ..archs.spec import ArchSpec
from ..args.coerce import named
from ..network.single import SingleLayer
from .sd_scripts import LoRANetwork

Constants = dict[str, "str | int | list[str]"]


def _common(arch: ArchSpec, name: str) -> Constants:
    """Prefix and class names of the denoiser under the name which that module gives it; classes of all encoders."""
    encoders = dict.fromkeys(cls for part in arch.text_encoders for cls in part.containers)
    return {
        f"LORA_PREFIX_{name}": arch.denoiser.prefix,
        f"{name}_TARGET_REPLACE_MODULE": list(arch.denoiser.containers),
        "TEXT_ENCODER_TARGET_REPLACE_MODULE": list(encoders),
    }


def _text_encoders(arch: ArchSpec, *names: str) -> Constants:
    parts = zip(names, arch.text_encoders, strict=True)
    return {f"LORA_PREFIX_TEXT_ENCODER{name}": part.prefix for name, part in parts}


def _blocks(arch: ArchSpec, name: str) -> Constants:
    """Class names of double and of single blocks."""
    double, single = ([c for c in arch.denoiser.containers if ("Single" in c) is wanted] for wanted in (False, True))
    return {f"{name}TARGET_REPLACE_MODULE_DOUBLE": double, f"{name}TARGET_REPLACE_MODULE_SINGLE": single}


def _levels(arch: ArchSpec, name: str) -> Constants:
    assert arch.levels is not None
    return {f"{name}NUM_OF_BLOCKS": arch.levels.down, f"{name}NUM_OF_MID_BLOCKS": arch.levels.mid}


_SD: Constants = {
    **_common(SD, "UNET"),
    "UNET_TARGET_REPLACE_MODULE_CONV2D_3X3": list(SD.denoiser.conv_containers),
    **_text_encoders(SD, ""),
    **_text_encoders(SDXL, "1", "2"),
    **_levels(SD, ""),
    **_levels(SDXL, "SDXL_"),
}
CONSTANTS: dict[str, Constants] = {
    "lora": _SD,
    "loha": _SD,
    "lokr": _SD,
    "lora_fa": _SD,
    "lora_flux": {**_common(FLUX, "FLUX"), **_blocks(FLUX, "FLUX_"), **_text_encoders(FLUX, "_CLIP", "_T5")},
    "lora_sd3": {**_common(SD3, "SD3"), **_text_encoders(SD3, "_CLIP_L", "_CLIP_G", "_T5")},
    "lora_lumina": {**_common(LUMINA, "LUMINA"), **_text_encoders(LUMINA, "")},
    "lora_hunyuan_image": {**_common(HUNYUAN_IMAGE, "HUNYUAN_IMAGE_DIT"), **_blocks(HUNYUAN_IMAGE, "")},
    "lora_anima": {
        **_common(ANIMA, "ANIMA"),
        "ANIMA_ADAPTER_TARGET_REPLACE_MODULE": list(dict(ANIMA.denoiser.optional)["train_llm_adapter"]),
        **_text_encoders(ANIMA, ""),
    },
}


@functools.cache
def network_class(module: str) -> type[LoRANetwork]:
    """The class of networks made by an entry, with the constants that its namesake in sd-scripts has.

    It is made here because each of the host's modules has a class of that name of its own, which is found there, also
    by pickle, and which its other files tell apart with isinstance; ours differ in data alone.

    Args:
        module: of the entry, as it was imported.
    """
    constants = CONSTANTS.get(module.rpartition(".")[2])
    if constants is None:
        return LoRANetwork
    return type("LoRANetwork", (LoRANetwork,), {**constants, "__module__": module, "__doc__": LoRANetwork.__doc__})


class LoRAModule(SingleLayer):
    """LoRA on one layer, as sd-scripts' network classes make it; its state has their keys.

    Raises:
        ValueError: an option that belongs to a whole network.
    """

    inference = False

    def __init__(
        self,
        lora_name: str,
        org_module: nn.Module,
        multiplier: float = 1.0,
        lora_dim: int = 4,
        alpha: float | Tensor | None = 1,
        dropout: float | None = None,
        rank_dropout: float | None = None,
        module_dropout: float | None = None,
        split_dims: list[int] | None = None,
        ggpo_beta: float | None = None,
        ggpo_sigma: float | None = None,
        **others: Any,
    ) -> None:
        if split_dims is not None or (ggpo_beta is not None and ggpo_sigma is not None) or others:
            given = "split_dims" if split_dims is not None else next(iter(others), "ggpo_beta")
            raise ValueError(f"{lora_name}: {given} needs a network of ours: use create_network of the same module")
        dropouts = {
            "dropout": dropout or 0.0,
            "rank_dropout": rank_dropout or 0.0,
            "module_dropout": module_dropout or 0.0,
        }
        number = None if alpha is None else float(alpha)
        super().__init__(lora_name, org_module, "lora", lora_dim, number, dropouts, multiplier, self.inference)
        self.lora_dim = lora_dim
        self.split_dims = None

    def apply_to(self) -> None:
        """Take over the layer's forward."""
        self.attach()

    @property
    def org_module_ref(self) -> list[nn.Module]:
        return [self.base]

    @property
    def multiplier(self) -> float | Tensor:
        return self.runtime.multiplier

    @multiplier.setter
    def multiplier(self, value: float | Tensor) -> None:
        self.runtime.multiplier = value if isinstance(value, Tensor) else named("multiplier", value)

    @property
    def enabled(self) -> bool:
        return self.runtime.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.runtime.enabled = value

    def _saved(self) -> dict[str, Tensor]:
        return {**self.adapter.pack(), "alpha": torch.tensor(self.alpha)}

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """lora_down.weight, lora_up.weight, alpha."""
        result = {} if destination is None else destination
        result.update({prefix + suffix: tensor for suffix, tensor in self._saved().items()})
        return result

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        """Take the keys of `state_dict` above; the adapter below finds its own."""
        found = {suffix: state_dict.pop(prefix + suffix) for suffix in self._saved() if prefix + suffix in state_dict}
        alpha = found.pop("alpha", None)
        self.set_alpha(None if alpha is None else float(alpha))
        if found.keys() == self.adapter.pack().keys():
            self.adapter.unpack_(found)
        else:
            missing += [prefix + suffix for suffix in self.adapter.pack() if suffix not in found]
        own = self.adapter.state_dict(prefix=f"{prefix}adapter.")
        state_dict.update(own)
        nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, *rest)


class LoRAInfModule(LoRAModule):
    """The same for generation: no dropouts, and it can be merged."""

    inference = True

    def set_network(self, network: Any) -> None:
        """The host's network; a layer of ours does not ask it."""

    def merge_to(self, sd: Mapping[str, Tensor], dtype: torch.dtype | None, device: Any) -> None:
        """Merge the tensors of one layer of a file, keys without its name, at the module's multiplier; its forward adds
        nothing from then on. Each call merges what it is given, as the host's own class does."""
        tensors = dict(sd)
        alpha = tensors.pop("alpha", None)
        self.adapter.unpack_(tensors)
        if alpha is not None:
            self.set_alpha(float(alpha))
        self.merge(device=None if device is None else torch.device(device))

    @torch.no_grad()
    def get_weight(self, multiplier: float | None = None) -> Tensor:
        """The scaled update at `multiplier`, of the shape of the layer's weight."""
        zero = torch.zeros(self.adapter.geometry.weight_shape)
        return self.new_weight(zero, None if multiplier is None else named("multiplier", multiplier))
