"""Arguments that speak of one kind of layer, with what it is; rows of the table are made of them."""

from __future__ import annotations

LAYER_DIMS = {
    "img_attn_dim": "the image attention in double blocks",
    "txt_attn_dim": "the text attention in double blocks",
    "img_mlp_dim": "the image MLP in double blocks",
    "txt_mlp_dim": "the text MLP in double blocks",
    "img_mod_dim": "the image modulation in double blocks",
    "txt_mod_dim": "the text modulation in double blocks",
    "single_dim": "linear1 and linear2 in single blocks",
    "single_mod_dim": "the modulation in single blocks",
    "context_attn_dim": "the context attention",
    "context_mlp_dim": "the context MLP",
    "context_mod_dim": "the context modulation",
    "x_attn_dim": "the image attention, both of them",
    "x_mlp_dim": "the image MLP",
    "x_mod_dim": "the image modulation",
    "refiner_dim": "the two refiners",
    "attn_dim": "the attention",
    "mlp_dim": "the feed-forward layers",
    "mod_dim": "the modulation",
}
EXTRA_DIMS = {
    "in_dims": "img_in, time_in, vector_in, guidance_in, txt_in",
    "emb_dims": "context, t, x and y embedder, modulation and linear of the final layer",
    "embedder_dims": "x, t and caption embedder",
}
BLOCK_INDICES = {
    "train_double_block_indices": "double blocks",
    "train_single_block_indices": "single blocks, counted from 0",
    "train_block_indices": "joint blocks",
}
