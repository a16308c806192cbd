"""Stand-ins for models of which no library has a class: Mage-Flow and Lens, where picture and text have layers of their
own and look at both. Their modules have the trainer's names, in its order, and by default the sizes of the releases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.normalization import AdaLayerNormContinuous, RMSNorm
from torch import Tensor, nn


def _fill(module: nn.Module, **layers: nn.Module) -> None:
    nn.Module.__init__(module)
    for name, layer in layers.items():
        module.add_module(name, layer)


def _linears(names: str, *sizes: int, bias: bool = True) -> dict[str, nn.Module]:
    return {name: nn.Linear(*sizes, bias=bias) for name in names.split()}


# -- what both do


class _Attention(nn.Module):
    heads: int

    def projections(self, image: Tensor, text: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Queries, keys and values of both."""
        raise NotImplementedError

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        of_image, of_text = (
            [x.unflatten(-1, (self.heads, -1)) for x in found] for found in self.projections(image, text)
        )
        of_image[:2] = self.norm_q(of_image[0]), self.norm_k(of_image[1])
        of_text[:2] = self.norm_added_q(of_text[0]), self.norm_added_k(of_text[1])
        q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(of_image, of_text, strict=True))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = image.shape[1]
        return self.to_out[1](self.to_out[0](out[:, :tokens])), self.to_add_out(out[:, tokens:])


class _Block(nn.Module):
    def forward(self, image: Tensor, text: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        of_image, of_text = (mod(time)[:, None].chunk(6, -1) for mod in (self.img_mod, self.txt_mod))
        looked = self.attn(_moved(self.img_norm1(image), of_image), _moved(self.txt_norm1(text), of_text))
        image, text = image + of_image[2] * looked[0], text + of_text[2] * looked[1]
        image = image + of_image[5] * self.img_mlp(_moved(self.img_norm2(image), of_image[3:]))
        return image, text + of_text[5] * self.txt_mlp(_moved(self.txt_norm2(text), of_text[3:]))


def _moved(x: Tensor, modulation: Sequence[Tensor]) -> Tensor:
    return x * (1 + modulation[1]) + modulation[0]


def _modulation(width: int) -> nn.Module:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))


class _Time(nn.Module):
    def __init__(self, width: int) -> None:
        time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
        _fill(self, time_proj=time_proj, timestep_embedder=TimestepEmbedding(256, width))

    def forward(self, time: Tensor) -> Tensor:
        return self.timestep_embedder(self.time_proj(time))


class _Model(nn.Module):
    def through(self, image: Tensor, text: Tensor, time: Tensor) -> Tensor:
        image, text, embedding = self.img_in(image), self.txt_in(text), self.time_text_embed(time)
        for block in self.transformer_blocks:
            image, text = block(image, text, embedding)
        return self.proj_out(self.norm_out(image, embedding))


def _end(width: int, block: type, heads: int, depth: int) -> dict[str, nn.Module]:
    return {
        "transformer_blocks": nn.ModuleList([block(width, heads) for _ in range(depth)]),
        "norm_out": AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6),
        "proj_out": nn.Linear(width, 128),
    }


# -- Mage-Flow


