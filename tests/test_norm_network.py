"""train_norm on real model classes: which layers, under which names, through every call, file and merge."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import lycoris.kohya
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_parts import draw, inputs, randomise, sd_unet, sdxl_unet
from torch import Tensor, nn
from toy_models import toy

import networks.lora
import networks.lycoris
from networks.cli import merge as merge_script
from networks.files.places import Allowance
from networks.hosts import key_merge
from networks.layers.max_norm import update_norm
from networks.plan.plan import Plan


def flux() -> nn.Module:
    options = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    return diffusers.FluxTransformer2DModel(
        in_channels=4, joint_attention_dim=12, pooled_projection_dim=6, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
        **options,
    )  # fmt: skip


def draw_flux(model: nn.Module) -> Tensor:
    own = torch.Generator().manual_seed(2)
    return model(
        hidden_states=torch.randn(1, 5, 4, generator=own),
        encoder_hidden_states=torch.randn(1, 3, 12, generator=own),
        pooled_projections=torch.randn(1, 6, generator=own),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([3.5]),
        img_ids=torch.randn(5, 3, generator=own),
        txt_ids=torch.zeros(3, 3),
    ).sample


def qwen() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def draw_qwen(model: nn.Module) -> Tensor:
    own = torch.Generator().manual_seed(2)
    return model(
        hidden_states=torch.randn(1, 4, 16, generator=own),
        encoder_hidden_states=torch.randn(1, 3, 12, generator=own),
        timestep=torch.tensor([0.5]),
        img_shapes=[[(1, 2, 2)]],
        encoder_hidden_states_mask=torch.ones(1, 3, dtype=torch.bool),
    ).sample


def z_image() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[4, 6, 6], axes_lens=[512, 32, 32],
    )  # fmt: skip


def draw_z_image(model: nn.Module) -> Tensor:
    own = torch.Generator().manual_seed(2)
    latents, text = torch.randn(4, 1, 8, 8, generator=own), torch.randn(7, 12, generator=own)
    return torch.stack(model([latents], torch.tensor([0.5]), [text]).sample)


def draw_sdxl(model: nn.Module) -> Tensor:
    latents, times, text = inputs()
    added = {"text_embeds": torch.full((2, 16), 0.3), "time_ids": torch.ones(2, 6)}
    return model(latents, times, text, added_cond_kwargs=added).sample


Draw = Callable[[nn.Module], Tensor]
# model -> (make, draw, kinds of trained norms and how many of each have a weight and have none)
MODELS: dict[str, tuple[Callable[[], nn.Module], Draw, dict[tuple[str, bool], int]]] = {
    "sd": (sd_unet, draw, {("LayerNorm", True): 12, ("GroupNorm 8", True): 20}),
    "sdxl": (sdxl_unet, draw_sdxl, {("LayerNorm", True): 12, ("GroupNorm 8", True): 20}),
    "flux": (flux, draw_flux, {("RMSNorm", True): 6, ("LayerNorm", False): 5}),
    "qwen_image": (qwen, draw_qwen, {("RMSNorm", True): 8, ("LayerNorm", False): 8}),
    "zimage": (z_image, draw_z_image, {("RMSNorm", True): 12}),
}
every_model = pytest.mark.parametrize("name", MODELS)
HOSTS = ["create_network", "create_arch_network"]


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval().requires_grad_(False)
    with torch.no_grad():  # norms start at 1 and 0: nothing would show
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def create(model: nn.Module, host: str = "create_network", dim: int = 4, **arguments: str) -> Any:
    network = getattr(networks.lycoris, host)(1.0, dim, 1, None, None, model, **arguments)
    network.apply_to(None, model, False, True)
    return network


def of(plan: Plan) -> list[Any]:
    return [row for row in plan.rows if row.geometry.family == "norm"]


@pytest.mark.parametrize("host", HOSTS)
@every_model
def test_trains_saves_loads_and_merges(name: str, host: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, run, counts = MODELS[name]
    model = made(name)
    base = run(model)
    with caplog.at_level(logging.WARNING):
        network = create(model, host, algo="lokr", train_norm="True")
    assert torch.equal(run(model), base)
    rows = [row for row in of(network.plan) if row.trained]
    found = {key: sum((row.kind, row.geometry.affine) == key for row in rows) for key in counts}
    assert found == counts and len(rows) == sum(counts.values()) and {row.algo for row in rows} == {"norm"}
    bare = sum(count for (_, affine), count in counts.items() if not affine)
    warned = [r.getMessage() for r in caplog.records if "without a weight of their own" in r.getMessage()]
    assert bool(warned) is bool(bare) and all(text.startswith(f"{bare} layers are norm") for text in warned)
    rates = {"unet_lr": 1e-2} | ({"text_encoder_lr": None} if host == "create_network" else {})
    optimizer = torch.optim.AdamW(network.prepare_optimizer_params(**rates)[0])
    losses = []
    for _ in range(3):
        loss = (run(model) - 0.3).square().mean()
        loss.backward()
        losses.append(float(loss))
        if losses[1:]:  # in the first step LoKr's own start hides some gradients
            seen = [layer for row, layer in network.layers if row.algo == "norm" and row.block in (0, 12)]
            assert seen and all(p.grad is not None and p.grad.any() for layer in seen for p in layer.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    randomise(network)
    wanted = run(model).detach()
    file = tmp_path / "a.safetensors"
    network.save_weights(str(file), torch.float32, {})
    tensors = load_file(file)
    for row in rows:
        suffixes = {key.partition(".")[2] for key in tensors if key.partition(".")[0] == row.saved_name}
        assert suffixes == ({"w_norm", "b_norm"} if row.geometry.bias else {"w_norm"})
    network.detach()
    assert torch.equal(run(model), base)

    if host == "create_network":
        again, _ = networks.lycoris.create_network_from_weights(1.0, str(file), None, None, model)
    else:
        again = networks.lycoris.create_arch_network_from_weights(1.0, tensors, unet=model)
    assert len(again.plan.trained) == len(network.plan.trained)
    again.apply_to(None, model, False, True)
    assert torch.equal(run(model), wanted)
    again.detach()
    live = create(model, host, algo="lokr", train_norm="True")
    live.load_state_dict(network.state_dict())
    assert torch.equal(run(model), wanted)
    live.detach()
    if bare:
        before = {key: t.clone() for key, t in model.state_dict().items()}
        with pytest.raises(ValueError, match="has no weight that could be changed"):
            again.merge_to(None, model, tensors, torch.float32, "cpu")
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    else:
        again.merge_to(None, model, tensors, torch.float32, "cpu")
        torch.testing.assert_close(run(model), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_affine_leaves_the_others_out_and_then_merges(name: str) -> None:
    run = MODELS[name][1]
    model = made(name)
    network = create(model, train_norm="affine")
    left = [row.reason for row in of(network.plan) if not row.geometry.affine and not row.reason.startswith("outside")]
    assert left and set(left) == {"has no weight of its own (train_norm=affine)"}
    assert not any("without a weight" in warning for warning in network.plan.warnings)
    randomise(network)
    wanted = run(model)
    network.detach()
    network.merge()
    torch.testing.assert_close(run(model), wanted, rtol=1e-4, atol=1e-4)


def test_names_are_the_trainers() -> None:
    names = {row.saved_name for row in of(create(made("flux"), train_norm="True").plan) if row.trained}
    block, single = "lora_unet_double_blocks_0_", "lora_unet_single_blocks_0_"
    assert names == {
        *(f"{block}{s}_attn_norm_{n}_norm" for s in ("img", "txt") for n in ("query", "key")),
        *(f"{block}{s}_norm{n}" for s in ("img", "txt") for n in (1, 2)),
        f"{single}pre_norm", f"{single}norm_query_norm", f"{single}norm_key_norm",
    }  # fmt: skip
    names = {row.saved_name for row in of(create(made("sdxl"), train_norm="True").plan) if row.trained}
    assert {"lora_unet_input_blocks_1_0_in_layers_0", "lora_unet_input_blocks_1_0_out_layers_0"} < names


@pytest.mark.parametrize(
    ("value", "count"), [("true", 32), ("1", 32), ("yes", 32), ("Affine", 32), ("False", 0), ("off", 0)]
)
def test_how_it_is_written(value: str, count: int) -> None:
    plan = networks.lycoris.plan(4, 1, None, sd_unet(), train_norm=value)
    assert sum(row.trained for row in of(plan)) == count
    if not count:
        assert not of(plan), "such layers are not even listed, unless asked for"
        assert plan == networks.lycoris.plan(4, 1, None, sd_unet())


def test_what_cannot_be_is_told() -> None:
    def refused(match: str, **arguments: str) -> None:
        with pytest.raises(ValueError, match=match):
            networks.lora.plan(4, 1, None, sd_unet(), **arguments)

    refused("train_norm=maybe is none of true, false, affine", train_norm="maybe")
    told = networks.lora.plan(4, 1, None, sd_unet(), train_norm="True", exclude_patterns="['.*norm.*']").warnings
    assert any(re.search(r"train_norm=true \(no normalisation layer is left.*excluded by", line) for line in told)
    refused(r"network_reg_dims: '\.\*norm1' decides no layer", train_norm="True", network_reg_dims="{'.*norm1': 8}")
    refused("loraplus_lr_ratio has no effect with norm", algo="norm", loraplus_lr_ratio="4")
    refused("use_dora=True has no effect with algo=norm", algo="norm", use_dora="True")
    refused("save_format=blissful holds lora only, not norm", train_norm="True", save_format="blissful")
    with pytest.raises(ValueError, match="train_norm=true has no effect.*this model has none"):
        networks.lora.plan(4, 1, None, toy("flux")["dit"], train_norm="True")


def test_alone() -> None:
    """algo=norm trains nothing else."""
    plan = networks.lora.plan(4, 1, None, sd_unet(), algo="norm", conv_dim="1")
    assert {row.algo for row in plan.trained} == {"norm"} and len(plan.trained) == 32
    assert {row.reason for row in plan.rows if row.kind == "Linear" and not row.reason.startswith("outside")} == {
        "norm is for normalisation layers alone"
    }


def test_beside_what_does_not_apply() -> None:
    """DoRA, dropouts, LoRA+ and GGPO act on the other layers; the log counts those without."""
    unet = sd_unet()
    network = create(unet, preset="attn-mlp", train_norm="True", use_dora="True", loraplus_lr_ratio="4")
    norms = [layer for row, layer in network.layers if row.algo == "norm"]
    assert len(norms) == 16 and all(layer.magnitude is None for layer in norms)
    assert any("DoRA on 48 layers, off on 16 norm" in note for note in network.plan.notes)
    groups, _ = network.prepare_optimizer_params(None, 1e-3)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {rates[id(p)] for layer in norms for p in layer.parameters()} == {1e-3}
    assert set(rates.values()) == {1e-3, 4e-3}
    network.detach()
    network = create(unet, preset="attn-mlp", train_norm="True", rank_dropout="0.5", ggpo_sigma="0.1", ggpo_beta="0.1")
    assert any("16 of 64 layers have no rank activation" in note for note in network.plan.notes)
    randomise(network)
    network.train()
    for _ in range(2):
        network.update_norms()
        draw(unet).square().mean().backward()
        network.update_grad_norms()
    assert len(network.combined_weight_norms()) == 48


def test_max_norm() -> None:
    network = create(sd_unet(), preset="attn-mlp", algo="norm")
    randomise(network)
    sizes = [float(layer.adapter.w_norm.norm()) for layer in network.adapted_layers]
    for layer, size in zip(network.adapted_layers, sizes, strict=True):
        assert float(update_norm(layer)) == pytest.approx(size)
    limit = sorted(sizes)[5] * 0.999
    count, _, largest = network.apply_max_norm_regularization(limit)
    assert count == len(sizes) - 5 and largest == pytest.approx(limit)
    assert max(float(layer.adapter.w_norm.norm()) for layer in network.adapted_layers) == pytest.approx(limit)


def test_patterns_rates_and_blocks() -> None:
    def trained(**arguments: str) -> list[Any]:
        return [
            row for row in of(networks.lora.plan(4, 1, None, sd_unet(), train_norm="True", **arguments)) if row.trained
        ]

    assert {row.dotted_name.rpartition(".")[2] for row in trained(only_patterns="['.*norm3']")} == {"norm3"}
    assert not any(row.dotted_name.endswith("norm1") for row in trained(exclude_patterns="['.*norm1']"))
    assert not any("mid_block" in row.dotted_name for row in trained(network_reg_dims="{'mid_block.*': 0}"))
    rates = {row.dotted_name: row.lr for row in trained(network_reg_lrs="{'.*norm2': 1e-5}")}
    assert all((lr == 1e-5) is name.endswith("norm2") for name, lr in rates.items())
    assert {row.block for row in trained(blocks="12")} == {12}
    assert all("resnets" not in row.dotted_name for row in trained())
    assert any("resnets" in row.dotted_name for row in trained(conv_dim="4"))


PRESET = """
enable_conv = true
unet_target_module = ["Transformer2DModel", "ResnetBlock2D"]
[module_algo_map]
LayerNorm = { algo = "norm" }
[module_algo_map.Attention]
algo = "loha"
"""


def test_a_preset_names_the_class(tmp_path: Path) -> None:
    """Without train_norm, those layers alone; what the map says of a class above holds for the others."""
    file = tmp_path / "p.toml"
    file.write_text(PRESET)
    plan = networks.lycoris.plan(4, 1, None, sd_unet(), preset=str(file))
    by_kind = {row.kind for row in plan.trained if row.algo == "norm"}
    assert by_kind == {"LayerNorm"} and sum(row.algo == "norm" for row in plan.trained) == 12
    assert {row.reason for row in plan.rows if row.kind.startswith("GroupNorm")} >= {"give train_norm=True to train it"}
    assert {row.algo for row in plan.trained if ".attn" in row.dotted_name} == {"loha"}
    plan = networks.lycoris.plan(4, 1, None, sd_unet(), preset=str(file), train_norm="True")
    assert sum(row.algo == "norm" for row in plan.trained) == 32 and not any("map" in w for w in plan.warnings)
    file.write_text(PRESET.replace("LayerNorm", "GroupNorm"))
    unet = sd_unet()
    network = networks.lora.create_network(1.0, 4, 1, None, None, unet, preset=str(file))
    network.apply_to(None, unet, False, True)
    assert any(row.algo == "norm" for row in network.plan.trained)


@pytest.mark.reference
def test_same_numbers_as_lycoris(tmp_path: Path) -> None:
    """The same call of both, the same values: the same layers and output; each reads the other's keys."""
    ours_unet, their_unet = sd_unet(), sd_unet()
    arguments = {"preset": "unet-transformer-only", "algo": "lokr", "train_norm": "True"}
    ours = networks.lycoris.create_network(0.7, 4, 2, None, None, ours_unet, **arguments)
    ours.apply_to(None, ours_unet, False, True)
    theirs = lycoris.kohya.create_network(0.7, 4, 2, None, None, their_unet, **arguments)
    theirs.apply_to(None, their_unet, False, True)
    randomise(ours, 0.3)
    modules = {module.lora_name: module for module in theirs.unet_loras if "time_embedding" not in module.lora_name}
    assert {layer.lora_name for layer in ours.adapted_layers} == modules.keys()
    with torch.no_grad():
        for _, layer in ours.layers:
            own = dict(modules[layer.lora_name].named_parameters())
            for short, p in layer.adapter.named_parameters():
                own[layer.adapter.spec.keys[short]].copy_(p)
    torch.testing.assert_close(draw(ours_unet), draw(their_unet))
    ours.save_weights(str(tmp_path / "ours.safetensors"), None, {})
    theirs.save_weights(str(tmp_path / "theirs.safetensors"), None, {})
    mine, other = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
    norms = {key for key in other if "_norm" in key.partition(".")[2]}
    assert norms and norms == {key for key in mine if "_norm" in key.partition(".")[2]}
    assert all(torch.equal(mine[key], other[key]) for key in norms)
    fresh = sd_unet()
    loaded, _ = networks.lora.create_network_from_weights(0.7, str(tmp_path / "theirs.safetensors"), None, None, fresh)
    loaded.apply_to(None, fresh, False, True)
    torch.testing.assert_close(draw(fresh), draw(their_unet), rtol=1e-4, atol=1e-4)


