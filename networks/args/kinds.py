"""Arguments that speak of one kind of layer, with what it is; rows of the table are made of them."""

from __future__ import annotations

LAYER_DIMS = {
    "img_attn_dim": "the image attention in double blocks (FLUX.1, Chroma)",
    "txt_attn_dim": "the text attention in double blocks (FLUX.1, Chroma)",
    "img_mlp_dim": "the image MLP in double blocks (FLUX.1, Chroma)",
    "txt_mlp_dim": "the text MLP in double blocks (FLUX.1, Chroma)",
    "img_mod_dim": "the image modulation in double blocks (FLUX.1)",
    "txt_mod_dim": "the text modulation in double blocks (FLUX.1)",
    "single_dim": "linear1 and linear2 in single blocks (FLUX.1, Chroma)",
    "single_mod_dim": "the modulation in single blocks (FLUX.1)",
    "context_attn_dim": "the context attention (SD3)",
    "context_mlp_dim": "the context MLP (SD3)",
    "context_mod_dim": "the context modulation (SD3)",
    "x_attn_dim": "the image attention, both of them (SD3)",
    "x_mlp_dim": "the image MLP (SD3)",
    "x_mod_dim": "the image modulation (SD3)",
    "refiner_dim": "the two refiners (Lumina)",
    "attn_dim": "the attention (Lumina)",
    "mlp_dim": "the feed-forward layers (Lumina)",
    "mod_dim": "the modulation (Lumina)",
}
EXTRA_DIMS = {
    "in_dims": "img_in, time_in, vector_in, guidance_in, txt_in (FLUX.1, Chroma)",
    "emb_dims": "context, t, x and y embedder, modulation and linear of the final layer (SD3)",
    "embedder_dims": "x, t and caption embedder (Lumina)",
}
BLOCK_INDICES = {
    "train_double_block_indices": "double blocks (FLUX.1, Chroma)",
    "train_single_block_indices": "single blocks, counted from 0 (FLUX.1, Chroma)",
    "train_block_indices": "joint blocks (SD3)",
}