class Attention(_Attention):
    def __init__(self, width: int, heads: int) -> None:
        def norms(*names: str) -> dict[str, nn.Module]:
            return {name: RMSNorm(width // heads, eps=1e-6) for name in names}

        _fill(
            self,
            **norms("norm_q", "norm_k"),
            **_linears("to_q to_k to_v add_q_proj add_k_proj add_v_proj", width, width),
            **norms("norm_added_q", "norm_added_k"),
            to_out=nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)]),
            to_add_out=nn.Linear(width, width),
        )
        self.heads = heads

    def projections(self, image: Tensor, text: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        own = self.to_q(image), self.to_k(image), self.to_v(image)
        return own, (self.add_q_proj(text), self.add_k_proj(text), self.add_v_proj(text))


class MageFlowTransformerBlock(_Block):
    def __init__(self, width: int, heads: int) -> None:
        def norm() -> nn.Module:
            return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

        def mlp() -> nn.Module:
            return FeedForward(width, width, activation_fn="gelu-approximate")

        image = {"img_mod": _modulation(width), "img_norm1": norm(), "attn": Attention(width, heads)}
        text = {"txt_mod": _modulation(width), "txt_norm1": norm(), "txt_norm2": norm(), "txt_mlp": mlp()}
        _fill(self, **image, img_norm2=norm(), img_mlp=mlp(), **text)


class MageFlowEmbedRope(nn.Module):
    pass


class MageFlowTimestepProjEmbeddings(_Time):
    pass


class MageFlow(_Model):
    def __init__(self, width: int = 3072, heads: int = 24, depth: int = 12, text_width: int = 2560) -> None:
        _fill(
            self,
            pos_embed=MageFlowEmbedRope(),
            img_in=nn.Linear(128, width),
            txt_norm=RMSNorm(text_width, eps=1e-6),
            txt_in=nn.Linear(text_width, width),
            time_text_embed=MageFlowTimestepProjEmbeddings(width),
            **_end(width, MageFlowTransformerBlock, heads, depth),
        )

    def forward(self, packed: Any) -> Tensor:
        return self.through(packed.image_tokens, self.txt_norm(packed.text_tokens), packed.timesteps)


# -- Lens


class LensJointAttention(_Attention):
    def __init__(self, width: int, heads: int) -> None:
        names = "norm_q norm_k norm_added_q norm_added_k".split()
        _fill(
            self,
            **{name: RMSNorm(width // heads, eps=1e-6) for name in names},
            **_linears("img_qkv txt_qkv", width, 3 * width),
            to_out=nn.ModuleList([nn.Linear(width, width), nn.Identity()]),
            to_add_out=nn.Linear(width, width),
        )
        self.heads = heads

    def projections(self, image: Tensor, text: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return self.img_qkv(image).chunk(3, -1), self.txt_qkv(text).chunk(3, -1)


class GateMLP(nn.Module):
    def __init__(self, width: int) -> None:
        inner = int(width / 3 * 8)
        w1, w2, w3 = (nn.Linear(*sizes, bias=False) for sizes in ((width, inner), (inner, width), (width, inner)))
        _fill(self, w1=w1, w2=w2, w3=w3)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LensTransformerBlock(_Block):
    def __init__(self, width: int, heads: int) -> None:
        layers: dict[str, nn.Module] = {"attn": LensJointAttention(width, heads)}
        for stream in ("img", "txt"):
            layers[f"{stream}_mod"] = _modulation(width)
            layers |= {f"{stream}_norm{i}": RMSNorm(width, eps=1e-6) for i in (1, 2)}
            layers[f"{stream}_mlp"] = GateMLP(width)
        _fill(self, **layers)


class LensEmbedRope(nn.Module):
    pass


class LensTimestepProjEmbeddings(_Time):
    pass


class LensTransformer2DModel(_Model):
    def __init__(self, width: int = 1536, heads: int = 24, depth: int = 48, text_width: int = 2880) -> None:
        _fill(
            self,
            pos_embed=LensEmbedRope(),
            time_text_embed=LensTimestepProjEmbeddings(width),
            txt_norm=nn.ModuleList([RMSNorm(text_width, eps=1e-5) for _ in range(4)]),
            txt_in=nn.Linear(4 * text_width, width),
            img_in=nn.Linear(128, width),
            **_end(width, LensTransformerBlock, heads, depth),
        )

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Sequence[Tensor], timestep: Tensor) -> Tensor:
        text = [norm(x) for norm, x in zip(self.txt_norm, encoder_hidden_states, strict=True)]
        return self.through(hidden_states, torch.cat(text, -1), timestep)


# Release -> its class.
STAND_INS: dict[str, Callable[..., nn.Module]] = {"mage_flow": MageFlow, "lens": LensTransformer2DModel}
