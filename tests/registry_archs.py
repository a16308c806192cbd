"""Test data of every architecture, written by hand: what its trainer's class is like and what its files hold.

A new architecture needs an entry here. Only `counts`, `anchor`, `forward` and `norms` must be given; the messages of
the tests say what is missing. tests/names/ARCH.txt, which `python scripts/names.py ARCH` writes, has the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from networks.archs import ARCHS, ArchSpec

SPECS: dict[str, ArchSpec] = {spec.name: spec for spec in ARCHS}


@dataclass(frozen=True)
class Anchor:
    """One layer of the full-size model, written by hand: an adapter's keys must be these.

    Attributes:
        dotted_name, saved_name: in the class that the names are recorded from.
        O, I: output and input features.
    """

    dotted_name: str
    saved_name: str
    O: int
    I: int


@dataclass(frozen=True)
class ArchData:
    """What the tests know of an architecture.

    Attributes:
        counts: layers of the recorded model that are trained: of the denoiser by default and with `widest`, of the text
            encoders with `widest`.
        anchor: a layer by hand.
        forward: arguments of the denoiser's forward, up to the time.
        norms: the normalisation layers below the containers of the recorded class, which tests/names leaves out: of
            the first block of each row of blocks, and of containers that are no blocks, one a line; a minus behind it:
            without a weight of its own.
        source: the class that the names are recorded from, and how; "" = diffusers' class of the first release.
        host: whose functions create its networks in the tests: sd_scripts or musubi.
        widest: arguments under which every recorded layer is trained.
        times: what the denoiser is told at noise, at a quarter of the way from the clean end, and at the clean end.
        diffusers: `diffusers' layers = the trainer's`, of every layer that can be trained (of UNets, whose other layers
            are compared with the recorded names, the normalisation layers), below the prefixes of the line before in
            brackets; a name alone is the same in both. "" = diffusers has no such class, or the names are its own.
        conversion: diffusers' function that converts the trainer's checkpoint (with an underscore: an adapter).
        norm_tensor: what the trainer's RMSNorms call their weight.
        swaps: last names that stand in both classes for different layers.
        shrink: what the sizes of the stand-in are divided by.
        bystanders: class names that are recorded, too, and are no containers.
    """

    counts: tuple[int, int, int]
    anchor: Anchor
    forward: str
    norms: str
    source: str = ""
    host: str = "sd_scripts"
    widest: dict[str, str] = field(default_factory=dict)
    times: tuple[float, float, float] = (1000.0, 250.0, 0.0)
    diffusers: str = ""
    conversion: str = ""
    norm_tensor: str = "weight"
    swaps: frozenset[str] = frozenset()
    shrink: int = 64
    bystanders: frozenset[str] = frozenset()

    @property
    def trainers_norms(self) -> dict[str, bool]:
        """Normalisation layer -> whether it has a weight."""
        return {line.removesuffix(" -"): not line.endswith(" -") for line in filter(None, self.norms.split("\n"))}

    @property
    def pairs(self) -> dict[tuple[str, ...], str]:
        """diffusers' layers, in the order of the rows -> the trainer's dotted name."""
        found, own_prefix, prefix = {}, "", ""
        for line in filter(None, map(str.strip, self.diffusers.splitlines())):
            if line.startswith("["):
                own_prefix, _, prefix = line[1:-1].partition(" = ")
                continue
            own, _, trainer = line.partition(" = ")
            names = tuple(own_prefix + name for name in own.split(" + "))
            assert names not in found, names
            found[names] = prefix + (trainer or own)
        return found


def data_of(arch: str) -> ArchData:
    """The entry of an architecture.

    Raises:
        ValueError: it has none, with what to write.
    """
    if arch not in DATA:
        raise ValueError(
            f"{arch} has no test data: write DATA[{arch!r}] in tests/registry_archs.py (ArchData says what of), then "
            f"run `python scripts/names.py {arch}`"
        )
    return DATA[arch]


def is_unet(arch: str) -> bool:
    return SPECS[arch].denoiser.diffusers == "unet"


def release_of(arch: str) -> str:
    """The model that the tests look at, in diffusers' class if it has one."""
    return SPECS[arch].releases[0].name


