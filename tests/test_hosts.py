"""The calls of sd-scripts' trainers and generators, in their order and with their arguments, on tiny models."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_parts import draw, inputs, randomise, sd_unet, sdxl_unet, text_encoder
from torch import nn

import networks.loha
import networks.lokr
import networks.lora
from networks.hosts.caller import Caller
from networks.layers.max_norm import update_norm

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = {"lora": networks.lora, "loha": networks.loha, "lokr": networks.lokr}


@pytest.mark.parametrize("algo", ENTRIES)
def test_training_sequence(algo: str, tmp_path: Path) -> None:
    """Section by section what train_network.py does; the loss falls and a resumed run goes on from there."""
    module, unet, encoder = ENTRIES[algo], sd_unet(), text_encoder()
    kwargs = {"conv_dim": "4", "dropout": None}
    network = module.create_network(1.0, 4, 1, None, encoder, unet, neuron_dropout=None, **kwargs)
    assert isinstance(network, nn.Module)
    base = draw(unet)
    network.apply_to(encoder, unet, True, True)
    network.enable_gradient_checkpointing()
    assert hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs")
    result = network.prepare_optimizer_params_with_multiple_te_lrs(None, 2e-2, 1e-2)
    assert type(result) is tuple
    groups, descriptions = result
    assert len(groups) == len(descriptions) and {g["lr"] for g in groups} == {1e-2, 2e-2}
    unet.requires_grad_(False)
    encoder.requires_grad_(False)
    network.prepare_grad_etc(encoder, unet)
    network.on_epoch_start(encoder, unet)
    assert network.training
    optimizer = torch.optim.AdamW(groups)
    target, losses = draw(sd_unet()).detach() + 0.3, []
    for _ in range(6):
        x, t, _ = inputs()
        text = encoder(torch.tensor([[0, 5, 1], [0, 7, 1]])).last_hidden_state
        loss = (unet(x, t, text).sample - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.get_trainable_params(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keys_scaled, mean, largest = network.apply_max_norm_regularization(50.0, "cpu")
        assert keys_scaled == 0 and 0 <= mean <= largest < 50
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert not any(p.requires_grad for p in unet.parameters())
    network.eval()
    wanted = draw(unet)
    assert not torch.allclose(wanted, base)
    file = tmp_path / "a.safetensors"
    network.save_weights(str(file), torch.float32, {"ss_network_dim": "4"})
    network.detach()
    assert torch.equal(draw(unet), base)

    again = module.create_network(1.0, 4, 1, None, encoder, unet, neuron_dropout=None, **kwargs)
    again.apply_to(encoder, unet, True, True)
    assert "layers loaded" in str(again.load_weights(str(file)))
    torch.testing.assert_close(draw(unet), wanted)


def test_the_state_of_a_checkpoint_is_exact(tmp_path: Path) -> None:
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 4, 3, None, None, unet, use_scalar="True", rs_lora="True")
    network.apply_to(None, unet, False, True)
    randomise(network)
    state = copy.deepcopy(network.state_dict())
    other = networks.lora.create_network(1.0, 4, 1, None, None, sd_unet(), use_scalar="True")
    other.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    assert [a.scale for a in other.adapted_layers] == [a.scale for a in network.adapted_layers]
    del state[next(iter(state))]
    with pytest.raises(RuntimeError, match="missing"):
        other.load_state_dict(state)


@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.compile, lambda n: nn.Sequential(n)])
def test_the_state_survives_a_wrapper(wrapper: Any) -> None:
    """accelerate loads a state through the wrapper of several processes or of compile, which walks by itself."""
    first = networks.lora.create_network(1.0, 4, 3, None, None, sd_unet(), use_scalar="True", rs_lora="True")
    randomise(first)
    state = copy.deepcopy(wrapper(first).state_dict())
    second = networks.lora.create_network(1.0, 4, 1, None, None, sd_unet(), use_scalar="True")
    wrapped = wrapper(second)
    wrapped.load_state_dict(state)
    assert [layer.scale for layer in second.adapted_layers] == [layer.scale for layer in first.adapted_layers]
    assert all(torch.equal(v, state[k]) for k, v in wrapped.state_dict().items())
    del state[next(k for k in state if k.endswith("live_scale"))]
    with pytest.raises(RuntimeError, match="live_scale"):
        wrapped.load_state_dict(state)


def test_a_state_of_another_dim_changes_nothing() -> None:
    """Copying would broadcast a dim of 1 without a word."""
    small = networks.lora.create_network(1.0, 1, 1, None, None, sd_unet())
    network = networks.lora.create_network(1.0, 4, 3, None, None, sd_unet())
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RuntimeError, match="does not fit in .* tensors"):
        network.load_state_dict(small.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_the_plan_follows_a_loaded_scale(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    networks.lora.create_network(1.0, 4, 4, None, None, sd_unet()).save_weights(tmp_path / "a.safetensors", None, {})
    network = networks.lora.create_network(1.0, 4, 1, None, None, sd_unet())
    assert {row.scale for row in network.plan.trained} == {0.25}
    with caplog.at_level(logging.INFO, logger="networks"):
        network.load_weights(str(tmp_path / "a.safetensors"))
    assert {(row.scale, row.alpha) for row in network.plan.trained} == {(1.0, 4.0)}
    assert "take their scale from the file" in caplog.text


@pytest.mark.parametrize("kwargs", [{}, {"use_scalar": "True"}, {"module_dropout": "1e-9"}])
def test_the_strength_is_exact_on_a_half_precision_model(kwargs: dict[str, str]) -> None:
    """Scale 1/3: rounded to bf16 it would be 0.3340, on every layer and in the same direction."""
    unet = sd_unet().to(torch.bfloat16)
    network = networks.lora.create_network(1.0, 3, 1, None, None, unet, **kwargs)
    network.apply_to(None, unet, False, True)
    randomise(network)
    layer = network.adapted_layers[0]
    if layer.adapter.scalar is not None:
        layer.adapter.scalar.data.fill_(1.0)
    x = torch.randn(64, layer.adapter.geometry.in_features, 8, 8, dtype=torch.bfloat16)
    update = layer.update(x).double()
    exact = layer.adapter.geometry.op(x.double(), layer.adapter.delta().double())
    assert float((update * exact).sum() / (exact * exact).sum()) == pytest.approx(1 / 3, rel=5e-4)


def test_merging_inside_autocast_is_exact() -> None:
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 4, 2, None, None, unet)
    randomise(network)
    layer = network.adapted_layers[0]
    weight = layer.base.weight.detach()
    with torch.autocast("cpu", torch.bfloat16):
        inside, norm = layer.new_weight(weight), update_norm(layer)
    assert torch.equal(inside, layer.new_weight(weight)) and torch.equal(norm, update_norm(layer))


def test_multiplier_0_is_the_base_even_for_a_broken_adapter() -> None:
    unet = sd_unet()
    base = draw(unet)
    network = networks.lora.create_network(0.0, 4, 2, None, None, unet)
    for parameter in network.parameters():
        parameter.data.fill_(float("nan"))
    network.apply_to(None, unet, False, True)
    assert torch.equal(draw(unet), base)
    network.merge_to(None, unet, None)
    assert torch.equal(draw(unet), base)


def test_attaching_twice_leaves_no_hook_behind() -> None:
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 4, 2, None, None, unet, rank_dropout="0.1")
    network.apply_to(None, unet, False, True)
    network.apply_to(None, unet, False, True)
    network.detach()
    assert not unet._forward_pre_hooks and not unet._forward_hooks


def test_parts_that_are_not_trained_leave_the_network() -> None:
    unet, encoder = sd_unet(), text_encoder()
    for flags, wanted in (((False, True), {"unet"}), ((True, False), {"text_encoder"})):
        network = networks.lora.create_network(1.0, 4, 1, None, encoder, unet)
        network.apply_to(encoder, unet, *flags)
        assert {row.part for row, _ in network.layers} == wanted == {row.part for row in network.plan.trained}
        prefixes = {"lora_te" if part == "text_encoder" else "lora_unet" for part in wanted}
        assert all(any(key.startswith(p) for p in prefixes) for key in network.state_dict())
        network.detach()
    network = networks.lora.create_network(1.0, 4, 1, None, encoder, unet)
    with pytest.raises(ValueError, match="no layer is left"):
        network.apply_to(encoder, unet, False, False)


def rates(groups: Any, descriptions: Any) -> dict[str, float]:
    return {d: g["lr"] for d, g in zip(descriptions, groups, strict=True)}


def test_learning_rates() -> None:
    unet, encoders = sdxl_unet(), [text_encoder(), text_encoder(projection=True)]
    network = networks.lora.create_network(
        1.0, 4, 1, None, encoders, unet, loraplus_lr_ratio="4", network_reg_lrs=".*attn1.*=0.5"
    )
    network.apply_to(encoders, unet, True, True)
    found = rates(*network.prepare_optimizer_params_with_multiple_te_lrs([1e-3, 2e-3], 1e-2, 1e-4))
    assert found == {
        "text_encoder1": 1e-3,
        "text_encoder1 plus": 4e-3,
        "text_encoder2": 2e-3,
        "text_encoder2 plus": 8e-3,
        "unet": 1e-2,
        "unet plus": 4e-2,
        "unet lr=0.5": 0.5,
        "unet plus lr=2": 2.0,
    }
    assert rates(*network.prepare_optimizer_params_with_multiple_te_lrs([1e-3], None, 1e-4))["text_encoder2"] == 1e-3
    assert rates(*network.prepare_optimizer_params_with_multiple_te_lrs(None, None, 1e-4))["unet"] == 1e-4
    assert rates(*network.prepare_optimizer_params(1e-5, 1e-3))["text_encoder2"] == 1e-5


def test_surplus_rates_are_named(caplog: pytest.LogCaptureFixture) -> None:
    network = networks.lora.create_network(1.0, 4, 1, None, text_encoder(), sd_unet())
    network.prepare_optimizer_params_with_multiple_te_lrs([1e-3, 2e-3], 1e-3, 1e-3)
    assert "0.002" in caplog.text and "1 text encoders" in caplog.text


@pytest.mark.parametrize(
    "encoder_rate,unet_rate,left_out",
    [([0.0], 1e-3, "text_encoder"), (0.0, None, "text_encoder"), ([1e-3], 0.0, "unet"), (None, 0.0, "unet")],
)
def test_a_rate_of_0_leaves_a_part_out(
    encoder_rate: Any, unet_rate: float | None, left_out: str, caplog: pytest.LogCaptureFixture
) -> None:
    """0 is a rate; only one that is not given takes the default."""
    unet, encoder = sd_unet(), text_encoder()
    network = networks.lora.create_network(1.0, 4, 1, None, encoder, unet)
    network.apply_to(encoder, unet, True, True)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="networks"):
        groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs(encoder_rate, unet_rate, 1e-3)
    assert {"unet", "text_encoder"} - {*descriptions} == {left_out} and len(descriptions) == 1
    (said,) = (record.getMessage() for record in caplog.records)
    count = sum(p.numel() for group in groups for p in group["params"])
    assert said.startswith(f"learning rate 0 for {left_out}: ") and f"; {count:,} parameters are trained" in said
    trainable = {id(p) for p in network.get_trainable_params()}
    assert trainable == {id(p) for p in groups[0]["params"]}


def test_no_rate_at_all() -> None:
    unet, encoder = sd_unet(), text_encoder()
    network = networks.lora.create_network(1.0, 4, 1, None, encoder, unet)
    network.apply_to(encoder, unet, True, True)
    with pytest.raises(ValueError, match="every learning rate is 0"):
        network.prepare_optimizer_params_with_multiple_te_lrs([0.0], 0.0, 0.0)


@pytest.mark.parametrize("algo,plus", [("lora", {"up"}), ("loha", {"w2_a"}), ("lokr", {"w1"})])
def test_loraplus_reaches_the_plus_factors_alone(algo: str, plus: set[str]) -> None:
    unet = sd_unet()
    network = ENTRIES[algo].create_network(1.0, 4, 1, None, None, unet, loraplus_unet_lr_ratio="16")
    network.apply_to(None, unet, False, True)
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-3, 1e-3)
    fast = {id(p) for p in groups[descriptions.index("unet plus")]["params"]}
    for layer in network.adapted_layers:
        for name, parameter in layer.adapter.named_parameters():
            assert (id(parameter) in fast) == (name in plus)


@pytest.mark.parametrize("algo", ENTRIES)
def test_max_norm_limits_the_true_update(algo: str) -> None:
    unet = sd_unet()
    network = ENTRIES[algo].create_network(1.0, 4, 8, None, None, unet, conv_dim="2", use_tucker="True")
    network.apply_to(None, unet, False, True)
    randomise(network, 0.5)
    before = [true_norm(layer) for layer in network.adapted_layers]
    middle = sorted(before)[len(before) // 2 - 1 :][:2]
    limit = sum(middle) / 2
    assert middle[0] < limit < middle[1]
    count, mean, largest = network.apply_max_norm_regularization(limit, torch.device("cpu"))
    after = [true_norm(layer) for layer in network.adapted_layers]
    assert count == sum(norm > limit for norm in before) > 0
    assert after == pytest.approx([min(norm, limit) for norm in before], rel=1e-4)
    assert mean == pytest.approx(sum(after) / len(after), rel=1e-4) and largest == pytest.approx(limit, rel=1e-4)


def true_norm(layer: Any) -> float:
    zero = torch.zeros(layer.adapter.geometry.weight_shape)
    return float(layer.new_weight(zero, 1.0).detach().norm())


@pytest.mark.parametrize("algo", ENTRIES)
def test_gen_img_sequence(algo: str, tmp_path: Path) -> None:
    """Applied, merged and pre-calculated are the same picture; multiplier 0 is the base, bit for bit."""
    unet, encoder = sd_unet(), text_encoder()
    network = ENTRIES[algo].create_network(1.0, 4, 1, None, encoder, unet, conv_dim="2")
    randomise(network)
    file = str(tmp_path / "a.safetensors")
    network.save_weights(file, None, {})
    base = draw(unet)

    inference, tensors = ENTRIES[algo].create_network_from_weights(0.7, file, None, [encoder], unet, for_inference=True)
    assert inference.is_mergeable()
    inference.apply_to([encoder], unet)
    inference.load_state_dict(tensors, False)
    inference.to(torch.float32).to("cpu")
    inference.backup_weights()
    inference.set_multiplier(0.7)
    applied = draw(unet)
    assert not torch.allclose(applied, base)
    inference.restore_weights()
    inference.pre_calculation()
    torch.testing.assert_close(draw(unet), applied)
    inference.restore_weights()
    inference.set_multiplier(0.0)
    assert torch.equal(draw(unet), base)
    inference.set_multiplier([0.7, 0.0])  # one per sample
    each = draw(unet)
    torch.testing.assert_close(each[0], applied[0])
    torch.testing.assert_close(each[1], base[1])
    inference.set_enabled(False)
    assert torch.equal(draw(unet), base)
    inference.detach()

    merging, tensors = ENTRIES[algo].create_network_from_weights(0.7, file, None, [encoder], unet, for_inference=True)
    merging.merge_to([encoder], unet, tensors, torch.float32, "cpu")
    torch.testing.assert_close(draw(unet), applied)


def test_leco_sequence(tmp_path: Path) -> None:
    """What train_leco.py does: a text encoder is handed over and not trained, the network sees no options and hears of
    no step, and its strength changes within each, also below 0."""
    unet, encoder = sd_unet(), text_encoder()
    kwargs = {"rank_dropout": "0.1", "dropout": None}
    network = networks.lokr.create_network(1.0, 4, 2.0, None, encoder, unet, neuron_dropout=None, **kwargs)
    network.apply_to(encoder, unet, apply_text_encoder=False, apply_unet=True)
    network.set_multiplier(0.0)
    network.enable_gradient_checkpointing()
    groups, descriptions = network.prepare_optimizer_params(None, 1e-2, 1e-4)
    assert descriptions == ["unet"] and [group["lr"] for group in groups] == [1e-2]
    optimizer = torch.optim.AdamW(groups)
    network.prepare_grad_etc(encoder, unet)
    base, losses = draw(unet).detach(), []
    for strength in (1.0, -1.0, 1.0):
        optimizer.zero_grad(set_to_none=True)
        network.set_multiplier(strength)
        earlier = draw(unet)  # of the sampler, with gradients
        network.set_multiplier(0.0)
        with torch.no_grad():
            assert torch.equal(draw(unet), base)
        network.set_multiplier(strength)
        loss = (draw(unet) - base - 0.3 * strength).square().mean() + 0 * earlier.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        network.set_multiplier(0.0)
    assert losses[-1] < losses[0]
    file = str(tmp_path / "a.safetensors")
    network.save_weights(file, torch.float32, {"ss_network_module": "networks.lokr", "ss_leco_prompt_count": "2"})
    network.set_multiplier(1.0)
    network.eval()
    wanted = draw(unet).detach()
    network.detach()
    again, _ = networks.lokr.create_network_from_weights(1.0, file, None, encoder, unet, **kwargs)
    again.apply_to(encoder, unet, apply_text_encoder=False, apply_unet=True)
    again.set_multiplier(0.0)
    assert "layers loaded" in str(again.load_weights(file)) and {row.part for row, _ in again.layers} == {"unet"}
    assert torch.equal(draw(unet), base)
    again.set_multiplier(1.0)
    again.eval()
    torch.testing.assert_close(draw(unet), wanted)


def test_leco_of_a_model_with_two_text_encoders() -> None:
    unet, encoders = sdxl_unet(), [text_encoder(), text_encoder(projection=True)]
    network = networks.lora.create_network(1.0, 4, 1.0, None, encoders, unet, neuron_dropout=None, dropout=None)
    assert any(row.part.startswith("text_encoder") for row in network.plan.trained)
    network.apply_to(encoders, unet, apply_text_encoder=False, apply_unet=True)
    network.set_multiplier(0.0)
    _, descriptions = network.prepare_optimizer_params(None, 1e-2, 1e-4)
    network.prepare_grad_etc(encoders, unet)
    assert descriptions == ["unet"] and network.text_encoder_loras == []


def test_two_networks_at_once(tmp_path: Path) -> None:
    unet = sd_unet()
    base = draw(unet)
    nets = []
    for algo, multiplier in (("lora", 0.5), ("lokr", 0.8)):
        network = ENTRIES[algo].create_network(multiplier, 4, 1, None, None, unet)
        network.apply_to(None, unet, False, True)
        randomise(network)
        nets.append(network.eval())
    both = draw(unet)
    for network in nets:
        network.backup_weights()
    for network in nets:
        network.restore_weights()
    for network in nets:
        network.pre_calculation()
    torch.testing.assert_close(draw(unet), both)
    for network in nets:
        network.restore_weights()
    torch.testing.assert_close(draw(unet), both)
    for network in reversed(nets):
        network.detach()
    assert torch.equal(draw(unet), base)


def test_options_for_training_work_with_dim_from_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unet = sd_unet()
    network = networks.lokr.create_network(1.0, 4, 1, None, None, unet, factor="2", conv_dim="2")
    network.save_weights(tmp_path / "a.safetensors", None, {})
    with caplog.at_level(logging.INFO, logger="networks"):
        again, _ = networks.lokr.create_network_from_weights(
            1, str(tmp_path / "a.safetensors"), None, None, unet,
            factor="2", rank_dropout="0.1", exclude_patterns=".*attn1.*", loraplus_lr_ratio="4",
        )  # fmt: skip
        again.apply_to(None, unet, False, True)
    assert "the file decides" in caplog.text
    assert not any("attn1" in layer.lora_name for layer in again.adapted_layers)
    assert any(layer.adapter.geometry.has_kernel for layer in again.adapted_layers)
    assert {row.plus_ratio for row, _ in again.layers} == {4}
    assert again.adapted_layers[0].dropouts.rank_dropout == 0.1
    # The same command line again, on the file that it made: what it left out is not in the file.
    again.save_weights(tmp_path / "b.safetensors", None, {})
    third, _ = networks.lokr.create_network_from_weights(
        1, str(tmp_path / "b.safetensors"), None, None, unet, factor="2", exclude_patterns=".*attn1.*"
    )
    assert len(third.adapted_layers) == len(again.adapted_layers)


def test_no_dropout_while_the_host_draws_samples_in_train_mode() -> None:
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 4, 1, None, None, unet, neuron_dropout=0.5)
    network.apply_to(None, unet, False, True)
    randomise(network)
    network.train()
    assert not torch.equal(draw(unet), draw(unet))
    with torch.no_grad():
        assert torch.equal(draw(unet), draw(unet))
    assert not torch.equal(draw(unet), draw(unet))


def test_the_model_keeps_its_modules_and_its_state() -> None:
    unet = sd_unet()
    before = {name: type(module) for name, module in unet.named_modules()}
    keys = list(unet.state_dict())
    network = networks.lora.create_network(1.0, 4, 1, None, None, unet, conv_dim="2")
    network.apply_to(None, unet, False, True)
    assert {name: type(module) for name, module in unet.named_modules()} == before and list(unet.state_dict()) == keys
    base = {id(p) for p in unet.parameters()}
    assert not any(id(p) in base for p in network.parameters())


def test_creation_says_what_runs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="networks"):
        network = networks.lora.create_network(1.0, 4, 1, None, None, sd_unet(), verbose="True")
        assert len(caplog.records) == 1  # the rest waits for what the host trains
        network.apply_to(None, None, False, True)
    assert f"networks.lora {networks.__version__} from {ROOT / 'networks' / 'lora.py'}: " in caplog.text
    assert "lora_unet_mid_block_attentions_0_proj_in" in caplog.text


def test_another_name_for_the_package(tmp_path: Path) -> None:
    """kohya_networks.lora is the same folder under a name that no host owns; `networks` is not touched for it."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import kohya_networks.lora as lora\n"
        "assert 'networks' not in sys.modules\n"
        "print(lora.create_network.__self__.name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "kohya_networks.lora"


