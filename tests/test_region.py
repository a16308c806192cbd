"""Regional prompts against the formula written out picture by picture and sub-prompt by sub-prompt, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_parts import randomise, sd_unet, sdxl_unet, text_encoder
from torch import Tensor, nn
from toy_models import toy

import networks.lora
import networks.lora_flux
from networks.layers.region import Generation, Region

KINDS: dict[str, dict[str, str]] = {
    "lora": {},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr"},
    "dora": {"use_dora": "True"},
    "dora on the input": {"use_dora": "True", "wd_on_output": "False"},
}
HEIGHT, WIDTH, CHANNELS, TEXT = 6, 8, 4, 5


class Attention(nn.Module):
    """Single-headed cross attention, called as the trainers' is."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(CHANNELS, 8), nn.Linear(TEXT, 8)
        self.to_v, self.to_out = nn.Linear(TEXT, 8), nn.ModuleList([nn.Linear(8, CHANNELS)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(text), self.to_v(text)
        return self.to_out[0](torch.softmax(q @ k.transpose(1, 2), -1) @ v)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn2 = Attention()


class Transformer2DModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.time_emb_proj = nn.Linear(3, CHANNELS)
        self.emb_layers = nn.ModuleList([nn.Identity(), nn.Linear(3, CHANNELS)])
        self.transformer_blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x = self.proj_in(x) + (self.time_emb_proj(time) + self.emb_layers[1](time))[:, :, None, None]
        return self.transformer_blocks[0].attn2(x.flatten(2).transpose(1, 2), text)


class UNet2DConditionModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Transformer2DModel()

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return self.block(x, time, text)


def masks(count: int) -> list[Tensor]:
    """Overlapping soft masks with a strip that none covers."""
    across = torch.linspace(0, 1, 8 * WIDTH).repeat(8 * HEIGHT, 1)
    soft = [(1 - 2 * across).clamp(0, 1), (2 * across - 0.5).clamp(0, 0.75), across * 0]
    return [m * (across < 0.9) for m in soft][:count]


def resized(mask: Tensor) -> Tensor:
    return F.interpolate(mask[None, None], (HEIGHT, WIDTH), mode="bilinear")[0, 0].double()


def expected(unet: Any, deltas: list[dict[str, Tensor]], x: Any, time: Any, texts: list[Tensor], areas: Any) -> Tensor:
    """One picture [C, H, W], one time vector; one text [T, TEXT] per sub-prompt, or a single one for unconditional."""
    block, attn = unet.block, unet.block.transformer_blocks[0].attn2
    at = [area.flatten()[:, None] for area in areas]  # [H*W, 1]
    count = len(texts)

    def masked(name: str, layer: nn.Module, value: Tensor) -> Tensor:
        """[H*W, features]"""
        weight = layer.weight.flatten(1)
        return value @ weight.T + layer.bias + sum(m * (value @ d[name].T) for m, d in zip(at, deltas, strict=True))

    flat = masked("proj_in", block.proj_in, x.flatten(1).T)
    plain = block.time_emb_proj.weight + sum(d["time_emb_proj"] for d in deltas)
    mean = block.emb_layers[1].weight + sum(d["emb_layers_1"] for d in deltas) / PROMPTS
    flat = flat + time @ plain.T + block.time_emb_proj.bias + time @ mean.T + block.emb_layers[1].bias
    q = masked("to_q", attn.to_q, flat)
    out, conditional = attn.to_out[0], count == PROMPTS
    base, updates = [], []
    for s, text in enumerate(texts):
        own = deltas[s] if conditional and s < len(deltas) else None
        k = text @ (attn.to_k.weight + (own["to_k"] if own else 0)).T + attn.to_k.bias
        v = text @ (attn.to_v.weight + (own["to_v"] if own else 0)).T + attn.to_v.bias
        seen = torch.softmax(q @ k.T, -1) @ v
        base.append(seen @ out.weight.T + out.bias)
        updates.append(seen @ own["to_out_0"].T if own else torch.zeros_like(base[-1]))
    if not conditional:
        return base[0]
    total = sum(at) + 1e-4
    weighed = list(zip(at, base, updates, strict=False))  # sub-prompts without a network weigh nothing
    return sum(m * b for m, b, _ in weighed) / total + sum(m * u for m, _, u in weighed)


PROMPTS, PICTURES = 3, 2


@pytest.mark.parametrize("groups", [1, 2, 3], ids=["without guidance", "negative prompt", "negative scale"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_formula(kind: str, groups: int) -> None:
    torch.manual_seed(0)
    unet, nets = UNet2DConditionModel().double(), []
    # DoRA scales what is below it, another network included: alone, its update is a matter of the weights only.
    for i, multiplier in enumerate((0.7,) if "dora" in kind else (0.7, -0.4)):
        network = networks.lora.create_network(multiplier, 2, 1, None, None, unet, **KINDS[kind])
        network.apply_to(None, unet, False, True)
        randomise(network.double())
        for p in network.parameters():
            p.data.add_(0.3 * (i + 1))
        nets.append(network)
    areas = masks(len(nets))
    for i, network in enumerate(nets):
        network.set_region(i, i == len(nets) - 1, areas[i])
    shared: dict[Any, Any] = {}
    for network in nets:
        network.set_current_generation(PICTURES, PROMPTS, 8 * WIDTH, 8 * HEIGHT, shared, *[None] * (groups - 1 > 1))
    x = torch.randn(groups * PICTURES, CHANNELS, HEIGHT, WIDTH).double()
    time = torch.randn(groups * PICTURES, 3).double()
    texts = torch.randn((groups - 1) * PICTURES + PICTURES * PROMPTS, 4, TEXT).double()
    found = unet(x, time, texts)
    deltas = [
        {
            layer.lora_name.removeprefix("lora_unet_block_").removeprefix("transformer_blocks_0_attn2_"):
            (layer.new_weight(layer.base.weight) - layer.base.weight).flatten(1)
            for layer in network.adapted_layers
        }
        for network in nets
    ]  # fmt: skip
    before = PICTURES if groups > 1 else 0
    wanted = []
    for row in range(groups * PICTURES):
        picture, group = row % PICTURES, row // PICTURES
        first = before + PROMPTS * picture
        if groups > 1 and group == 0:
            own = [texts[picture]]
        elif group == 2:
            own = [texts[before + PICTURES * PROMPTS + picture]]
        else:
            own = list(texts[first : first + PROMPTS])
        wanted.append(expected(unet, deltas, x[row], time[row], own, [resized(m) for m in areas]))
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-9, atol=1e-9)
    for network in reversed(nets):
        network.detach()
    assert not any(m._forward_hooks for m in unet.modules())


@pytest.mark.parametrize("prefixes", [["lora_te"], ["lora_te1", "lora_te2"]], ids=["SD", "SDXL"])
def test_text_encoders_see_their_own_sub_prompt(prefixes: list[str]) -> None:
    unet = sd_unet() if len(prefixes) == 1 else sdxl_unet()
    encoders = [text_encoder(projection=i == 1) for i in range(len(prefixes))]
    tokens = torch.randint(2, 20, (PICTURES * PROMPTS, 6))
    negative = torch.randint(2, 20, (PICTURES, 6))

    def states(encoder: nn.Module, rows: Tensor) -> Tensor:
        return encoder(rows, output_hidden_states=True).hidden_states[-1].detach()

    base = [(states(e, tokens), states(e, negative)) for e in encoders]
    network = networks.lora.create_network(1.0, 2, 2, None, encoders, unet)
    network.apply_to(encoders, unet)
    randomise(network)
    everywhere = [states(e, tokens) for e in encoders]
    network.set_region(1, True, torch.ones(8, 8))
    network.set_current_generation(PICTURES, PROMPTS, 64, 64, {})
    for encoder, full, (cond, uncond) in zip(encoders, everywhere, base, strict=True):
        found = states(encoder, tokens)
        for row in range(len(tokens)):
            torch.testing.assert_close(found[row], (full if row % PROMPTS == 1 else cond)[row])
            assert not torch.allclose(full[row], cond[row])
        assert torch.equal(states(encoder, negative), uncond)
    network.set_current_generation(len(tokens), 1, 64, 64, {})  # one prompt: nothing tells it from the negative one
    torch.testing.assert_close(states(encoders[0], tokens), everywhere[0])


@pytest.mark.parametrize("kwargs", [{"only_patterns": ".*attn1.*"}, {"only_patterns": ".*attn2.to_k"}])
def test_networks_without_query_or_output_layers(kwargs: dict[str, str]) -> None:
    """The repetition for the sub-prompts belongs to the model, whichever layers are adapted."""
    unet = sd_unet()
    nets = []
    for i, own in enumerate(({}, kwargs)):
        network = networks.lora.create_network(1.0, 2, 2, None, None, unet, **own)
        network.apply_to(None, unet, False, True)
        randomise(network)
        network.set_region(i, i == 1, masks(2)[i])
        nets.append(network)
    shared: dict[Any, Any] = {}
    for network in nets:
        network.set_current_generation(1, 2, 64, 64, shared)
    out = unet(torch.randn(2, 4, 8, 8), 10, torch.randn(3, 5, 16)).sample
    assert out.shape == (2, 4, 8, 8) and out.isfinite().all()


def test_a_region_can_be_set_again_and_left() -> None:
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 2, 2, None, None, unet)
    network.apply_to(None, unet, False, True)
    randomise(network)
    plain = unet(torch.ones(2, 4, 8, 8), 10, torch.ones(2, 5, 16)).sample
    for _ in range(2):
        network.set_region(0, True, torch.ones(8, 8))
    hooks = sum(len(m._forward_hooks) for m in unet.modules())
    count = sum(name.endswith(("attn2.to_q", "attn2.to_out.0")) for name, _ in unet.named_modules())
    assert hooks == count > 0
    assert torch.equal(unet(torch.ones(2, 4, 8, 8), 10, torch.ones(2, 5, 16)).sample, plain)  # no batch has begun
    network.leave_region()
    assert not any(m._forward_hooks for m in unet.modules())
    assert torch.equal(unet(torch.ones(2, 4, 8, 8), 10, torch.ones(2, 5, 16)).sample, plain)


def test_a_black_mask_is_the_whole_picture_and_a_disabled_network_nothing() -> None:
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 2, 2, None, None, unet)
    network.apply_to(None, unet, False, True)
    randomise(network)
    args = torch.ones(2, 4, 8, 8), 10, torch.ones(2, 5, 16)

    def drawn(mask: Tensor) -> Tensor:
        network.set_region(0, True, mask)
        network.set_current_generation(1, 1, 64, 64, {})
        return unet(*args).sample

    assert torch.equal(drawn(torch.zeros(8, 8)), drawn(torch.ones(8, 8)))
    enabled = drawn(torch.ones(8, 8))
    network.set_enabled(False)
    assert not torch.allclose(drawn(torch.ones(8, 8)), enabled)


@pytest.mark.parametrize("height,width", [(64, 64), (96, 160), (63, 37), (104, 72), (17, 33), (128, 48)])
def test_the_grid_of_a_row_of_tokens(height: int, width: int) -> None:
    """At every depth of a UNet, which halves and rounds up; and at other ratios, as for shrunken depths."""
    generation = Generation(1, 1, (8 * height, 8 * width), {0: torch.ones(8, 8)})
    h, w = height, width
    for _ in range(4):
        assert generation._grid(torch.empty(1, h * w, 3)) == (h, w)
        h, w = math.ceil(h / 2), math.ceil(w / 2)
    assert generation._grid(torch.empty(1, 2, height // 3, width // 3)) == (height // 3, width // 3)
    assert generation._grid(torch.empty(1, 7919, 3)) is None
    assert float(Generation(1, 4, (8, 8), {0: torch.ones(8, 8)}).mask(0, torch.empty(1, 7919, 3))) == 0.25


def test_two_networks_share_a_batch_by_the_hosts_dict() -> None:
    first, second = Region(0, torch.ones(2, 2), {}), Region(1, torch.zeros(2, 2), {})
    shared: dict[Any, Any] = {}
    first.start(1, 2, (16, 16), shared)
    second.start(1, 2, (16, 16), shared)
    assert first.generation is second.generation and sorted(first.generation.masks) == [0, 1]
    first.start(1, 2, (16, 16), {})
    assert first.generation is not second.generation


def test_other_architectures_say_so() -> None:
    roots = toy("flux")
    network = networks.lora_flux.create_network(1.0, 2, 2, None, [None, None], roots["dit"])
    with pytest.raises(
        ValueError,
        match="regional prompts are for Stable Diffusion 1.x / 2.x and Stable Diffusion XL, this model is FLUX",
    ):
        network.set_region(0, True, torch.ones(8, 8))
