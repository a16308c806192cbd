"""Saved names of every layer that can be trained, written by hand from the modules' names in the real classes: of the
first block of each row of blocks, and of what stands outside them.

A line of the second tables is `diffusers' layers = the trainer's`, below the prefixes of the line before in brackets; a
name alone is the same in both.
"""

from __future__ import annotations

# Normalisation layers of the trainers' own classes, which tests/names leaves out; a minus: without a weight of its own.
TRAINERS_NORMS = {
    "sd": """
down_blocks.0.attentions.0.norm
down_blocks.0.attentions.0.transformer_blocks.0.norm1
down_blocks.0.attentions.0.transformer_blocks.0.norm2
down_blocks.0.attentions.0.transformer_blocks.0.norm3
down_blocks.0.resnets.0.norm1
down_blocks.0.resnets.0.norm2
""",
    "sdxl": """
input_blocks.1.0.in_layers.0
input_blocks.1.0.out_layers.0
input_blocks.4.1.norm
input_blocks.4.1.transformer_blocks.0.norm1
input_blocks.4.1.transformer_blocks.0.norm2
input_blocks.4.1.transformer_blocks.0.norm3
""",
    "flux": """
double_blocks.0.img_norm1 -
double_blocks.0.img_norm2 -
double_blocks.0.txt_norm1 -
double_blocks.0.txt_norm2 -
double_blocks.0.img_attn.norm.query_norm
double_blocks.0.img_attn.norm.key_norm
double_blocks.0.txt_attn.norm.query_norm
double_blocks.0.txt_attn.norm.key_norm
single_blocks.0.pre_norm -
single_blocks.0.norm.query_norm
single_blocks.0.norm.key_norm
""",
    "sd3": """
joint_blocks.0.context_block.norm1 -
joint_blocks.0.context_block.norm2 -
joint_blocks.0.context_block.attn.ln_q
joint_blocks.0.context_block.attn.ln_k
joint_blocks.0.x_block.norm1 -
joint_blocks.0.x_block.norm2 -
joint_blocks.0.x_block.attn.ln_q
joint_blocks.0.x_block.attn.ln_k
joint_blocks.0.x_block.attn2.ln_q
joint_blocks.0.x_block.attn2.ln_k
""",
    "lumina": """
layers.0.attention.q_norm
layers.0.attention.k_norm
layers.0.attention_norm1
layers.0.attention_norm2
layers.0.ffn_norm1
layers.0.ffn_norm2
noise_refiner.0.attention.q_norm
noise_refiner.0.attention.k_norm
noise_refiner.0.attention_norm1
noise_refiner.0.attention_norm2
noise_refiner.0.ffn_norm1
noise_refiner.0.ffn_norm2
context_refiner.0.attention.q_norm
context_refiner.0.attention.k_norm
context_refiner.0.attention_norm1
context_refiner.0.attention_norm2
context_refiner.0.ffn_norm1
context_refiner.0.ffn_norm2
final_layer.norm_final -
""",
    "hunyuan_image": """
double_blocks.0.img_norm1 -
double_blocks.0.img_norm2 -
double_blocks.0.txt_norm1 -
double_blocks.0.txt_norm2 -
double_blocks.0.img_attn_q_norm
double_blocks.0.img_attn_k_norm
double_blocks.0.txt_attn_q_norm
double_blocks.0.txt_attn_k_norm
single_blocks.0.pre_norm -
single_blocks.0.q_norm
single_blocks.0.k_norm
""",
    "hv_1_5": """
double_blocks.0.img_norm1 -
double_blocks.0.img_norm2 -
double_blocks.0.txt_norm1 -
double_blocks.0.txt_norm2 -
double_blocks.0.img_attn_q_norm
double_blocks.0.img_attn_k_norm
double_blocks.0.txt_attn_q_norm
double_blocks.0.txt_attn_k_norm
""",
    "anima": """
blocks.0.layer_norm_self_attn -
blocks.0.layer_norm_cross_attn -
blocks.0.layer_norm_mlp -
blocks.0.self_attn.q_norm
blocks.0.self_attn.k_norm
blocks.0.cross_attn.q_norm
blocks.0.cross_attn.k_norm
llm_adapter.blocks.0.norm_self_attn
llm_adapter.blocks.0.norm_cross_attn
llm_adapter.blocks.0.norm_mlp
llm_adapter.blocks.0.self_attn.q_norm
llm_adapter.blocks.0.self_attn.k_norm
llm_adapter.blocks.0.cross_attn.q_norm
llm_adapter.blocks.0.cross_attn.k_norm
final_layer.layer_norm -
""",
    "wan": """
blocks.0.norm1 -
blocks.0.norm2 -
blocks.0.norm3
blocks.0.self_attn.norm_q
blocks.0.self_attn.norm_k
blocks.0.cross_attn.norm_q
blocks.0.cross_attn.norm_k
blocks.0.cross_attn.norm_k_img
""",
    "qwen_image": """
transformer_blocks.0.img_norm1 -
transformer_blocks.0.img_norm2 -
transformer_blocks.0.txt_norm1 -
transformer_blocks.0.txt_norm2 -
transformer_blocks.0.attn.norm_q
transformer_blocks.0.attn.norm_k
transformer_blocks.0.attn.norm_added_q
transformer_blocks.0.attn.norm_added_k
""",
    "framepack": """
transformer_blocks.0.norm1.norm -
transformer_blocks.0.norm1_context.norm -
transformer_blocks.0.norm2 -
transformer_blocks.0.norm2_context -
transformer_blocks.0.attn.norm_q
transformer_blocks.0.attn.norm_k
transformer_blocks.0.attn.norm_added_q
transformer_blocks.0.attn.norm_added_k
single_transformer_blocks.0.norm.norm -
single_transformer_blocks.0.attn.norm_q
single_transformer_blocks.0.attn.norm_k
""",
    "zimage": """
layers.0.attention.norm_q
layers.0.attention.norm_k
layers.0.attention_norm1
layers.0.attention_norm2
layers.0.ffn_norm1
layers.0.ffn_norm2
noise_refiner.0.attention.norm_q
noise_refiner.0.attention.norm_k
noise_refiner.0.attention_norm1
noise_refiner.0.attention_norm2
noise_refiner.0.ffn_norm1
noise_refiner.0.ffn_norm2
context_refiner.0.attention.norm_q
context_refiner.0.attention.norm_k
context_refiner.0.attention_norm1
context_refiner.0.attention_norm2
context_refiner.0.ffn_norm1
context_refiner.0.ffn_norm2
""",
    "kandinsky": """
text_transformer_blocks.0.self_attention_norm -
text_transformer_blocks.0.feed_forward_norm -
text_transformer_blocks.0.self_attention.query_norm
text_transformer_blocks.0.self_attention.key_norm
visual_transformer_blocks.0.self_attention_norm -
visual_transformer_blocks.0.cross_attention_norm -
visual_transformer_blocks.0.feed_forward_norm -
visual_transformer_blocks.0.self_attention.query_norm
visual_transformer_blocks.0.self_attention.key_norm
visual_transformer_blocks.0.cross_attention.query_norm
visual_transformer_blocks.0.cross_attention.key_norm
""",
    "krea2": """
blocks.0.prenorm
blocks.0.postnorm
blocks.0.attn.qknorm.qnorm
blocks.0.attn.qknorm.knorm
txtfusion.layerwise_blocks.0.prenorm
txtfusion.layerwise_blocks.0.postnorm
txtfusion.layerwise_blocks.0.attn.qknorm.qnorm
txtfusion.layerwise_blocks.0.attn.qknorm.knorm
txtfusion.refiner_blocks.0.prenorm
txtfusion.refiner_blocks.0.postnorm
txtfusion.refiner_blocks.0.attn.qknorm.qnorm
txtfusion.refiner_blocks.0.attn.qknorm.knorm
txtmlp.0
last.norm
""",
    "ideogram4": """
layers.0.attention.norm_q
layers.0.attention.norm_k
layers.0.attention_norm1
layers.0.attention_norm2
layers.0.ffn_norm1
layers.0.ffn_norm2
""",
    "hidream_o1": """
model.language_model.layers.0.input_layernorm
model.language_model.layers.0.post_attention_layernorm
model.language_model.layers.0.self_attn.q_norm
model.language_model.layers.0.self_attn.k_norm
model.visual.blocks.0.norm1
model.visual.blocks.0.norm2
""",
    "ace_step": """
layers.0.self_attn_norm
layers.0.cross_attn_norm
layers.0.mlp_norm
layers.0.self_attn.q_norm
layers.0.self_attn.k_norm
layers.0.cross_attn.q_norm
layers.0.cross_attn.k_norm
""",
}
TRAINERS_NORMS |= {"chroma": TRAINERS_NORMS["flux"], "flux_2": TRAINERS_NORMS["flux"]}
TRAINERS_NORMS |= {"hunyuan_video": TRAINERS_NORMS["hunyuan_image"]}

