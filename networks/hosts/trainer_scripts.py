"""The training scripts of both trainers by their names, and which released model each of them trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SD_SCRIPTS, MUSUBI = "sd-scripts", "musubi"


@dataclass(frozen=True)
class Script:
    """A script that trains a network.

    Attributes:
        host: the trainer.
        release: the released model that it trains.
        choices: option -> its values -> the released models that they mean, where it trains several; the value of a
            switch is "".
        needs: the option without which it does not start.
        module: the network module of a command line that names none; "" = it makes no network then.
        alone: it takes no other.
        unet_only: text encoders are never trained.
        model: the option that names the model, where it is not the host's usual one; "" = it is.
        network_args: options that it hands on among the network's arguments -> whether a value stands behind them.
    """

    host: str
    release: str
    choices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    needs: str = ""
    module: str = ""
    alone: bool = False
    unet_only: bool = False
    model: str = ""
    network_args: Mapping[str, bool] = field(default_factory=dict)

    @property
    def releases(self) -> list[str]:
        """All of them."""
        chosen = (release for values in self.choices.values() for release in values.values())
        return list(dict.fromkeys([self.release, *chosen])) if self.release else []

    @property
    def checkpoint(self) -> str:
        """The option that names the model."""
        return self.model or ("dit" if self.host == MUSUBI else "pretrained_model_name_or_path")


_WAN = {
    "t2v-14B": "wan_t2v_14b",
    "t2v-1.3B": "wan_t2v_1_3b",
    "i2v-14B": "wan",
    "t2i-14B": "wan_t2v_14b",
    "flf2v-14B": "wan",
    "t2v-14B-FC": "wan",  # Fun Control: the layers of image to video, whatever its name says
    "i2v-14B-FC": "wan",
    "t2v-1.3B-FC": "wan_fun_control_1_3b",
    "i2v-A14B": "wan22_i2v_14b",
    "t2v-A14B": "wan_t2v_14b",
}
_LITE = [f"2v-{length}{kind}-sd" for length in ("5s", "10s") for kind in ("", "-distil", "-nocfg", "-pretrain")]
_KANDINSKY = {f"k5-lite-{kind}": "kandinsky_lite_image" for kind in ("t2i-hd", "i2i-hd")}
_KANDINSKY |= {f"k5-lite-t{kind}": "kandinsky_lite" for kind in _LITE} | {"k5-lite-i2v-5s-sd": "kandinsky_lite"}
_KANDINSKY |= {
    f"k5-pro-{kind}-{size}": "kandinsky" for kind in ("t2v-5s", "t2v-10s", "i2v-5s") for size in ("sd", "hd")
}
_FLUX_2 = {
    "dev": "flux_2",
    "klein-4b": "flux_2_klein_4b",
    "klein-base-4b": "flux_2_klein_4b",
    "klein-9b": "flux_2_klein_9b",
    "klein-base-9b": "flux_2_klein_9b",
}

SCRIPTS: dict[str, Script] = {
    "train_network.py": Script(SD_SCRIPTS, "sd15", {"v2": {"": "sd21"}}),
    "sdxl_train_network.py": Script(SD_SCRIPTS, "sdxl"),
    "flux_train_network.py": Script(SD_SCRIPTS, "flux", {"model_type": {"flux": "flux", "chroma": "chroma"}}),
    "sd3_train_network.py": Script(SD_SCRIPTS, "sd3"),
    "lumina_train_network.py": Script(SD_SCRIPTS, "lumina"),
    "anima_train_network.py": Script(SD_SCRIPTS, "anima"),
    "hunyuan_image_train_network.py": Script(SD_SCRIPTS, "hunyuan_image"),
    "train_leco.py": Script(SD_SCRIPTS, "sd15", {"v2": {"": "sd21"}}, module="networks.lora", unet_only=True),
    "sdxl_train_leco.py": Script(SD_SCRIPTS, "sdxl", module="networks.lora", unet_only=True),
    "hv_train_network.py": Script(MUSUBI, "hunyuan_video"),
    "hv_1_5_train_network.py": Script(MUSUBI, "hv_1_5"),
    "fpack_train_network.py": Script(MUSUBI, "framepack"),
    "wan_train_network.py": Script(MUSUBI, "wan_t2v_14b", {"task": _WAN}),
    "flux_kontext_train_network.py": Script(MUSUBI, "flux"),
    "flux_2_train_network.py": Script(MUSUBI, "flux_2", {"model_version": _FLUX_2}),
    "flux_2_train_network_self_flow.py": Script(MUSUBI, "flux_2", {"model_version": _FLUX_2}),
    "qwen_image_train_network.py": Script(MUSUBI, "qwen_image"),
    "qwen_image_21_train_network.py": Script(MUSUBI, "qwen_image_21", module="networks.lora_qwen_image_21"),
    "zimage_train_network.py": Script(MUSUBI, "zimage"),
    "kandinsky5_train_network.py": Script(MUSUBI, "kandinsky", {"task": _KANDINSKY}, needs="task"),
    "krea2_train_network.py": Script(MUSUBI, "krea2"),
    "minimax_h3_train_network.py": Script(MUSUBI, "minimax_h3", module="networks.lora_minimax_h3"),
    "ideogram4_train_network.py": Script(MUSUBI, "ideogram4"),
    "ernie_image_train_network.py": Script(MUSUBI, "ernie_image"),
    "lens_train_network.py": Script(MUSUBI, "lens", module="networks.lora_lens"),
    "mage_flow_train_network.py": Script(
        MUSUBI, "mage_flow", module="musubi_tuner.networks.lora_mage_flow", alone=True
    ),
    "ltx2_train_network.py": Script(  # of a fork
        MUSUBI,
        "ltx23",
        {"ltx_version": {"2.0": "ltx2", "2.3": "ltx23"}},
        model="ltx2_checkpoint",
        network_args={"lora_target_preset": True, "train_connectors": False, "audio_dim": True, "audio_alpha": True},
    ),
    "hidream_o1_train_network.py": Script(MUSUBI, ""),  # no library has its class: no outline of it is built in
}
# Scripts of both that train a model's own weights.
WHOLE_MODEL = frozenset(
    f"{name}.py"
    for name in (
        "fine_tune", "train_db", "sdxl_train", "flux_train", "sd3_train", "lumina_train", "anima_train", "hv_train",
        "qwen_image_train", "zimage_train", "hidream_o1_train", "flux_2_train", "flux_kontext_train", "ideogram4_train",
        "krea2_train", "lens_train",
    )
)  # fmt: skip