@pytest.mark.parametrize("package", ("networks", "kohya_networks"))
def test_the_right_entry_is_named_under_the_name_that_was_typed(package: str) -> None:
    """Where a trainer owns `networks`, the other name alone is of use."""
    with pytest.raises(ValueError, match=f"use --network_module {package}.lora$"):
        Caller(f"{package}.lora_flux", "lora", ("flux",)).plan(4, 1, None, sd_unet())


@pytest.mark.parametrize("names", [("networks", "kohya_networks"), ("kohya_networks", "networks")])
def test_a_network_of_each_name_on_one_model(names: tuple[str, str], tmp_path: Path) -> None:
    """In a process of their own, where either name comes first: one set of classes; both act, and detached in either
    order they leave the model as it was, bit for bit."""
    done = subprocess.run(
        [sys.executable, "-c", TWO_NAMES, *names], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{names[0]}.network.network"


TWO_NAMES = """
import importlib, itertools, pickle, sys
import torch
from tiny_parts import randomise, sd_unet
entries = [importlib.import_module(f"{name}.lokr") for name in sys.argv[1:]]
network_class = importlib.import_module(f"{sys.argv[2]}.network.network").Network
unet = sd_unet()
layer = unet.get_submodule("mid_block.attentions.0.proj_in")
x = torch.randn(1, layer.weight.shape[1], *[3] * (layer.weight.dim() - 2))
before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}, layer(x)
for order in ((0, 1), (1, 0)):
    networks = [entry.create_network(1.0, 2, 1, None, None, unet) for entry in entries]
    assert all(isinstance(network, network_class) for network in networks)
    assert type(networks[0]) is type(networks[1])
    outputs = [layer(x)]
    for network in networks:
        network.apply_to(None, unet, False, True)
        randomise(network)
        outputs.append(layer(x))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(outputs, 2))
    for i in order:
        networks[i].detach()
    assert torch.equal(layer(x), before[1]) and "forward" not in vars(layer)
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in unet.state_dict().items())
kept = pickle.loads(pickle.dumps(networks[0].plan))
assert type(kept) is type(networks[1].plan)
print(network_class.__module__)
"""
