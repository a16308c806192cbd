"""Network arguments as the trainers' documents, and those of their forks, write them, and every argument that these
documents or the trainers' modules list, on the models that they are written for: each runs, or runs with one line of
warning, or ends in the error that stands beside it.

Models have the first blocks of each row, on the meta device.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_musubi import split_by_the_trainer
from torch import nn
from toy_models import toy

from networks.args.coerce import read_toml
from networks.args.table import BY_NAME
from networks.hosts import documented, own_words
from networks.models.skeleton import skeleton

NO_KERNELS = "no trained layer is in a convolutional block or has a kernel above 1x1"
NO_LOW_RANK_KERNELS = "no trained layer has a low-rank kernel above 1x1"
NO_ENCODER = "no layer of that part is trained"
IDLE_DROPOUT = "dropout .no trained layer has a rank activation"
ONLY = "nothing else is trained, as by sd-scripts' module of this name"


class Line(NamedTuple):
    """A line of a document.

    Attributes:
        module, host, model, dim, alpha: what the document writes it for.
        text: what follows --network_args in a shell; or a line of TOML, `network_args = [...]`.
        warns: what is in the one warning; "" = there is none.
        fails: what is in the error; "" = there is none.
        whole: whether a warning says that LoKr's factors are whole, as the documents of both hosts announce.
        blocks: how many of each row the model has.
        dropout: --network_dropout.
    """

    module: str
    host: str
    model: str
    dim: int
    alpha: float
    text: str
    warns: str = ""
    fails: str = ""
    whole: bool = False
    blocks: int = 2
    dropout: float | None = None

    @property
    def arguments(self) -> dict[str, str]:
        """As the trainer hands them over."""
        toml = self.text.startswith("network_args")
        words = read_toml(self.text)["network_args"] if toml else shlex.split(self.text)
        if self.host == "musubi":
            return split_by_the_trainer(words)
        return dict(word.split("=", 1) for word in words)


def of(module: str, host: str, model: str, dim: int, alpha: float, *lines: Any, **kwargs: Any) -> Iterator[Line]:
    """Lines with one head: each a text, or a text with `warns` or `fails` of its own."""
    for line in lines:
        text, more = line if isinstance(line, tuple) else (line, {})
        yield Line(module, host, model, dim, alpha, text, **{**kwargs, **more})


def warns(text: str, *why: str) -> tuple[str, dict[str, str]]:
    return text, {"warns": ".*".join(why)}


def fails(text: str, why: str) -> tuple[str, dict[str, str]]:
    return text, {"fails": why}


SD, MUSUBI = "sd_scripts", "musubi"
DIMS_25 = "block_dims=2,4,4,4,8,8,8,8,12,12,12,12,16,12,12,12,12,8,8,8,8,4,4,4,2"
ALPHAS_25 = "2,2,2,2,4,4,4,4,6,6,6,6,8,6,6,6,6,4,4,4,4,2,2,2,2"
RATES_12 = (
    "down_lr_weight=0.5,0.5,0.5,0.5,1.0,1.0,1.0,1.0,1.5,1.5,1.5,1.5",
    "mid_lr_weight=2.0",
    "up_lr_weight=1.5,1.5,1.5,1.5,1.0,1.0,1.0,1.0,0.5,0.5,0.5,0.5",
)
CURVES = ("block_lr_zero_threshold=0.1", "down_lr_weight=sine+.5", "mid_lr_weight=1.5", "up_lr_weight=cosine+.5")
RATES_OF_PARTS = '"loraplus_lr_ratio=16" "loraplus_unet_lr_ratio=16" "loraplus_text_encoder_lr_ratio=4"'
DROPOUTS = ('"rank_dropout=0.1"', '"module_dropout=0.1"')


def quoted(*arguments: str) -> str:
    return " ".join(f'"{one}"' for one in arguments)


def in_toml(*arguments: str) -> str:
    return f"network_args = [ {', '.join(map(repr, arguments)).replace(chr(39), chr(34))},]"


SD_SCRIPTS = [
    # train_network.md and train_network_README-ja.md
    *of("networks.lora", SD, "sd", 16, 1, '"conv_dim=4" "conv_alpha=1"', '"conv_dim=4"', *DROPOUTS, RATES_OF_PARTS),
    *of("networks.lora", SD, "sd", 16, 1, quoted(*RATES_12), in_toml(*RATES_12), in_toml(*CURVES), quoted(*CURVES),
        '"down_lr_weight=0,0,0,0,0,0,1,1,1,1,1,1"', '"down_lr_weight=cosine+.25"', '"down_lr_weight=sine"',
        blocks=12),
    *of("networks.lora", SD, "sd", 16, 1, quoted(DIMS_25), in_toml(DIMS_25),
        quoted(DIMS_25, f"conv_block_dims={ALPHAS_25}"), quoted(DIMS_25, f"block_alphas={ALPHAS_25}"),
        in_toml(DIMS_25, f"block_alphas={ALPHAS_25}"),
        quoted(DIMS_25, f"conv_block_dims={ALPHAS_25}", f"conv_block_alphas={ALPHAS_25}"), blocks=12),
    *of("networks.dylora", SD, "sd", 16, 1, '"unit=4"', '"conv_dim=16" "unit=4"', RATES_OF_PARTS),
    *of("networks.dylora", SD, "sd", 32, 16, '"unit=4"', '"conv_dim=32" "conv_alpha=16" "unit=8"'),
    # train_network_advanced.md
    *of("networks.lora", SD, "sdxl", 32, 16, quoted("down_lr_weight=1,1,1,1,1,1,1,0.5,0.5", "mid_lr_weight=2,2,2"),
        quoted(f"block_dims={','.join('4' * 23)}", f"block_alphas={','.join('2' * 23)}"), blocks=12),
    *of("networks.lora", SD, "sdxl", 32, 16, "", RATES_OF_PARTS),
    # gen_img_README.md: its own example
    *of("networks.lora", SD, "sd", 16, 1, fails('"alpha=1.0,dropout=0.1"', "no argument is called alpha")),
    # modules without a document
    *of("networks.lora_fa", SD, "sd", 16, 1, '"conv_dim=4" "conv_alpha=1"', *DROPOUTS),
    *of("networks.lora_fa", SD, "sd", 16, 1, quoted(*RATES_12), quoted(*CURVES),
        quoted(DIMS_25, f"block_alphas={ALPHAS_25}", f"conv_block_dims={ALPHAS_25}", f"conv_block_alphas={ALPHAS_25}"),
        blocks=12),
    *of("networks.oft", SD, "sdxl", 4, 1e-3, "", '"enable_all_linear=True"', '"enable_conv=True"'),
    *of("networks.oft_flux", SD, "flux", 4, 1e-3, "", '"enable_all_linear=True"'),
    # train_network_oft_boft.md
    *of("networks.oft_v2", SD, "sdxl", 32, 1, "", '"coft=false" "block_share=false"', '"block_size=16"',
        '"oft_block_size=16"', '"oft_coft=False"', '"oft_block_share=true"', '"enable_conv=true"',
        '"auto_adjust=true"', warns('"dropout=0.1"', IDLE_DROPOUT), warns('"dropout_probability=0.1"', IDLE_DROPOUT),
        """ "exclude_patterns=['.*attn2.*']" """, warns(""" "include_patterns=['.*attn2.*']" """, ONLY),
        warns('"coft_eps=6e-5"', "it says something beside coft=True"),
        fails('"coft=true" "coft_eps=6e-5"', "no argument is called coft: write constraint="),
        fails('"auto_adjust=false"', "adjusted always")),
    *of("networks.boft", SD, "sdxl", 8, 1, '"boft_n_butterfly_factor=2"', '"block_size=4"', '"boft_block_size=4"',
        '"enable_conv=true"', '"auto_adjust=true"', warns('"dropout=0.1"', IDLE_DROPOUT),
        warns('"boft_dropout=0.1"', IDLE_DROPOUT), """ "exclude_patterns=['.*attn2.*']" """,
        warns(""" "include_patterns=['.*attn2.*']" """, ONLY),
        fails('"block_num=4"', "the size of a block is --network_dim"),
        fails('"boft_block_num=4"', "the size of a block is --network_dim")),
    # flux_train_network.md
    *of("networks.lora_flux", SD, "flux", 16, 1,
        '"img_attn_dim=4" "img_mlp_dim=8" "txt_attn_dim=2" "txt_mlp_dim=2" "img_mod_dim=2" "txt_mod_dim=2" '
        '"single_dim=4" "single_mod_dim=2"',
        '"in_dims=[4,2,2,2,4]"', '"train_t5xxl=True"', '"ggpo_sigma=0.03" "ggpo_beta=0.01"', '"split_qkv=True"',
        '"train_blocks=single"', '"train_blocks=double"', '"train_blocks=all"', *DROPOUTS, RATES_OF_PARTS,
        '"verbose=True"', warns('"conv_dim=4" "conv_alpha=1"', "conv_dim", NO_KERNELS),
        fails('"network_reg_dims=single.*_modulation.*=4,img_attn=8"', "'img_attn' matches no layer"),
        fails(r'"network_reg_lrs=single_blocks_(\d|10)_=1e-3,double_blocks=2e-3"', "'double_blocks' matches no layer")),
    *of("networks.lora_flux", SD, "flux", 16, 1,
        '"train_double_block_indices=0,1,8-12,18" "train_single_block_indices=3,10,20-25,37"',
        '"train_double_block_indices=none" "train_single_block_indices=10-15"', blocks=38),
    *of("networks.lora_flux", SD, "flux", 16, 1, warns('"use_dora=True"', "use_dora", "off on 38 dropout"),
        dropout=0.1),
    *of("networks.lora_flux", SD, "chroma", 16, 1, "", warns('"img_mod_dim=2"', "img_mod_dim")),
    # sd3_train_network.md
    *of("networks.lora", SD, "sd3", 16, 1, ""),
    *of("networks.lora_sd3", SD, "sd3", 16, 1,
        '"context_attn_dim=2" "context_mlp_dim=3" "context_mod_dim=4" "x_attn_dim=5" "x_mlp_dim=6" "x_mod_dim=7" '
        '"verbose=True"',
        '"emb_dims=[2,3,4,5,6,7]"', '"train_t5xxl=True"', '"split_qkv=True"', *DROPOUTS, RATES_OF_PARTS,
        warns('"conv_dim=4" "conv_alpha=1"', "conv_dim", NO_KERNELS)),
    *of("networks.lora_sd3", SD, "sd3", 16, 1, '"train_block_indices=1,2,6-8"', blocks=9),
    # lumina_train_network.md
    *of("networks.lora_lumina", SD, "lumina", 8, 8, '"attn_dim=4"', '"mlp_dim=4"', '"mod_dim=4"', '"refiner_dim=4"',
        '"embedder_dims=[4,4,4]"', '"attn_dim=4" "mlp_dim=4" "mod_dim=4" "refiner_dim=4" "embedder_dims=[4,4,4]"',
        '"train_blocks=transformer"', '"train_blocks=refiners"', '"train_blocks=noise_refiner"',
        '"train_blocks=context_refiner"', '"split_qkv=True"', *DROPOUTS, RATES_OF_PARTS, '"verbose=True"',
        warns('"conv_dim=4" "conv_alpha=1"', "conv_dim", NO_KERNELS)),
    # hunyuan_image_train_network.md, whose examples name layers of other models
    *of("networks.lora_hunyuan_image", SD, "hunyuan_image", 16, 1, "", '"split_qkv=True"',
        '"ggpo_sigma=0.03" "ggpo_beta=0.01"', '"loraplus_lr_ratio=4"', *DROPOUTS, '"verbose=True"',
        warns('"conv_dim=4" "conv_alpha=1"', "conv_dim", NO_KERNELS),
        warns('"loraplus_text_encoder_lr_ratio=4"', "loraplus_text_encoder_lr_ratio", NO_ENCODER),
        fails('"network_reg_dims=attn.*.q_proj=4,attn.*.k_proj=4"', "'attn.*.q_proj', 'attn.*.k_proj' match no layer"),
        fails('"network_reg_lrs=down_blocks.1=1e-4,up_blocks.2=2e-4"', "'down_blocks.1', 'up_blocks.2' match no")),
    # anima_train_network.md
    *of("networks.lora_anima", SD, "anima release", 8, 1, """ "include_patterns=['.*final_layer.*']" """),
    *of("networks.lora_anima", SD, "anima", 8, 1, "", """ "include_patterns=['.*final_layer.*']" """,
        """ "exclude_patterns=['.*mlp.*']" """, '"network_reg_dims=.*self_attn.*=8,.*cross_attn.*=4,.*mlp.*=8"',
        '"network_reg_lrs=.*self_attn.*=1e-4,.*cross_attn.*=5e-5"', '"train_llm_adapter=True"',
        '"train_llm_adapter=True" "network_reg_lrs=.*llm_adapter.*=5e-5"', '"verbose=True"', *DROPOUTS,
        '"loraplus_lr_ratio=2.0"', '"loraplus_unet_lr_ratio=2.0"', '"loraplus_text_encoder_lr_ratio=2.0"'),
]  # fmt: skip


def loha_and_lokr() -> Iterator[Line]:
    """The branch of sd-scripts that has both."""
    for module, whole in (("networks.loha", False), ("networks.lokr", True)):
        for model in ("sdxl", "anima"):
            dims = '"network_reg_dims=.*attn.*=8,.*mlp.*=4"'
            lines = ("", '"verbose=True"', *DROPOUTS, """ "exclude_patterns=[r'.*attn.*']" """,
                     """ "exclude_patterns=[r'.*mlp.*']" "include_patterns=[r'.*mlp.*1.*']" """,
                     '"network_reg_lrs=.*attn.*=1e-4,.*mlp.*=2e-4"', (dims, {"whole": whole and model == "sdxl"}),
                     '"loraplus_lr_ratio=4"', RATES_OF_PARTS,
                     warns('"use_tucker=True"', "use_tucker", NO_LOW_RANK_KERNELS))  # fmt: skip
            yield from of(module, SD, model, 32, 16, *lines, whole=whole)
        convolutions = ('"conv_dim=16" "conv_alpha=8"', '"conv_dim=16" "conv_alpha=8" "use_tucker=True"')
        yield from of(module, SD, "sdxl", 32, 16, *convolutions, whole=whole)
        idle = (warns(text, "conv_dim", NO_KERNELS) for text in convolutions)
        yield from of(module, SD, "anima", 32, 16, '"train_llm_adapter=True"', *idle, whole=whole)
        belongs = "train_llm_adapter has no effect on Stable Diffusion XL; it belongs to Anima"
        yield from of(module, SD, "sdxl", 32, 16, fails('"train_llm_adapter=True"', belongs))
    for model in ("sdxl", "anima"):
        yield from of("networks.lokr", SD, model, 32, 16, '"factor=4"', ('"factor=-1"', {"whole": True}))


MUSUBI_TUNER = [
    # advanced_config.md
    *of("networks.lora", MUSUBI, "hunyuan_video", 32, 1, "", '"verbose=True"', '"loraplus_lr_ratio=4"',
        '"verbose=True" "loraplus_lr_ratio=4"', """ "exclude_patterns=[r'.*single_blocks.*']" """),
    *of("networks.lora", MUSUBI, "hunyuan_video", 32, 1,
        r""" "exclude_patterns=[r'.*single_blocks.*', r'.*double_blocks\.[0-9]\..*']" """,
        r""" "exclude_patterns=[r'.*']" "include_patterns=[r'.*single_blocks\.\d{2}\.linear.*']" """, blocks=12),
    # krea2.md
    *of("networks.lora_krea2", MUSUBI, "krea2", 32, 32,
        r""" "exclude_patterns=['.*\.mlp\..*','first','last\.linear','tmlp\..*','txtmlp\..*','tproj\.1',"""
        r"""'txtfusion\..*']" """,
        r""" "exclude_patterns=['.*']" "include_patterns=['.*\.attn\.wq']" """),
    # hidream_o1.md
    *of("networks.lora_hidream_o1", MUSUBI, "hidream_o1", 32, 1, "", warns("conv_dim=4 conv_alpha=1", NO_KERNELS)),
    *of("networks.lora_hidream_o1", MUSUBI, "hidream_o1 i2i", 32, 1, "", "conv_dim=4 conv_alpha=1"),
    # loha_lokr.md
    *(line for module in ("networks.loha", "networks.lokr") for model in ("hunyuan_video", "wan", "qwen_image")
      for line in of(module, MUSUBI, model, 32, 16, '"verbose=True"', *DROPOUTS,
                     '"loraplus_lr_ratio=4"', """ "exclude_patterns=[r'.*blocks.1.*']" """,
                     """ "exclude_patterns=[r'.*']" "include_patterns=[r'.*blocks.1.*']" """,
                     warns('"conv_dim=4" "conv_alpha=1"', "conv_dim", NO_KERNELS),
                     whole=module == "networks.lokr" and model != "wan")),
    *of("networks.lokr", MUSUBI, "hunyuan_video", 32, 16, '"factor=4"', ('"factor=-1"', {"whole": True})),
]  # fmt: skip


