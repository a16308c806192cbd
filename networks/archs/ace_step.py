"""ACE-Step 1.5 (music): the decoder, under its own classes and diffusers'.

Files of its trainers (ACE-Step, Side-Step; LyCORIS on the decoder) have the prefix `lycoris`, not `lora_unet`.
"""

from __future__ import annotations

from .releases import Release
from .spec import DENOISER_ROOTS, ArchSpec, BlockAxis, Part, Signature, Start, Switch, Timestep
from .spellings import Rename, below, subtrees

ACE_STEP = ArchSpec(
    name="ace_step",
    title="ACE-Step 1.5",
    entry="lora_ace_step",
    signatures=(Signature("AceStepDiTModel"), Signature("AceStepTransformer1DModel")),
    timestep=Timestep(("timestep",), noise=1.0),
    denoiser=Part(
        "dit",
        "lycoris",
        ("AceStepDiTLayer", "AceStepTransformerBlock"),
        layouts=(
            *below(
                r"layers\.(\d+)\.(self|cross)_attn\.",
                r"layers.\1.\2_attn.",
                Rename("to_q", "q_proj"),
                Rename("to_k", "k_proj"),
                Rename("to_v", "v_proj"),
                Rename("to_out.0", "o_proj"),
                Rename("norm_q", "q_norm"),
                Rename("norm_k", "k_norm"),
            ),
            *below("", "", Rename("proj_in_conv", "proj_in.1"), Rename("proj_out_conv", "proj_out.1")),
        ),
        comfyui=subtrees((("decoder.", ""),)),
        file_roots=("lora_unet_decoder_", "lycoris_decoder_"),
        comfyui_saved=True,
        # The decoder in a checkpoint of the whole model, and in ComfyUI's.
        roots=("decoder.", *(f"{root}decoder." for root in DENOISER_ROOTS if root), *DENOISER_ROOTS),
    ),
    axes=(BlockAxis("layers."),),
    switches=(Switch("train_mlp", r".*\.mlp\..*", trained_if=True),),
    usual=frozenset({192, 256}),
    kinds=frozenset({8}),
    releases=(Release("ace_step", "ACE-Step 1.5", "AceStepTransformer1DModel"),),
    start=Start("--network_dim 16 --network_alpha 16 --learning_rate 1e-4"),
)