_FLUX_ATTENTION = """
attn.to_q + attn.to_k + attn.to_v = img_attn.qkv
attn.add_q_proj + attn.add_k_proj + attn.add_v_proj = txt_attn.qkv
attn.to_out.0 = img_attn.proj
attn.to_add_out = txt_attn.proj
attn.norm_q = img_attn.norm.query_norm
attn.norm_k = img_attn.norm.key_norm
attn.norm_added_q = txt_attn.norm.query_norm
attn.norm_added_k = txt_attn.norm.key_norm
"""
_FLUX_BLOCKS = f"""
[transformer_blocks.0. = double_blocks.0.]
{_FLUX_ATTENTION}
ff.net.0.proj = img_mlp.0
ff.net.2 = img_mlp.2
ff_context.net.0.proj = txt_mlp.0
ff_context.net.2 = txt_mlp.2
norm1.norm = img_norm1
norm1_context.norm = txt_norm1
norm2 = img_norm2
norm2_context = txt_norm2
[single_transformer_blocks.0. = single_blocks.0.]
attn.to_q + attn.to_k + attn.to_v + proj_mlp = linear1
proj_out = linear2
norm.norm = pre_norm
attn.norm_q = norm.query_norm
attn.norm_k = norm.key_norm
"""
_HUNYUAN_DOUBLE = """
[transformer_blocks.0. = double_blocks.0.]
norm1.linear = img_mod.linear
norm1_context.linear = txt_mod.linear
attn.to_out.0 = img_attn_proj
attn.to_add_out = txt_attn_proj
ff.net.0.proj = img_mlp.fc1
ff.net.2 = img_mlp.fc2
ff_context.net.0.proj = txt_mlp.fc1
ff_context.net.2 = txt_mlp.fc2
norm1.norm = img_norm1
norm1_context.norm = txt_norm1
norm2 = img_norm2
norm2_context = txt_norm2
attn.norm_q = img_attn_q_norm
attn.norm_k = img_attn_k_norm
attn.norm_added_q = txt_attn_q_norm
attn.norm_added_k = txt_attn_k_norm
"""
_KREA_BLOCK = """
attn.to_q = attn.wq
attn.to_k = attn.wk
attn.to_v = attn.wv
attn.to_gate = attn.gate
attn.to_out.0 = attn.wo
ff.gate = mlp.gate
ff.up = mlp.up
ff.down = mlp.down
norm1 = prenorm
norm2 = postnorm
attn.norm_q = attn.qknorm.qnorm
attn.norm_k = attn.qknorm.knorm
"""
_LUMINA_BLOCK = """
attn.to_q + attn.to_k + attn.to_v = attention.qkv
attn.to_out.0 = attention.out
feed_forward.linear_1 = feed_forward.w1
feed_forward.linear_2 = feed_forward.w2
feed_forward.linear_3 = feed_forward.w3
attn.norm_q = attention.q_norm
attn.norm_k = attention.k_norm
ffn_norm1
norm2 = attention_norm2
ffn_norm2
"""
_Z_BLOCK = """
attention.to_q
attention.to_k
attention.to_v
attention.to_out.0
attention.norm_q
attention.norm_k
feed_forward.w1
feed_forward.w2
feed_forward.w3
attention_norm1
attention_norm2
ffn_norm1
ffn_norm2
adaLN_modulation.0
"""
# Everything that can be trained of diffusers' classes, the UNets apart.
DIFFUSERS = {
    "flux": f"""
{_FLUX_BLOCKS}
[transformer_blocks.0. = double_blocks.0.]
norm1.linear = img_mod.lin
norm1_context.linear = txt_mod.lin
[single_transformer_blocks.0. = single_blocks.0.]
norm.linear = modulation.lin
[]
x_embedder = img_in
context_embedder = txt_in
time_text_embed.timestep_embedder.linear_1 = time_in.in_layer
time_text_embed.timestep_embedder.linear_2 = time_in.out_layer
time_text_embed.text_embedder.linear_1 = vector_in.in_layer
time_text_embed.text_embedder.linear_2 = vector_in.out_layer
time_text_embed.guidance_embedder.linear_1 = guidance_in.in_layer
time_text_embed.guidance_embedder.linear_2 = guidance_in.out_layer
""",
    "chroma": f"""
{_FLUX_BLOCKS}
[]
x_embedder = img_in
context_embedder = txt_in
""",
    "flux_2": f"""
[transformer_blocks.0. = double_blocks.0.]
{_FLUX_ATTENTION}
ff.linear_in = img_mlp.0
ff.linear_out = img_mlp.2
ff_context.linear_in = txt_mlp.0
ff_context.linear_out = txt_mlp.2
norm1 = img_norm1
norm1_context = txt_norm1
norm2 = img_norm2
norm2_context = txt_norm2
[single_transformer_blocks.0. = single_blocks.0.]
attn.to_qkv_mlp_proj = linear1
attn.to_out = linear2
norm = pre_norm
attn.norm_q = norm.query_norm
attn.norm_k = norm.key_norm
""",
    "sd3": """
[transformer_blocks.0. = joint_blocks.0.]
attn.to_q + attn.to_k + attn.to_v = x_block.attn.qkv
attn.add_q_proj + attn.add_k_proj + attn.add_v_proj = context_block.attn.qkv
attn2.to_q + attn2.to_k + attn2.to_v = x_block.attn2.qkv
attn.to_out.0 = x_block.attn.proj
attn.to_add_out = context_block.attn.proj
attn2.to_out.0 = x_block.attn2.proj
ff.net.0.proj = x_block.mlp.fc1
ff.net.2 = x_block.mlp.fc2
ff_context.net.0.proj = context_block.mlp.fc1
ff_context.net.2 = context_block.mlp.fc2
norm1.linear = x_block.adaLN_modulation.1
norm1_context.linear = context_block.adaLN_modulation.1
norm1.norm = x_block.norm1
norm1_context.norm = context_block.norm1
norm2 = x_block.norm2
norm2_context = context_block.norm2
[]
pos_embed.proj = x_embedder.proj
context_embedder
time_text_embed.timestep_embedder.linear_1 = t_embedder.mlp.0
time_text_embed.timestep_embedder.linear_2 = t_embedder.mlp.2
time_text_embed.text_embedder.linear_1 = y_embedder.mlp.0
time_text_embed.text_embedder.linear_2 = y_embedder.mlp.2
norm_out.linear = final_layer.adaLN_modulation.1
proj_out = final_layer.linear
""",
    "lumina": f"""
[layers.0. = layers.0.]
{_LUMINA_BLOCK}
norm1.linear = adaLN_modulation.1
norm1.norm = attention_norm1
[noise_refiner.0. = noise_refiner.0.]
{_LUMINA_BLOCK}
norm1.linear = adaLN_modulation.1
norm1.norm = attention_norm1
[context_refiner.0. = context_refiner.0.]
{_LUMINA_BLOCK}
norm1 = attention_norm1
[]
x_embedder
time_caption_embed.timestep_embedder.linear_1 = t_embedder.mlp.0
time_caption_embed.timestep_embedder.linear_2 = t_embedder.mlp.2
time_caption_embed.caption_embedder.1 = cap_embedder.1
norm_out.linear_1 = final_layer.adaLN_modulation.1
norm_out.linear_2 = final_layer.linear
norm_out.norm = final_layer.norm_final
""",
    "hunyuan_image": f"""
{_HUNYUAN_DOUBLE}
attn.to_q + attn.to_k + attn.to_v = img_attn_qkv
attn.add_q_proj + attn.add_k_proj + attn.add_v_proj = txt_attn_qkv
[single_transformer_blocks.0. = single_blocks.0.]
attn.to_q + attn.to_k + attn.to_v + proj_mlp = linear1
proj_out = linear2
norm.linear = modulation.linear
norm.norm = pre_norm
attn.norm_q = q_norm
attn.norm_k = k_norm
""",
    "hv_1_5": f"""
{_HUNYUAN_DOUBLE}
attn.to_q = img_attn_q
attn.to_k = img_attn_k
attn.to_v = img_attn_v
attn.add_q_proj = txt_attn_q
attn.add_k_proj = txt_attn_k
attn.add_v_proj = txt_attn_v
""",
    "anima": """
[transformer_blocks.0. = blocks.0.]
attn1.to_q = self_attn.q_proj
attn1.to_k = self_attn.k_proj
attn1.to_v = self_attn.v_proj
attn1.to_out.0 = self_attn.output_proj
attn2.to_q = cross_attn.q_proj
attn2.to_k = cross_attn.k_proj
attn2.to_v = cross_attn.v_proj
attn2.to_out.0 = cross_attn.output_proj
ff.net.0.proj = mlp.layer1
ff.net.2 = mlp.layer2
norm1.linear_1 = adaln_modulation_self_attn.1
norm1.linear_2 = adaln_modulation_self_attn.2
norm2.linear_1 = adaln_modulation_cross_attn.1
norm2.linear_2 = adaln_modulation_cross_attn.2
norm3.linear_1 = adaln_modulation_mlp.1
norm3.linear_2 = adaln_modulation_mlp.2
norm1.norm = layer_norm_self_attn
norm2.norm = layer_norm_cross_attn
norm3.norm = layer_norm_mlp
attn1.norm_q = self_attn.q_norm
attn1.norm_k = self_attn.k_norm
attn2.norm_q = cross_attn.q_norm
attn2.norm_k = cross_attn.k_norm
""",
    "wan": """
[blocks.0. = blocks.0.]
attn1.to_q = self_attn.q
attn1.to_k = self_attn.k
attn1.to_v = self_attn.v
attn1.to_out.0 = self_attn.o
attn2.to_q = cross_attn.q
attn2.to_k = cross_attn.k
attn2.to_v = cross_attn.v
attn2.to_out.0 = cross_attn.o
attn2.add_k_proj = cross_attn.k_img
attn2.add_v_proj = cross_attn.v_img
ffn.net.0.proj = ffn.0
ffn.net.2 = ffn.2
norm1
norm2 = norm3
norm3 = norm2
attn1.norm_q = self_attn.norm_q
attn1.norm_k = self_attn.norm_k
attn2.norm_q = cross_attn.norm_q
attn2.norm_k = cross_attn.norm_k
attn2.norm_added_k = cross_attn.norm_k_img
""",
    "qwen_image": """
[transformer_blocks.0. = transformer_blocks.0.]
attn.to_q
attn.to_k
attn.to_v
attn.to_out.0
attn.add_q_proj
attn.add_k_proj
attn.add_v_proj
attn.to_add_out
img_mlp.net.0.proj
img_mlp.net.2
txt_mlp.net.0.proj
txt_mlp.net.2
img_mod.1
txt_mod.1
img_norm1
img_norm2
txt_norm1
txt_norm2
attn.norm_q
attn.norm_k
attn.norm_added_q
attn.norm_added_k
""",
    "framepack": """
[transformer_blocks.0. = transformer_blocks.0.]
attn.to_q
attn.to_k
attn.to_v
attn.to_out.0
attn.add_q_proj
attn.add_k_proj
attn.add_v_proj
attn.to_add_out
ff.net.0.proj
ff.net.2
ff_context.net.0.proj
ff_context.net.2
norm1.linear
norm1_context.linear
norm1.norm
norm1_context.norm
norm2
norm2_context
attn.norm_q
attn.norm_k
attn.norm_added_q
attn.norm_added_k
[single_transformer_blocks.0. = single_transformer_blocks.0.]
attn.to_q
attn.to_k
attn.to_v
proj_mlp
proj_out
norm.linear
norm.norm
attn.norm_q
attn.norm_k
""",
    "zimage": f"""
[layers.0. = layers.0.]
{_Z_BLOCK}
[noise_refiner.0. = noise_refiner.0.]
{_Z_BLOCK}
[context_refiner.0. = context_refiner.0.]
{_Z_BLOCK.replace("adaLN_modulation.0", "")}
""",
    "kandinsky": """
[text_transformer_blocks.0. = text_transformer_blocks.0.]
self_attention.to_query
self_attention.to_key
self_attention.to_value
self_attention.out_layer
feed_forward.in_layer
feed_forward.out_layer
text_modulation.out_layer
self_attention_norm
feed_forward_norm
self_attention.query_norm
self_attention.key_norm
[visual_transformer_blocks.0. = visual_transformer_blocks.0.]
self_attention.to_query
self_attention.to_key
self_attention.to_value
self_attention.out_layer
cross_attention.to_query
cross_attention.to_key
cross_attention.to_value
cross_attention.out_layer
feed_forward.in_layer
feed_forward.out_layer
visual_modulation.out_layer
self_attention_norm
cross_attention_norm
feed_forward_norm
self_attention.query_norm
self_attention.key_norm
cross_attention.query_norm
cross_attention.key_norm
""",
    "krea2": f"""
[transformer_blocks.0. = blocks.0.]
{_KREA_BLOCK}
[text_fusion.layerwise_blocks.0. = txtfusion.layerwise_blocks.0.]
{_KREA_BLOCK}
[text_fusion.refiner_blocks.0. = txtfusion.refiner_blocks.0.]
{_KREA_BLOCK}
[]
img_in = first
time_embed.linear_1 = tmlp.0
time_embed.linear_2 = tmlp.2
time_mod_proj = tproj.1
text_fusion.projector = txtfusion.projector
txt_in.norm = txtmlp.0
txt_in.linear_1 = txtmlp.1
txt_in.linear_2 = txtmlp.3
final_layer.norm = last.norm
final_layer.linear = last.linear
""",
    "ideogram4": """
[layers.0. = layers.0.]
attention.to_q + attention.to_k + attention.to_v = attention.qkv
attention.to_out.0 = attention.o
attention.norm_q
attention.norm_k
feed_forward.w1
feed_forward.w2
feed_forward.w3
attention_norm1
attention_norm2
ffn_norm1
ffn_norm2
adaln_modulation
""",
    "ace_step": """
[layers.0. = layers.0.]
self_attn.to_q = self_attn.q_proj
self_attn.to_k = self_attn.k_proj
self_attn.to_v = self_attn.v_proj
self_attn.to_out.0 = self_attn.o_proj
cross_attn.to_q = cross_attn.q_proj
cross_attn.to_k = cross_attn.k_proj
cross_attn.to_v = cross_attn.v_proj
cross_attn.to_out.0 = cross_attn.o_proj
self_attn.norm_q = self_attn.q_norm
self_attn.norm_k = self_attn.k_norm
cross_attn.norm_q = cross_attn.q_norm
cross_attn.norm_k = cross_attn.k_norm
mlp.gate_proj
mlp.up_proj
mlp.down_proj
self_attn_norm
cross_attn_norm
mlp_norm
""",
}
DIFFUSERS["hunyuan_video"] = DIFFUSERS["hunyuan_image"]
# Of the UNets, whose other layers test_arch_names.py compares with the trainers' own lists.
UNETS_NORMS = {
    "sd": """
down_blocks.0.resnets.0.norm1
down_blocks.0.resnets.0.norm2
down_blocks.0.attentions.0.norm
down_blocks.0.attentions.0.transformer_blocks.0.norm1
down_blocks.0.attentions.0.transformer_blocks.0.norm2
down_blocks.0.attentions.0.transformer_blocks.0.norm3
mid_block.resnets.1.norm2
up_blocks.1.resnets.2.norm1
up_blocks.3.attentions.2.norm
""",
    "sdxl": """
down_blocks.0.resnets.0.norm1 = input_blocks.1.0.in_layers.0
down_blocks.0.resnets.0.norm2 = input_blocks.1.0.out_layers.0
down_blocks.1.attentions.0.norm = input_blocks.4.1.norm
down_blocks.1.attentions.0.transformer_blocks.0.norm1 = input_blocks.4.1.transformer_blocks.0.norm1
down_blocks.1.attentions.0.transformer_blocks.0.norm2 = input_blocks.4.1.transformer_blocks.0.norm2
down_blocks.1.attentions.0.transformer_blocks.0.norm3 = input_blocks.4.1.transformer_blocks.0.norm3
mid_block.resnets.0.norm1 = middle_block.0.in_layers.0
mid_block.attentions.0.norm = middle_block.1.norm
mid_block.resnets.1.norm2 = middle_block.2.out_layers.0
up_blocks.0.resnets.2.norm1 = output_blocks.2.0.in_layers.0
up_blocks.1.attentions.2.norm = output_blocks.5.1.norm
up_blocks.2.resnets.0.norm2 = output_blocks.6.0.out_layers.0
""",
}


def pairs(table: str) -> dict[tuple[str, ...], str]:
    """diffusers' layers, in the order of the rows -> the trainer's dotted name."""
    found, own_prefix, prefix = {}, "", ""
    for line in filter(None, map(str.strip, table.splitlines())):
        if line.startswith("["):
            own_prefix, _, prefix = line[1:-1].partition(" = ")
            continue
        own, _, trainer = line.partition(" = ")
        names = tuple(own_prefix + name for name in own.split(" + "))
        assert names not in found, names
        found[names] = prefix + (trainer or own)
    return found


def norms(arch: str) -> dict[str, bool]:
    """The trainer's normalisation layer -> whether it has a weight."""
    lines = TRAINERS_NORMS[arch].split("\n")
    return {line.removesuffix(" -"): not line.endswith(" -") for line in filter(None, lines)}