FORK = """
network_args = ["use_rslora=True", "use_dora=True", "loraplus_lr_ratio=8"]
network_args = ["use_rslora=True"]
network_args = ["use_dora=True"]
network_args = ["loraplus_lr_ratio=8"]
network_args = ["rank_dropout=0.1"]
network_args = ["module_dropout=0.1"]
network_args = ["verbose=True"]
network_args = ["use_rslora=True", "loraplus_lr_ratio=8"]
network_args = ["use_dora=True", "module_dropout=0.1"]
""".strip().splitlines()


def musubi_models() -> Iterator[Line]:
    """What its modules for single models read beside."""
    own = {"flux": "lora_flux", "framepack": "lora_framepack", "hidream_o1": "lora_hidream_o1", "ideogram4": None,
           "ernie_image": None, "flux_2": None, "hv_1_5": None, "kandinsky": None, "krea2": None, "lens": None,
           "ltx2": None, "mage_flow": None, "minimax_h3": None, "qwen_image": None, "qwen_image_21": None, "wan": None,
           "zimage": None}  # fmt: skip
    for model, module in own.items():
        lines = ('"rank_dropout=0.1" "module_dropout=0.1" "loraplus_lr_ratio=4" "verbose=True"',
                 warns('"conv_dim=4" "conv_alpha=1"', "conv_dim", NO_KERNELS))  # fmt: skip
        yield from of(f"networks.{module or f'lora_{model}'}", MUSUBI, model, 32, 1, *lines, FORK[0])