RELEASED = [name for name, spec in SPECS.items() if spec.releases]
IN_DIFFUSERS = [name for name in RELEASED if SPECS[name].releases[0].denoiser]

_FLUX_NORMS = """
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
"""
_HUNYUAN_NORMS = """
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
"""
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
_H3_BLOCK = """
attn.to_q + attn.to_k + attn.to_v = attn.qkv_proj
attn.to_out.0 = attn.out_proj
ff.net.0.proj = mlp.fc1
ff.net.2 = mlp.fc2
norm1
norm2
attn.norm_q = attn.q_norm
attn.norm_k = attn.k_norm
"""
_HUNYUAN_PAIRS = f"""
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
"""

DATA: dict[str, ArchData] = {
    "sd": ArchData(
        source="the trainer's own model, with conv_dim",
        counts=(192, 278, 72),
        widest={"conv_dim": "2"},
        anchor=Anchor(
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
            320,
            768,
        ),
        forward="sample timestep",
        shrink=32,
        norms="""
down_blocks.0.attentions.0.norm
down_blocks.0.attentions.0.transformer_blocks.0.norm1
down_blocks.0.attentions.0.transformer_blocks.0.norm2
down_blocks.0.attentions.0.transformer_blocks.0.norm3
down_blocks.0.resnets.0.norm1
down_blocks.0.resnets.0.norm2
""",
        diffusers="""
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
    ),
    "sdxl": ArchData(
        source="the trainer's own model, with conv_dim",
        counts=(722, 788, 264),
        widest={"conv_dim": "2"},
        anchor=Anchor(
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            640,
            640,
        ),
        forward="x timesteps",
        norms="""
input_blocks.1.0.in_layers.0
input_blocks.1.0.out_layers.0
input_blocks.4.1.norm
input_blocks.4.1.transformer_blocks.0.norm1
input_blocks.4.1.transformer_blocks.0.norm2
input_blocks.4.1.transformer_blocks.0.norm3
""",
        diffusers="""
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
    ),
    "flux": ArchData(
        source="the trainer's own model, with in_dims and train_t5xxl",
        host="musubi",
        counts=(304, 312, 240),
        widest={"in_dims": "[2,2,2,2,2]", "train_t5xxl": "True"},
        anchor=Anchor("double_blocks.0.img_attn.qkv", "lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072),
        forward="img img_ids txt txt_ids timesteps",
        times=(1.0, 0.25, 0.0),
        conversion="convert_flux_transformer_checkpoint_to_diffusers",
        norm_tensor="scale",
        norms=_FLUX_NORMS,
        diffusers=f"""
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
    ),
    "chroma": ArchData(
        source="the trainer's own model, with in_dims and train_t5xxl",
        counts=(228, 230, 168),
        widest={"in_dims": "[2,0,0,0,2]", "train_t5xxl": "true"},
        anchor=Anchor("double_blocks.0.txt_mlp.0", "lora_unet_double_blocks_0_txt_mlp_0", 12288, 3072),
        forward="img img_ids txt txt_ids timesteps",
        times=(1.0, 0.25, 0.0),
        conversion="convert_chroma_transformer_checkpoint_to_diffusers",
        norm_tensor="scale",
        bystanders=frozenset({"Approximator"}),
        norms=_FLUX_NORMS,
        diffusers=f"""
{_FLUX_BLOCKS}
[]
x_embedder = img_in
context_embedder = txt_in
""",
    ),
    "flux_2": ArchData(
        source="the trainer's own model (dev)",
        host="musubi",
        counts=(160, 160, 0),
        anchor=Anchor("double_blocks.0.img_attn.qkv", "lora_unet_double_blocks_0_img_attn_qkv", 18432, 6144),
        forward="x x_ids timesteps",
        times=(1.0, 0.25, 0.0),
        conversion="convert_flux2_transformer_checkpoint_to_diffusers",
        norm_tensor="scale",
        norms=_FLUX_NORMS,
        diffusers=f"""
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
    ),
    "sd3": ArchData(
        source="the trainer's own model (3.5 medium), with emb_dims and train_t5xxl",
        counts=(263, 271, 432),
        widest={"emb_dims": "2,2,2,2,2,2", "train_t5xxl": "1"},
        anchor=Anchor("joint_blocks.0.x_block.attn.qkv", "lora_unet_joint_blocks_0_x_block_attn_qkv", 4608, 1536),
        forward="x t",
        conversion="convert_sd3_transformer_checkpoint_to_diffusers",
        bystanders=frozenset({"PatchEmbed", "TimestepEmbedding"}),
        norms="""
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
        diffusers="""
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
attn.norm_q = x_block.attn.ln_q
attn.norm_k = x_block.attn.ln_k
attn.norm_added_q = context_block.attn.ln_q
attn.norm_added_k = context_block.attn.ln_k
attn2.norm_q = x_block.attn2.ln_q
attn2.norm_k = x_block.attn2.ln_k
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
    ),
    "lumina": ArchData(
        source="the trainer's own model, with embedder_dims",
        counts=(180, 184, 182),
        widest={"embedder_dims": "[2, 2, 2]"},
        anchor=Anchor("layers.0.attention.qkv", "lora_unet_layers_0_attention_qkv", 3840, 2304),
        forward="x t",
        times=(0.0, 0.75, 1.0),
        conversion="convert_lumina2_to_diffusers",
        norms="""
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
        diffusers=f"""
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
    ),
    "hunyuan_image": ArchData(
        source="the trainer's own model",
        counts=(320, 320, 0),
        anchor=Anchor("single_blocks.0.linear1", "lora_unet_single_blocks_0_linear1", 25088, 3584),
        forward="hidden_states timestep",
        bystanders=frozenset({"FinalLayer"}),
        norms=_HUNYUAN_NORMS,
        diffusers=_HUNYUAN_PAIRS,
    ),
    "hunyuan_video": ArchData(
        source="the trainer's own model, with include_patterns=['.*']",
        host="musubi",
        counts=(240, 320, 0),
        widest={"exclude_mod": "False"},
        anchor=Anchor("double_blocks.0.img_attn_qkv", "lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072),
        forward="x t",
        conversion="convert_hunyuan_video_transformer_to_diffusers",
        norms=_HUNYUAN_NORMS,
        diffusers=_HUNYUAN_PAIRS,
    ),
    "hv_1_5": ArchData(
        source="the trainer's own model",
        host="musubi",
        counts=(756, 756, 0),
        anchor=Anchor("double_blocks.0.img_attn_q", "lora_unet_double_blocks_0_img_attn_q", 2048, 2048),
        forward="hidden_states timestep",
        norms="""
double_blocks.0.img_norm1 -
double_blocks.0.img_norm2 -
double_blocks.0.txt_norm1 -
double_blocks.0.txt_norm2 -
double_blocks.0.img_attn_q_norm
double_blocks.0.img_attn_k_norm
double_blocks.0.txt_attn_q_norm
double_blocks.0.txt_attn_k_norm
""",
        diffusers=f"""
{_HUNYUAN_DOUBLE}
attn.to_q = img_attn_q
attn.to_k = img_attn_k
attn.to_v = img_attn_v
attn.add_q_proj = txt_attn_q
attn.add_k_proj = txt_attn_k
attn.add_v_proj = txt_attn_v
""",
    ),
    "framepack": ArchData(
        source="the trainer's own model, with include_patterns=['.*']",
        host="musubi",
        counts=(440, 520, 0),
        widest={"exclude_mod": "False"},
        anchor=Anchor("transformer_blocks.0.ff.net.2", "lora_unet_transformer_blocks_0_ff_net_2", 3072, 12288),
        forward="hidden_states timestep",
        norms="""
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
        diffusers="""
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
    ),
    "anima": ArchData(
        source="the trainer's own model, with train_llm_adapter and include_patterns=['.*']",
        counts=(280, 514, 196),
        widest={"train_llm_adapter": "True", "include_patterns": "['.*']"},
        anchor=Anchor("blocks.0.cross_attn.k_proj", "lora_unet_blocks_0_cross_attn_k_proj", 2048, 1024),
        forward="x timesteps",
        times=(1.0, 0.25, 0.0),
        conversion="convert_cosmos_transformer_checkpoint_to_diffusers",
        norms="""
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
        diffusers="""
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
    ),
    "wan": ArchData(
        source="the trainer's own model (2.1 image to video, 14B)",
        host="musubi",
        counts=(480, 480, 0),
        anchor=Anchor("blocks.0.ffn.0", "lora_unet_blocks_0_ffn_0", 13824, 5120),
        forward="x t",
        conversion="convert_wan_transformer_to_diffusers",
        swaps=frozenset({"norm2", "norm3"}),
        norms="""
blocks.0.norm1 -
blocks.0.norm2 -
blocks.0.norm3
blocks.0.self_attn.norm_q
blocks.0.self_attn.norm_k
blocks.0.cross_attn.norm_q
blocks.0.cross_attn.norm_k
blocks.0.cross_attn.norm_k_img
""",
        diffusers="""
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
    ),
    "qwen_image": ArchData(
        source="the trainer's own model; its module trains the modulation layers, too",
        host="musubi",
        counts=(720, 840, 0),
        widest={"exclude_mod": "False"},
        anchor=Anchor("transformer_blocks.0.attn.to_q", "lora_unet_transformer_blocks_0_attn_to_q", 3072, 3072),
        forward="hidden_states timestep",
        times=(1.0, 0.25, 0.0),
        norms="""
transformer_blocks.0.img_norm1 -
transformer_blocks.0.img_norm2 -
transformer_blocks.0.txt_norm1 -
transformer_blocks.0.txt_norm2 -
transformer_blocks.0.attn.norm_q
transformer_blocks.0.attn.norm_k
transformer_blocks.0.attn.norm_added_q
transformer_blocks.0.attn.norm_added_k
""",
        diffusers="""
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
    ),
    "mage_flow": ArchData(
        source="a stand-in with the names and sizes of the trainer's own model",
        host="musubi",
        counts=(144, 168, 0),
        widest={"exclude_mod": "False"},
        anchor=Anchor(
            "transformer_blocks.0.img_mlp.net.0.proj",
            "lora_unet_transformer_blocks_0_img_mlp_net_0_proj",
            12288,
            3072,
        ),
        forward="packed.timesteps",
        times=(1.0, 0.25, 0.0),
        norms="""
transformer_blocks.0.img_norm1 -
transformer_blocks.0.img_norm2 -
transformer_blocks.0.txt_norm1 -
transformer_blocks.0.txt_norm2 -
transformer_blocks.0.attn.norm_q
transformer_blocks.0.attn.norm_k
transformer_blocks.0.attn.norm_added_q
transformer_blocks.0.attn.norm_added_k
""",
    ),
    "lens": ArchData(
        source="the trainer's own model",
        host="musubi",
        counts=(480, 576, 0),
        widest={"exclude_mod": "False"},
        anchor=Anchor("transformer_blocks.0.attn.img_qkv", "lora_unet_transformer_blocks_0_attn_img_qkv", 4608, 1536),
        forward="hidden_states encoder_hidden_states encoder_hidden_states_mask timestep",
        times=(1.0, 0.25, 0.0),
        norms="""
transformer_blocks.0.img_norm1
transformer_blocks.0.img_norm2
transformer_blocks.0.txt_norm1
transformer_blocks.0.txt_norm2
transformer_blocks.0.attn.norm_q
transformer_blocks.0.attn.norm_k
transformer_blocks.0.attn.norm_added_q
transformer_blocks.0.attn.norm_added_k
""",
    ),
    "zimage": ArchData(
        source="the trainer's own model, with include_patterns=['.*']",
        host="musubi",
        counts=(210, 270, 0),
        widest={"exclude_mod": "False", "include_refiner": "True"},
        anchor=Anchor("layers.0.feed_forward.w1", "lora_unet_layers_0_feed_forward_w1", 10240, 3840),
        forward="x t",
        times=(0.0, 0.75, 1.0),
        norms="""
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
        diffusers=f"""
[layers.0. = layers.0.]
{_Z_BLOCK}
[noise_refiner.0. = noise_refiner.0.]
{_Z_BLOCK}
[context_refiner.0. = context_refiner.0.]
{_Z_BLOCK.replace("adaLN_modulation.0", "")}
""",
    ),
    "ernie_image": ArchData(
        source="the trainer's own model",
        host="musubi",
        counts=(254, 254, 0),
        anchor=Anchor("layers.0.mlp.gate_proj", "lora_unet_layers_0_mlp_gate_proj", 12288, 4096),
        forward="hidden_states timestep",
        norms="""
layers.0.adaLN_sa_ln
layers.0.adaLN_mlp_ln
layers.0.self_attention.norm_q
layers.0.self_attention.norm_k
final_norm.norm -
""",
        diffusers="""
[layers.0. = layers.0.]
adaLN_sa_ln
self_attention.to_q
self_attention.to_k
self_attention.to_v
self_attention.to_out.0
self_attention.norm_q
self_attention.norm_k
adaLN_mlp_ln
mlp.gate_proj
mlp.up_proj
mlp.linear_fc2
[]
adaLN_modulation.1
final_norm.norm
final_norm.linear
""",
    ),
    "kandinsky": ArchData(
        source="the trainer's own model (pro, video), with include_patterns=['.*']",
        host="musubi",
        counts=(624, 688, 0),
        widest={"exclude_mod": "False"},
        anchor=Anchor(
            "visual_transformer_blocks.0.cross_attention.to_key",
            "lora_unet_visual_transformer_blocks_0_cross_attention_to_key",
            4096,
            4096,
        ),
        forward="x text_embed pooled_text_embed time",
        norms="""
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
        diffusers="""
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
    ),
    "krea2": ArchData(
        source="the trainer's own model",
        host="musubi",
        counts=(264, 264, 0),
        anchor=Anchor("blocks.0.attn.wk", "lora_unet_blocks_0_attn_wk", 1536, 6144),
        forward="img context t",
        times=(1.0, 0.25, 0.0),
        conversion="convert_krea2_transformer_checkpoint_to_diffusers",
        norm_tensor="scale",
        norms="""
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
        diffusers=f"""
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
    ),
    "qwen_image_21": ArchData(
        host="musubi",
        counts=(224, 224, 0),
        anchor=Anchor(
            "transformer_blocks.0.img_mlp.gate_layer",
            "lora_unet_transformer_blocks_0_img_mlp_gate_layer",
            12288,
            4096,
        ),
        forward="hidden_states encoder_hidden_states timestep",
        times=(1.0, 0.25, 0.0),
        norms="""
transformer_blocks.0.img_norm1 -
transformer_blocks.0.img_norm2 -
transformer_blocks.0.attn.norm_q
transformer_blocks.0.attn.norm_k
""",
        diffusers="""
[transformer_blocks.0. = transformer_blocks.0.]
attn.to_q
attn.to_k
attn.to_v
attn.to_out.0
img_mlp.proj
img_mlp.gate_layer
img_mlp.out
img_norm1
img_norm2
attn.norm_q
attn.norm_k
""",
    ),
    "minimax_h3": ArchData(
        source="the trainer's own model, with include_refiner",
        host="musubi",
        counts=(200, 258, 0),
        widest={"exclude_mod": "False", "include_refiner": "True"},
        anchor=Anchor("blocks.0.attn.qkv_proj", "lora_unet_blocks_0_attn_qkv_proj", 21504, 5376),
        forward="video_latents audio_latents text_hidden_states text_token_tags layout model_t_video",
        times=(0.0, 0.75, 1.0),
        conversion="convert_minimax_h3_transformer_checkpoint_to_diffusers",
        norms="""
blocks.0.norm1
blocks.0.norm2
blocks.0.attn.q_norm
blocks.0.attn.k_norm
token_refiner.blocks.0.norm1
token_refiner.blocks.0.norm2
token_refiner.blocks.0.attn.q_norm
token_refiner.blocks.0.attn.k_norm
""",
        diffusers=f"""
[transformer_blocks.0. = blocks.0.]
{_H3_BLOCK}
adaln_proj.linear
[token_refiner.refiner_blocks.0. = token_refiner.blocks.0.]
{_H3_BLOCK}
""",
    ),
    "ideogram4": ArchData(
        source="the trainer's own model, with include_patterns=['.*']",
        host="musubi",
        counts=(170, 204, 0),
        widest={"exclude_mod": "False"},
        anchor=Anchor("layers.0.attention.qkv", "lora_unet_layers_0_attention_qkv", 13824, 4608),
        forward="llm_features x t",
        times=(0.0, 0.75, 1.0),
        conversion="_convert_non_diffusers_ideogram4_lora_to_diffusers",
        norms="""
layers.0.attention.norm_q
layers.0.attention.norm_k
layers.0.attention_norm1
layers.0.attention_norm2
layers.0.ffn_norm1
layers.0.ffn_norm2
""",
        diffusers="""
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
    ),
    "hidream_o1": ArchData(
        source="the trainer's own model (sizes of Qwen3-VL 8B), task i2i, with conv_dim",
        host="musubi",
        counts=(255, 372, 0),
        widest={"conv_dim": "2"},
        anchor=Anchor(
            "model.language_model.layers.0.self_attn.q_proj",
            "lora_unet_model_language_model_layers_0_self_attn_q_proj",
            4096,
            4096,
        ),
        forward="input_ids vinputs timestep",
        times=(0.0, 0.75, 1.0),
        bystanders=frozenset({"TimestepEmbedder"}),
        norms="""
model.language_model.layers.0.input_layernorm
model.language_model.layers.0.post_attention_layernorm
model.language_model.layers.0.self_attn.q_norm
model.language_model.layers.0.self_attn.k_norm
model.visual.blocks.0.norm1
model.visual.blocks.0.norm2
""",
    ),
    "ace_step": ArchData(
        source="the original decoder, with the names which LyCORIS gives it there "
        "(its wrapped layers outside the blocks apart)",
        counts=(192, 264, 0),
        widest={"train_mlp": "True"},
        anchor=Anchor("layers.0.self_attn.k_proj", "lycoris_layers_0_self_attn_k_proj", 1024, 2048),
        forward="hidden_states timestep",
        times=(1.0, 0.25, 0.0),
        conversion="_convert_non_diffusers_ace_step_lora_to_diffusers",
        norms="""
layers.0.self_attn_norm
layers.0.cross_attn_norm
layers.0.mlp_norm
layers.0.self_attn.q_norm
layers.0.self_attn.k_norm
layers.0.cross_attn.q_norm
layers.0.cross_attn.k_norm
""",
        diffusers="""
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
    ),
    "ltx2": ArchData(
        source="the trainer's own model (2.3) with its connectors, with lora_target_preset=full and connector_lora",
        host="musubi",
        counts=(1152, 1744, 0),
        widest={"lora_target_preset": "full", "connector_lora": "True"},
        anchor=Anchor(
            "model.transformer_blocks.0.audio_to_video_attn.to_q",
            "lora_unet_model_transformer_blocks_0_audio_to_video_attn_to_q",
            2048,
            4096,
        ),
        forward="x timestep",
        times=(1.0, 0.25, 0.0),
        norms="""
model.transformer_blocks.0.attn1.q_norm
model.transformer_blocks.0.attn1.k_norm
model.transformer_blocks.0.attn2.q_norm
model.transformer_blocks.0.attn2.k_norm
model.transformer_blocks.0.audio_attn1.q_norm
model.transformer_blocks.0.audio_attn1.k_norm
model.transformer_blocks.0.audio_attn2.q_norm
model.transformer_blocks.0.audio_attn2.k_norm
model.transformer_blocks.0.audio_to_video_attn.q_norm
model.transformer_blocks.0.audio_to_video_attn.k_norm
model.transformer_blocks.0.video_to_audio_attn.q_norm
model.transformer_blocks.0.video_to_audio_attn.k_norm
embeddings_connector.transformer_1d_blocks.0.attn1.q_norm
embeddings_connector.transformer_1d_blocks.0.attn1.k_norm
audio_embeddings_connector.transformer_1d_blocks.0.attn1.q_norm
audio_embeddings_connector.transformer_1d_blocks.0.attn1.k_norm
""",
        diffusers="""
[transformer_blocks.0. = model.transformer_blocks.0.]
attn1.to_q
attn1.to_k
attn1.to_v
attn1.to_out.0
attn1.to_gate_logits
attn1.norm_q = attn1.q_norm
attn1.norm_k = attn1.k_norm
attn2.to_q
attn2.to_k
attn2.to_v
attn2.to_out.0
attn2.to_gate_logits
attn2.norm_q = attn2.q_norm
attn2.norm_k = attn2.k_norm
audio_attn1.to_q
audio_attn1.to_k
audio_attn1.to_v
audio_attn1.to_out.0
audio_attn1.to_gate_logits
audio_attn1.norm_q = audio_attn1.q_norm
audio_attn1.norm_k = audio_attn1.k_norm
audio_attn2.to_q
audio_attn2.to_k
audio_attn2.to_v
audio_attn2.to_out.0
audio_attn2.to_gate_logits
audio_attn2.norm_q = audio_attn2.q_norm
audio_attn2.norm_k = audio_attn2.k_norm
audio_to_video_attn.to_q
audio_to_video_attn.to_k
audio_to_video_attn.to_v
audio_to_video_attn.to_out.0
audio_to_video_attn.to_gate_logits
audio_to_video_attn.norm_q = audio_to_video_attn.q_norm
audio_to_video_attn.norm_k = audio_to_video_attn.k_norm
video_to_audio_attn.to_q
video_to_audio_attn.to_k
video_to_audio_attn.to_v
video_to_audio_attn.to_out.0
video_to_audio_attn.to_gate_logits
video_to_audio_attn.norm_q = video_to_audio_attn.q_norm
video_to_audio_attn.norm_k = video_to_audio_attn.k_norm
ff.net.0.proj
ff.net.2
audio_ff.net.0.proj
audio_ff.net.2
norm1
norm2
norm3
audio_norm1
audio_norm2
audio_norm3
audio_to_video_norm
video_to_audio_norm
[connectors.video_connector.transformer_blocks.0. = embeddings_connector.transformer_1d_blocks.0.]
attn1.to_q
attn1.to_k
attn1.to_v
attn1.to_out.0
attn1.to_gate_logits
attn1.norm_q = attn1.q_norm
attn1.norm_k = attn1.k_norm
ff.net.0.proj
ff.net.2
[connectors.audio_connector.transformer_blocks.0. = audio_embeddings_connector.transformer_1d_blocks.0.]
attn1.to_q
attn1.to_k
attn1.to_v
attn1.to_out.0
attn1.to_gate_logits
attn1.norm_q = attn1.q_norm
attn1.norm_k = attn1.k_norm
ff.net.0.proj
ff.net.2
""",
    ),
    "ltx_video": ArchData(
        counts=(280, 280, 0),
        anchor=Anchor("transformer_blocks.0.attn2.to_k", "lora_unet_transformer_blocks_0_attn2_to_k", 2048, 2048),
        forward="hidden_states encoder_hidden_states timestep",
        norms="""
transformer_blocks.0.norm1 -
transformer_blocks.0.norm2 -
transformer_blocks.0.attn1.norm_q
transformer_blocks.0.attn1.norm_k
transformer_blocks.0.attn2.norm_q
transformer_blocks.0.attn2.norm_k
""",
        diffusers="""
[transformer_blocks.0. = transformer_blocks.0.]
attn1.to_q
attn1.to_k
attn1.to_v
attn1.to_out.0
attn2.to_q
attn2.to_k
attn2.to_v
attn2.to_out.0
ff.net.0.proj
ff.net.2
norm1
norm2
attn1.norm_q
attn1.norm_k
attn2.norm_q
attn2.norm_k
""",
    ),
}
