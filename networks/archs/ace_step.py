"""ACE-Step 1.5's decoder, under the original classes and diffusers'. Files have the original decoder's names.

The prefix is the one of LyCORIS, with which this model's own trainers write their files.
"""

from __future__ import annotations

from .spec import ArchSpec, BlockAxis, Part, Rename, Signature, below

DIFFUSERS = below(
    r"(layers\.\d+\.(?:self|cross)_attn)\.",
    r"\1.",
    Rename("to_q", "q_proj"),
    Rename("to_k", "k_proj"),
    Rename("to_v", "v_proj"),
    Rename("to_out.0", "o_proj"),
)

ACE_STEP = ArchSpec(
    name="ace_step",
    title="ACE-Step 1.5",
    entry="lora_ace_step",
    signatures=(Signature("AceStepDiTModel"), Signature("AceStepTransformer1DModel")),
    denoiser=Part("dit", "lycoris", ("AceStepDiTLayer", "AceStepTransformerBlock"), layouts=DIFFUSERS),
    axes=(BlockAxis("layers."),),
    exclude=(r".*\.mlp\..*",),  # this model's trainers adapt the attention; include_patterns brings the rest
    usual=frozenset({192, 256}),
)