# Of a fork with LTX-2: what its document has, and what its script makes of its own options.
LTX2 = of(
    "networks.lora_ltx2", MUSUBI, "ltx2", 32, 32, '"use_dora=true"', '"use_rslora=true"', '"lora_target_preset=t2v"',
    '"cross_modal_dim=12" "cross_modal_alpha=12"',
    '"lora_target_preset=v2v" "connector_lora=True" "audio_dim=16" "audio_alpha=16"',
    r""" "include_patterns=['.*\.to_k$','.*\.to_q$','.*\.to_v$','.*\.to_out\.0$','.*\.ff\.net\.0\.proj$',"""
    r"""'.*\.ff\.net\.2$']" "lora_target_preset=t2v" """,
    warns('"lora_target_preset=video_sa" "audio_dim=16"', "audio_dim", "no such layer"),
)  # fmt: skip
FORK_PATTERNS = r"""
network_args = ["exclude_patterns=['.*(img_mod|txt_mod|modulation).*']"]
network_args = ["exclude_patterns=['.*attn.*']", "include_patterns=['.*attn\\.to_q.*', '.*attn\\.to_k.*']"]
network_args = ["exclude_mod=False"]
network_args = ["use_rslora=True", "loraplus_lr_ratio=8", "exclude_mod=False"]
""".strip().splitlines()
BLISSFUL = [
    *(line for module, model in (("lora_wan", "wan"), ("lora_qwen_image", "qwen_image"), ("lora", "hunyuan_video"))
      for line in of(f"networks.{module}", MUSUBI, model, 128, 64, *FORK,
                     warns('network_args = ["conv_dim=32"]', "conv_dim", NO_KERNELS),
                     warns('network_args = ["conv_dim=32", "conv_alpha=16"]', "conv_dim", NO_KERNELS),
                     warns('network_args = ["use_dora=True", "rank_dropout=0.1"]', "use_dora", "rank_dropout"))),
    *of("networks.lora_qwen_image", MUSUBI, "qwen_image", 128, 64, *FORK_PATTERNS),
    *of("networks.lora_wan", MUSUBI, "wan", 128, 64, fails('network_args = ["exclude_mod=False"]', "exclude_mod")),
    *of("networks.lora", MUSUBI, "hunyuan_video", 128, 64,
        """network_args = ["exclude_patterns=['.*single_blocks.*']", "use_rslora=True"]"""),
    *of("networks.lora_wan", MUSUBI, "wan", 128, 64, warns('network_args = ["use_dora=True"]', "use_dora", "dropout"),
        dropout=0.1),
]  # fmt: skip