def test_several_networks_on_one_model() -> None:
    unet = sd_unet()
    base = draw(unet)
    first, second = (create(unet, preset="attn-mlp", train_norm="True") for _ in range(2))
    randomise(first)
    randomise(second)
    second.set_multiplier(-0.5)
    both = draw(unet)
    first.detach()
    assert not torch.equal(draw(unet), both)
    first.attach()
    torch.testing.assert_close(draw(unet), both)
    for network in (first, second):
        network.detach()
    assert torch.equal(draw(unet), base)
    for network in (first, second):
        network.backup_weights()
        network.merge()
    torch.testing.assert_close(draw(unet), both, rtol=1e-4, atol=1e-4)
    for network in (second, first):
        network.restore_weights()
    assert torch.equal(draw(unet), base)


def test_beside_quantised_linears() -> None:
    """Their norms stay plain, and are merged into as such."""
    import bitsandbytes as bnb

    unet = sd_unet()
    for name, module in list(unet.named_modules()):
        if isinstance(module, nn.Linear) and "attn" in name:
            small = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, quant_type="nf4"
            )
            small.load_state_dict(module.state_dict())
            unet.set_submodule(name, small.to("cpu"))
    network = create(unet, preset="attn-mlp", train_norm="True")
    randomise(network, 0.3)
    wanted = draw(unet)
    wanted.square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    network.detach()
    create_alone = create(unet, preset="attn-mlp", algo="norm")
    randomise(create_alone, 0.3)
    wanted = draw(unet)
    create_alone.detach()
    create_alone.merge()
    torch.testing.assert_close(draw(unet), wanted, rtol=1e-4, atol=1e-4)


