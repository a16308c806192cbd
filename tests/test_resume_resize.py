"""resume_resize: a training of another dim goes on from a file, whose update stays."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import draw, randomise, sd_unet
from toy_models import signal, toy

import networks.lora
import networks.lora_flux
from networks.algos import ALGOS
from networks.files import codec
from networks.files.adapter_file import FileTensors, Naming
from networks.files.resize import grown
from networks.tools.ranks import RankRule
from networks.tools.resize import resize

CASES = {  # arguments of the file and of the network
    "tucker": {"conv_dim": "4", "use_tucker": "True"},
    "dora": {"use_dora": "True", "rs_lora": "True", "save_format": "blissful"},
    "reparam": {"loraplus_lr_ratio": "4", "loraplus_mode": "reparam", "use_scalar": "True"},
    "pissa": {"init": "pissa"},  # a file of twice its dim
    "loha": {"algo": "loha", "conv_dim": "4"},
    "lokr": {"algo": "lokr", "conv_dim": "4", "factor": "2"},
    "glora": {"algo": "glora"},
    "tlora": {"algo": "tlora", "alpha_rank_scale": "0"},
}


def attached(dim: int, unet: torch.nn.Module, **arguments: str) -> Any:
    some = r".*(attn2|resnets.*conv1).*" if "conv_dim" in arguments else ".*attn2.*"
    network = networks.lora.create_network(1.0, dim, 3, None, None, unet, only_patterns=some, **arguments)
    network.apply_to(None, unet, False, True)
    return network.eval()


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_with_more_ranks(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments, file = CASES[case], str(tmp_path / "a.safetensors")
    first = attached(4, unet := sd_unet(), **arguments)
    randomise(first)
    first.save_weights(file, None, {})
    drawn = draw(unet).detach()
    first.detach()
    more = {**arguments, **({"conv_dim": "9"} if "conv_dim" in arguments else {})}
    torch.manual_seed(5)
    second = attached(9, unet, **more, resume_resize="True")
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO, "networks"):
        second.load_weights(file)
    assert torch.equal(torch.get_rng_state(), state)  # what the trainer draws next does not depend on it
    assert "the update is that of the file" in caplog.text
    torch.testing.assert_close(draw(unet), drawn, atol=2e-5, rtol=2e-5)
    (draw(unet) - 1).square().mean().backward()
    moved = 0
    for row, layer in second.layers:
        for name, p in layer.adapter.named_parameters():
            axes = [axis for axis in range(p.dim()) if p.shape[axis] == 9 and name in layer.adapter.spec.grows]
            for axis in axes:
                assert p.grad is not None
                gradients = p.grad.movedim(axis, 0).flatten(1).abs().sum(1)
                assert bool((gradients > 0).all()), (row.saved_name, name)
                moved += 1
    assert moved > (0 if case == "lokr" else len(second.layers) - 1)  # whole factors of LoKr have no ranks
    second.save_weights(str(tmp_path / "b.safetensors"), None, {})
    second.detach()
    again = attached(9, unet, **more)  # a file of its own dim is what is written
    again.load_weights(str(tmp_path / "b.safetensors"))
    torch.testing.assert_close(draw(unet), drawn, atol=2e-5, rtol=2e-5)


def test_pairs_of_t_lora_grow_from_their_base_weights(tmp_path: Path) -> None:
    """A file has two ranks for each of the dim."""
    file, more = (tmp_path / f"{name}.safetensors" for name in ("a", "b"))
    first = attached(4, unet := sd_unet(), algo="tlora", alpha_rank_scale="0")
    randomise(first)
    first.save_weights(str(file), None, {"ss_network_module": "networks.tlora"})
    drawn = draw(unet).detach()
    first.detach()
    with pytest.raises(ValueError, match="new ranks of tlora start from the weight below: give the model, --base"):
        resize(file, more, rule=RankRule(12))
    with pytest.raises(ValueError, match="13 is odd"):
        resize(file, more, rule=RankRule(13))
    second = attached(6, unet, algo="tlora", alpha_rank_scale="0")
    weights = {layer.lora_name: layer.whole_weight() for layer in second.adapted_layers}
    found = FileTensors(file).opened(Naming()).layers.values()
    made = [
        grown(
            saved, 12, tuple(weights[saved.name].shape), ALGOS["tlora"], 0, functools.partial(weights.get, saved.name)
        )
        for saved in found
    ]
    save_file({key: t.contiguous() for key, t in codec.write(made).items()}, more)
    second.load_weights(str(more))
    torch.testing.assert_close(draw(unet), drawn, atol=2e-5, rtol=2e-5)
    fresh = attached(6, sd_unet(), algo="tlora", alpha_rank_scale="0")
    for old, new in zip(second.adapted_layers, fresh.adapted_layers, strict=True):
        torch.testing.assert_close(old.adapter.lam0[:, 4:], new.adapter.lam0[:, 4:], atol=1e-4, rtol=1e-4)


def test_fewer_ranks_are_the_nearest_and_the_log_says_how_near(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, small = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    first = attached(6, sd_unet())
    randomise(first)
    first.save_weights(file, None, {})
    second = attached(2, sd_unet(), resume_resize="True")
    with caplog.at_level(logging.INFO, "networks"):
        second.load_weights(file)
    second.save_weights(small, None, {})
    lost = whole = 0.0
    before, after = load_file(file), load_file(small)
    for key in [key for key in before if key.endswith(".alpha")]:
        name = key.removesuffix(".alpha")
        old, new = (
            (t[key].double() / len(t[f"{name}.lora_down.weight"]))
            * t[f"{name}.lora_up.weight"].double().flatten(1)
            @ t[f"{name}.lora_down.weight"].double().flatten(1)
            for t in (before, after)
        )
        s = torch.linalg.svdvals(old)
        assert float((new - old).norm()) == pytest.approx(float(s[2:].norm()), rel=1e-4)
        lost, whole = lost + float((new - old).norm()) ** 2, whole + float(s.norm()) ** 2
    assert f"{(lost / whole) ** 0.5:.2%} of the update is lost" in caplog.text


@pytest.mark.parametrize("algo", ("lora", "loha"))
def test_stacks_stay_stacks(algo: str, tmp_path: Path) -> None:
    model, file = toy("flux")["dit"], str(tmp_path / "a.safetensors")

    def network(dim: int, **more: str) -> Any:
        made = networks.lora_flux.create_network(
            1.0, dim, 2, None, [None, None], model, algo=algo, split_qkv="True", **more
        )
        made.apply_to([None, None], model, False, True)
        return made

    first = network(2)
    randomise(first)
    first.save_weights(file, None, {})
    first.eval()
    expected = model(signal()).detach()
    first.detach()
    second = network(5, resume_resize="True")
    second.load_weights(file)
    second.eval()
    torch.testing.assert_close(model(signal()), expected, atol=1e-5, rtol=1e-5)
    second.detach()
    third = network(1, resume_resize="True")
    third.load_weights(file)
    third.save_weights(str(tmp_path / "b.safetensors"), None, {})
    third.detach()
    key = "lora_unet_double_blocks_0_img_attn_qkv." + ("hada_w1_b" if algo == "loha" else "lora_down.weight")
    assert [len(load_file(tmp_path / f"{name}.safetensors")[key]) for name in "ab"] == [6, 3]


def test_without_it_the_error_names_both_ways(tmp_path: Path) -> None:
    file = str(tmp_path / "a.safetensors")
    attached(4, sd_unet()).save_weights(file, None, {})
    other = attached(8, sd_unet())
    with pytest.raises(ValueError, match="network_dim=4 .*resume_resize=True.*kohya-networks resize"):
        other.load_weights(file)
    other = attached(8, sd_unet(), algo="loha", resume_resize="True")
    with pytest.raises(ValueError, match="the file has lora, this network has loha"):
        other.load_weights(file)
    read, _ = networks.lora.create_network_from_weights(
        1.0, file, None, None, sd_unet(), resume_resize="True"
    )  # which the file's dims leave nothing to do
    assert any("resume_resize: not used, the file decides" in note for note in read.plan.notes)