# A page on sd-scripts' network arguments, which lists some for networks.lora that LyCORIS has.
PAGE = [
    *of("networks.lora", SD, "sd", 16, 1, '"use_scalar=True"', '"dora_wd=True"',
        '"conv_dim=4" "use_tucker=True"', warns('"use_tucker=True"', "use_tucker", NO_LOW_RANK_KERNELS),
        warns('"dora_wd=True" "rank_dropout=0.1"', "dora_wd", "rank_dropout"),
        '"conv_dim=4" "conv_alpha=1" "loraplus_lr_ratio=4" "rank_dropout=0.1"'),
    *of("networks.lora", SD, "sd", 16, 1,
        '"block_dims=4,4,4,4,8,8,8,8,16,16,16,16,16,16,16,16,16,16,16,8,8,8,8,4,4"', blocks=12),
    *of("networks.lora", SD, "sd15 release", 16, 1, '"train_norm=True"'),
    *of("networks.dylora", SD, "sd", 32, 16, '"dyloRA=4"'),
]  # fmt: skip

SWITCHES = ("decompose_both=True", "use_tucker=True", "use_scalar=True", "weight_decompose=True", "factor=-1")
SIDE_STEP = [
    line
    for module, host, algo in (
        ("networks.lora_ace_step", MUSUBI, "algo=lokr"), ("networks.lora_ace_step", SD, "algo=lokr"),
        ("networks.lokr", MUSUBI, ""), ("networks.lokr", SD, ""),
    )
    for line in of(module, host, "ace_step", 64, 128,
                   warns(f"{algo} decompose_both=True", "decompose_both"),
                   warns(f"{algo} use_tucker=True", "use_tucker", NO_LOW_RANK_KERNELS),
                   f"{algo} use_scalar=True", f"{algo} weight_decompose=True", f"{algo} factor=-1",
                   (f"{algo} factor=8", {"whole": False}),
                   warns(f"{algo} {' '.join(SWITCHES)}", "decompose_both", "use_tucker"), whole=True)
]  # fmt: skip

