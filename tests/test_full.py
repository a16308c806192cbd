"""The whole difference of weight and bias as an adapter, in float64 against its definition."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers_numeric import KINDS, assert_close, make_input, make_layer
from tiny_parts import draw, sd_unet

import networks.lora
from networks.algos import ALGOS
from networks.files import codec, reader
from networks.files.merge import merged_weight
from networks.layers.adapted import AdaptedLayer
from networks.layers.runtime import Runtime
from networks.tensors.geometry import Geometry


@pytest.mark.parametrize("kind", KINDS)
def test_forward_gradients_merge_and_file_are_the_definition(kind: str) -> None:
    torch.manual_seed(0)
    base, x = make_layer(kind), make_input(kind)
    plain, W = copy.deepcopy(base), base.weight.clone()
    layer = AdaptedLayer("lora_unet_x", base, ALGOS["full"](Geometry.of(base), 4).double(), 1.0, runtime=Runtime(0.7))
    adapter = layer.adapter
    assert adapter.laid_out.shapes.keys() == ({"diff", "diff_b"} if base.bias is not None else {"diff"})
    layer.attach()
    assert torch.equal(base(x), plain(x))
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn_like(p))
    new = {"weight": W + 0.7 * adapter.diff}
    if base.bias is not None:
        new["bias"] = plain.bias + 0.7 * adapter.diff_b
    expected, y = torch.func.functional_call(plain, new, x), base(x)
    assert_close(y - plain(x), expected - plain(x), "forward")
    upstream, values = torch.randn_like(y), list(adapter.parameters())
    pairs = zip(torch.autograd.grad(y, values, upstream), torch.autograd.grad(expected, values, upstream), strict=True)
    for a, b in pairs:
        assert_close(a, b, "gradient")
    tensors = codec.encode([layer])
    saved = codec.decode(tensors)[0]["lora_unet_x"]
    if base.bias is not None:  # a merge by keys sees weights only, and must not lose the rest in silence
        with pytest.raises(ValueError, match="diff_b"):
            merged_weight(saved, W, 0.7)
        saved.tensors["diff_b"] = torch.zeros_like(saved.tensors["diff_b"])
    assert_close(merged_weight(saved, W, 0.7), new["weight"], "merge from the file")
    assert torch.equal(saved.build(Geometry.of(base)).diff, adapter.diff)
    layer.runtime.multiplier = 0.0
    assert torch.equal(base(x), plain(x))
    layer.runtime.multiplier = 0.7
    layer.detach()
    layer.backup()
    layer.merge()
    assert_close(base(x), expected, "merged")
    layer.restore()
    assert torch.equal(base(x), plain(x))


def test_a_network_trains_saves_and_loads(tmp_path: Path) -> None:
    unet = sd_unet()
    before = draw(unet)
    network = networks.lora.create_network(1.0, 4, 3, None, None, unet, algo="full")
    network.apply_to(None, unet, False, True)
    assert torch.equal(draw(unet), before)
    optimizer = torch.optim.AdamW(network.prepare_optimizer_params(None, 1e-2, 1e-2)[0])
    for _ in range(2):
        draw(unet).square().mean().backward()
        assert all(p.grad is not None for p in network.parameters())
        optimizer.step()
        optimizer.zero_grad()
    trained, file = draw(unet).detach(), str(tmp_path / "a.safetensors")
    assert not torch.allclose(trained, before)
    network.save_weights(file, None, {})
    assert {key.partition(".")[2] for key in reader.read_tensors(file)[0]} == {"diff", "diff_b", "alpha"}
    fresh = sd_unet()
    loaded, tensors = networks.lora.create_network_from_weights(1.0, file, None, None, fresh)
    loaded.apply_to(None, fresh, False, True)
    torch.testing.assert_close(draw(fresh), trained)
    loaded.detach()
    loaded.merge_to(None, fresh, tensors)
    torch.testing.assert_close(draw(fresh), trained, atol=1e-4, rtol=1e-4)