# -- merging by keys


def norm_file(name: str, width: int, bias: bool) -> dict[str, Tensor]:
    tensors = {f"{name}.w_norm": torch.randn(width)}
    return tensors | ({f"{name}.b_norm": torch.randn(width)} if bias else {})


def run_merge(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str]:
    code = merge_script.main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("algo", ["norm", "full"])
def test_a_checkpoint_takes_weights_and_biases(algo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole difference has biases, too; two files, one of them at -0.5."""
    unet = sd_unet()
    network = create(unet, algo=algo, preset="unet-only")
    files = []
    for i in range(2):
        randomise(network, 0.2)
        if i:
            for p in network.parameters():
                p.data.mul_(-0.7)
        files.append(tmp_path / f"{i}.safetensors")
        network.save_weights(str(files[-1]), torch.float32, {})
    network.detach()
    unet.save_pretrained(tmp_path / "unet")
    code, said = run_merge(capsys, tmp_path / "unet", files[0], f"{files[1]}=-0.5", "--out", tmp_path / "out")
    assert code == 0, said
    for file, multiplier in ((files[0], 1.0), (files[1], -0.5)):
        one, tensors = networks.lora.create_network_from_weights(multiplier, str(file), None, None, unet)
        one.merge_to(None, unet, tensors, torch.float32, "cpu")
    merged = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out")
    for key, t in unet.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], t, msg=key)
    torch.testing.assert_close(draw(merged.eval()), draw(unet))


def test_names_in_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The original release's of SD; FLUX.1's scale; a bias that is not there; a norm without a weight."""
    torch.manual_seed(0)
    cases = {
        "model.diffusion_model.input_blocks.1.0.in_layers.0": (
            "lora_unet_down_blocks_0_resnets_0_norm1", "weight", True
        ),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.norm1": (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm1", "weight", True
        ),
        "double_blocks.0.img_attn.norm.query_norm": (
            "lora_unet_double_blocks_0_img_attn_norm_query_norm", "scale", False
        ),
        "transformer_blocks.0.attn.norm_q": ("lora_unet_double_blocks_0_img_attn_norm_query_norm", "weight", False),
    }  # fmt: skip
    for key, (name, last, bias) in cases.items():
        model = {f"{key}.{last}": torch.randn(8, dtype=torch.bfloat16)} | (
            {f"{key}.bias": torch.randn(8)} if bias else {}
        )
        adapter = norm_file(name, 8, bias) | norm_file("lora_unet_double_blocks_0_img_norm1", 8, True)
        save_file(model, tmp_path / "m.safetensors")
        save_file(adapter, tmp_path / "a.safetensors")
        out = tmp_path / "o.safetensors"
        parts = (tmp_path / "m.safetensors", f"{tmp_path / 'a.safetensors'}=0.5", "--out", out, "--allow_missing")
        code, said = run_merge(capsys, *parts)
        assert code == 0 and "lora_unet_double_blocks_0_img_norm1" in said, said
        merged = load_file(out)
        wanted = (model[f"{key}.{last}"].float() + 0.5 * adapter[f"{name}.w_norm"]).bfloat16()
        assert torch.equal(merged[f"{key}.{last}"], wanted), key
        if bias:
            assert torch.equal(merged[f"{key}.bias"], model[f"{key}.bias"] + 0.5 * adapter[f"{name}.b_norm"])
            del model[f"{key}.bias"]
            save_file(model, tmp_path / "m.safetensors")
            out.unlink()
            code, said = run_merge(capsys, tmp_path / "m.safetensors", tmp_path / "a.safetensors", "--out", out)
            assert code and "changes a bias" in said and not out.exists()
            parts = (tmp_path / "m.safetensors", f"{tmp_path / 'a.safetensors'}=0", "--out", out, "--allow_missing")
            code, said = run_merge(capsys, *parts)
            assert code == 0, said
        out.unlink()