LINES = [*SD_SCRIPTS, *loha_and_lokr(), *MUSUBI_TUNER, *musubi_models(), *LTX2, *BLISSFUL, *PAGE, *SIDE_STEP]


@functools.cache
def model(name: str, blocks: int, shrink: int) -> tuple[nn.Module, list[nn.Module]]:
    """(denoiser, text encoders)."""
    arch, _, more = name.partition(" ")
    if more == "release":  # with its normalisation layers
        released = skeleton(arch)
        return released.unet, [one for one in released.text_encoders if one is not None]
    with torch.device("meta"):
        parts = toy(arch, blocks=blocks, shrink=shrink)
    denoiser = parts.pop("dit" if "dit" in parts else "unet")
    if more:
        denoiser.hidream_o1_task = more  # type: ignore[assignment]
    return denoiser, list(parts.values())


def title(line: Line) -> str:
    return f"{line.module.removeprefix('networks.')}-{line.host}-{line.model}-{line.text.strip()[:60]}"


@pytest.mark.parametrize("host", documented.HOSTS)
def test_every_argument_that_is_listed_has_a_line(host: str) -> None:
    documents = documented.HOSTS[host]
    listed = {BY_NAME[name].name for module in documents.modules for name in documents.of(module).split()}
    lines = [line for line in LINES if line.host == host]
    assert listed <= {BY_NAME[key].name for line in lines for key in line.arguments if key in BY_NAME}
    assert documents.modules.keys() <= {line.module.rpartition(".")[2] for line in lines}


def test_layers_outside_the_blocks_are_those_of_the_trainer_s_class() -> None:
    """The plan of a release, whose model is of another library's class."""
    arguments = {"include_patterns": "['.*final_layer.*', '.*_embedder.*']", "exclude_patterns": "['.*mlp.*']"}
    found = []
    for name in ("anima", "anima release"):
        plan = importlib.import_module("networks.lora_anima").plan(8, 1, [], model(name, 2, 16)[0], **arguments)
        found.append({row.trainer_name for row in plan.trained if not row.trainer_name.startswith("blocks.")})
    assert found[0] == found[1] and len(found[0]) == 6


@pytest.mark.sweep(6)
@pytest.mark.parametrize("line", LINES, ids=title)
def test_a_line_of_a_document_does_what_stands_beside_it(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    shrink = 1 if "lokr" in line.module + line.text else 16  # its form depends on the sizes
    denoiser, encoders = model(line.model, line.blocks, shrink)
    module = importlib.import_module(line.module)

    def call() -> Any:
        return module.plan(
            line.dim, line.alpha, encoders, denoiser, line.host, neuron_dropout=line.dropout, **line.arguments
        )

    if line.fails:
        with pytest.raises(ValueError, match=line.fails.replace("*", r"\*")):
            call()
        return
    with caplog.at_level(logging.WARNING, logger="networks"):
        plan = call()
    told = [record.getMessage() for record in caplog.records] + list(plan.warnings)
    told = [text for text in told if "is it the right model?" not in text]  # of so few blocks
    whole = [text for text in told if "have whole factors" in text]
    assert len(whole) == line.whole, told
    told = [text for text in told if text not in whole]
    assert len(told) == bool(line.warns) and all(re.search(line.warns, text) for text in told), told
    assert plan.trained


def test_the_words_of_two_modules_do_what_they_do_there() -> None:
    """The size of a block goes before network_dim, for convolutions, too; with include_patterns nothing else is
    trained, whatever is excluded; and where another algorithm is asked for, the words are its own."""
    denoiser, encoders = model("sdxl", 2, 16)

    def plan(entry: str, *words: str, host: str = SD) -> Any:
        module = importlib.import_module(f"networks.{entry}")
        return module.plan(8, 1, encoders, denoiser, host, **dict(word.split("=", 1) for word in words))

    for entry, word in (("oft_v2", "oft_block_size"), ("boft", "boft_block_size"), ("boft", "block_size")):
        found = plan(entry, f"{word}=4", "enable_conv=true")
        assert {row.dim for row in found.trained} == {4} and any(row.geometry.has_kernel for row in found.trained)
    for entry in ("oft_v2", "boft"):
        both = plan(entry, "include_patterns=['.*attn2.*to_q']", "exclude_patterns=['.*attn2.*']")
        assert {row.dotted_name.rpartition("attn2")[2] for row in both.trained} == {".to_q"}
    dylora = plan("oft_v2", "algo=dylora", "block_size=4")
    assert {row.dim for row in dylora.trained} == {8} and dylora.trained[0].options["block_size"] == 4
    with pytest.raises(ValueError, match="block_size=four"):
        plan("oft_v2", "block_size=four")
    with pytest.raises(ValueError, match="include_patterns rescues nothing"):
        plan("lora", "include_patterns=['.*attn2.*']")


# -- what the modules of the hosts read, where their programs are

PROGRAMS = {SD: ("SD_SCRIPTS_PATH", "networks"), MUSUBI: ("MUSUBI_PATH", "musubi_tuner/networks")}
HERE = [(host, Path(os.environ[name], folder)) for host, (name, folder) in PROGRAMS.items() if os.environ.get(name)]
ON = {"lora": "sd", "lora_fa": "sd"}  # modules of which a list speaks of one architecture


def _own_words(module: str) -> set[str]:
    words = own_words.WORDS.get(module)
    return (
        {*words.sizes, *words.renamed, *words.nothing, *words.beside, "block_num", "boft_block_num"} if words else set()
    )


if HERE:

    @pytest.mark.parametrize(("host", "folder"), HERE)
    def test_the_lists_have_what_the_modules_read(host: str, folder: Path) -> None:
        """But for expressions on names, which are mistakes where they match nothing, and for what acts wherever the
        documents list it."""
        reading = re.compile(r"""^[^#\n]*kwargs\.(?:get|pop)\(["'](\w+)["']""", re.M)
        seen = set()
        for name in documented.HOSTS[host].modules:
            if not (folder / f"{name}.py").is_file():  # of a branch
                continue
            read = {*reading.findall((folder / f"{name}.py").read_text(encoding="utf-8"))} - {"train_llm_adapter"}
            rows = [BY_NAME[one] for one in read - _own_words(name)]
            wanted = {row.name for row in rows if row.kind != "patterns" and not row.kind.startswith("regex")}
            assert wanted <= documented.documented(host, name, "lora", "lora", "", ON.get(name, "")), name
            seen |= {name} if read else set()
        assert "lora" in seen and len(seen) > 8