class Loader:
    """A trainer's loader of weights, as `key_merge.extend` finds it."""

    @staticmethod
    def module(model: dict[str, Tensor]) -> Any:
        import types

        found = types.ModuleType("lora_utils")

        def reader(model_files: Any, calc_device: Any = None, weight_hook: Any = None) -> dict[str, Tensor]:
            return {k: weight_hook(k, t) if weight_hook else t for k, t in model.items()}

        def loader(
            model_files: Any, lora_weights_list: Any, lora_multipliers: Any, fp8_optimization: bool, calc_device: Any
        ) -> dict[str, Tensor]:
            return getattr(found, key_merge.READER)(model_files, calc_device, None)

        setattr(found, key_merge.READER, reader)
        setattr(found, key_merge.LOADER, loader)
        key_merge.extend(found, Allowance(True))
        return found


def test_a_loader_takes_weights_and_biases(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = {
        "blocks.0.norm3.weight": torch.randn(8), "blocks.0.norm3.bias": torch.randn(8),
        "double_blocks.0.img_attn.norm.query_norm.scale": torch.randn(4).bfloat16(),
        "blocks.0.self_attn.q.weight": torch.randn(8, 8), "blocks.0.self_attn.q.bias": torch.randn(8),
    }  # fmt: skip
    tensors = norm_file("lora_unet_blocks_0_norm3", 8, True)
    tensors |= norm_file("lora_unet_double_blocks_0_img_attn_norm_query_norm", 4, False)
    tensors |= norm_file("lora_unet_blocks_0_norm1", 8, True)  # has no weight in this model
    with caplog.at_level(logging.WARNING):
        merged = getattr(Loader.module(model), key_merge.LOADER)([], [tensors], [0.5], False, torch.device("cpu"))
    wanted = {key: t.clone() for key, t in model.items()}
    wanted["blocks.0.norm3.weight"] += 0.5 * tensors["lora_unet_blocks_0_norm3.w_norm"]
    wanted["blocks.0.norm3.bias"] += 0.5 * tensors["lora_unet_blocks_0_norm3.b_norm"]
    key = "double_blocks.0.img_attn.norm.query_norm.scale"
    change = tensors["lora_unet_double_blocks_0_img_attn_norm_query_norm.w_norm"]
    wanted[key] = (wanted[key].float() + 0.5 * change).bfloat16()
    assert all(torch.equal(merged[key], t) for key, t in wanted.items())
    assert "1 of its layers have no place here (1 lora_unet: 1 norm1; e.g. lora_unet_blocks_0_norm1)" in caplog.text
    del model["blocks.0.norm3.bias"]
    with pytest.raises(ValueError, match="change a bias which this model has not, e.g. lora_unet_blocks_0_norm3"):
        getattr(Loader.module(model), key_merge.LOADER)([], [tensors], [0.5], False, torch.device("cpu"))
    with pytest.raises(ValueError, match="changes a bias .b_norm., which cannot be merged from the weight alone"):
        networks.lora.merge_weights_to_tensor(
            torch.randn(8), "lora_unet_blocks_0_norm3", tensors, set(tensors), 1.0, "cpu"
        )


def test_a_file_of_another_model_is_refused() -> None:
    unet = sd_unet()
    norm, linear = "lora_unet_down_blocks_0_attentions_0_norm", "lora_unet_down_blocks_0_attentions_0_proj_in"
    lora = {f"{norm}.lora_up.weight": torch.zeros(16, 1), f"{norm}.lora_down.weight": torch.zeros(1, 1)}
    for tensors, match in (
        ({f"{norm}.w_norm": torch.zeros(9)}, r"w_norm \(9,\) does not fit a weight of \(16,\)"),
        ({f"{linear}.w_norm": torch.zeros(16)}, "the file has norm, which is not for a layer of this kind .Conv2d 1x1"),
        (
            lora | {f"{norm}_x.w_norm": torch.zeros(1)},
            "the file has lora, which is not for a layer of this kind .GroupNorm",
        ),
        (lora, "no layer of the file belongs to this model"),
    ):
        with pytest.raises(ValueError, match=match):
            networks.lora.create_network_from_weights(1.0, None, None, None, unet, tensors)
