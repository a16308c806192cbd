"""A model that no record knows: its blocks are found in its module tree, its names are its modules' own, and every
door is open to it: both trainers, plan, presets, blocks, patterns, files, merge, PEFT, and models of other kinds."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_numeric import FOR_LINEARS
from registry import data_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import networks.lokr
import networks.lora
import networks.lora_flux
from networks import api
from networks.archs.detect import recognised
from networks.cli.commands import main

WIDTH = 24


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.attn(self.norm(x)))  # type: ignore[no-any-return]


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Refiner(Single):
    pass


class FutureDiT(nn.Module):
    """Double and single blocks, a small refiner, and layers around them."""

    def __init__(self) -> None:
        super().__init__()
        self.x_in = nn.Linear(8, WIDTH)
        self.refiner = nn.ModuleList([Refiner()])
        self.doubles = nn.ModuleList([Double() for _ in range(5)])
        self.singles = nn.ModuleList([Single() for _ in range(6)])
        self.x_out = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor, t: Any = None) -> Tensor:
        x = self.x_in(x)
        for block in (*self.refiner, *self.doubles, *self.singles):
            x = block(x)
        return self.x_out(x)  # type: ignore[no-any-return]


LAYERS = [f"doubles.{i}.{name}" for i in range(5) for name in ("attn", "mlp.0", "mlp.2")]
LAYERS += [f"singles.{i}.linear" for i in range(6)]


def model() -> FutureDiT:
    torch.manual_seed(0)
    return FutureDiT().requires_grad_(False).eval()


def signal() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def trained(network: Any) -> list[str]:
    return [row.trainer_name for row, _ in network.layers]


def moved(network: Any) -> Any:
    """The network with values of its own in every parameter."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return network


# -- which layers


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)


class Spatial(nn.Module):
    """As UNets have it: the repeated blocks are in lists inside a list of several classes."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(WIDTH, WIDTH, 1)
        self.transformer_blocks = nn.ModuleList([Attention(), Attention()])


class Res(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3)
        self.conv_shortcut = nn.Conv2d(WIDTH, WIDTH, 3)


class Steps(nn.Sequential):
    pass


class OldUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleList([Steps(nn.Conv2d(4, WIDTH, 3)), Steps(Res(), Spatial()), Steps(Res())])
        self.middle = Steps(Res(), Spatial(), Res())


class Stages(nn.Module):
    """Blocks of two classes in one list, and lists that are Sequentials, as in models for pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4)
        self.layers = nn.Sequential(Double(), Single(), Double())


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 4)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Res(), Res()])


def found(model: nn.Module, **options: Any) -> list[str]:
    return trained(api.apply(model, dim=2, **options))


def test_the_largest_blocks_are_trained() -> None:
    """The single ones beside the double ones, not a refiner of 1/28 of their size; names and blocks as in the model."""
    network = api.apply(model(), dim=2)
    assert trained(network) == LAYERS
    assert [row.saved_name for row, _ in network.layers] == [f"lora_unet_{x}".replace(".", "_") for x in LAYERS]
    assert [row.block for row, _ in network.layers] == [i // 3 for i in range(15)] + [5, 6, 7, 8, 9, 10]


def test_blocks_inside_levels_inside_one_class_and_none() -> None:
    inner = [f"{place}.1.transformer_blocks.{i}.proj" for place in ("input_blocks.1", "middle") for i in (0, 1)]
    assert found(OldUNet()) == inner
    res = ("input_blocks.1.0", "input_blocks.2.0", "middle.0", "middle.2")
    convolutions = [f"{place}.{name}" for place in res for name in ("conv", "conv_shortcut")]
    assert sorted(found(OldUNet(), conv_dim=2)) == sorted(inner + convolutions)
    assert found(Stages()) == [
        "layers.0.attn", "layers.0.mlp.0", "layers.0.mlp.2", "layers.1.linear",
        "layers.2.attn", "layers.2.mlp.0", "layers.2.mlp.2",
    ]  # fmt: skip
    assert found(Bare()) == ["one", "two"]
    with pytest.raises(ValueError, match="give conv_dim to train it"):
        found(Convolutional())
    assert len(found(Convolutional(), conv_dim=2)) == 4


class Compiled(nn.Module):
    """As torch.compile wraps a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


def test_wrappers_are_looked_through() -> None:
    """Of the whole model, and of its blocks, which trainers compile one by one."""
    whole, blocks = Compiled(model()), model()
    for i, block in enumerate(blocks.doubles):
        blocks.doubles[i] = Compiled(block)
    for one in (whole, nn.DataParallel(model()), blocks):
        assert found(one) == LAYERS  # type: ignore[arg-type]


def test_a_class_made_from_a_recorded_one_is_that_architecture() -> None:
    class FluxSingleTransformerBlock(Single):
        pass

    class FluxTransformer2DModel(nn.Module):
        pass

    class Mine(FluxTransformer2DModel):
        def __init__(self) -> None:
            super().__init__()
            self.single_transformer_blocks = nn.ModuleList([FluxSingleTransformerBlock()])

    arch = recognised(Mine())
    assert arch is not None and arch.name == "flux" and recognised(model()) is None


def test_another_model_of_a_recorded_class_name_is_none_of_it() -> None:
    """AuraFlow's class is called MMDiT in its own repository, as that of Stable Diffusion 3 is."""

    class MMDiT(FutureDiT):
        pass

    assert found(MMDiT()) == LAYERS and recognised(MMDiT()) is None


def test_one_line_says_what_was_chosen_and_how_to_say_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        networks.lora.create_network(1.0, 4, 4, None, None, model()).apply_to(None, None, False, True)
    lines = [text for text in caplog.messages if "no record knows" in text]
    assert lines == [
        "no record knows FutureDiT: every Linear in its repeated blocks (Double, Single) is trained, named as its "
        "module; for other layers give a preset with unet_target_module=[CLASSES] or unet_target_name=[PATTERNS], for "
        "fewer exclude_patterns"
    ]


# -- arguments


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"blocks": "0,5-6"}, [*LAYERS[:3], "singles.0.linear", "singles.1.linear"]),
        ({"exclude_patterns": "['.*mlp.*', 'single.*']"}, [f"doubles.{i}.attn" for i in range(5)]),
        ({"only_patterns": r"['singles\.[01]\..*']"}, ["singles.0.linear", "singles.1.linear"]),
        ({"preset": {"unet_target_module": ["Refiner"]}}, ["refiner.0.linear"]),
        ({"preset": {"unet_target_module": [], "unet_target_name": ["x_*"]}}, ["x_in", "x_out"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_layers_by_arguments(options: dict[str, Any], layers: list[str], tmp_path: Path) -> None:
    if "preset" in options:
        file = tmp_path / "mine.toml"
        file.write_text("".join(f"{name} = {value!r}\n" for name, value in options["preset"].items()))
        options = {"preset": str(file)}
    assert found(model(), **options) == layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algo": "tlora"}, "algo=tlora follows the timestep, and no record says how FutureDiT is told it"),
        ({"blocks": "11"}, "blocks: FutureDiT has the blocks 0 to 10"),
        (
            {"exclude_patterns": "['attention']"},
            "exclude_patterns: 'attention' matches no layer; layer names look like 'doubles.0.attn'",
        ),
        ({"img_attn_dim": 4}, "img_attn_dim has no effect on FutureDiT"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        api.apply(model(), **options)
    assert message in str(raised.value)


def test_a_name_that_asserts_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"this model is FutureDiT: use --network_module networks\.lora"):
        networks.lora_flux.create_network(1.0, 4, 4, None, None, model())


# -- every algorithm, in both trainers


@pytest.mark.parametrize("host", ["sd_scripts", "musubi"])
def test_every_algorithm_in_both_trainers(host: str, tmp_path: Path) -> None:
    """Created, trained for two steps, saved, loaded by the file alone, the same output; merged into a checkpoint with
    the model's own keys by the keys alone, the same output."""
    forms: list[dict[str, str]] = [{"algo": algo} for algo in FOR_LINEARS if algo != "tlora"]
    for kwargs in (*forms, {"algo": "lokr", "use_dora": "True"}):
        one, base = model(), model()(signal())
        dim = max(2, data_of(kwargs["algo"]).least_dim)
        if host == "musubi":
            network = networks.lora.create_arch_network(1.0, dim, 2, None, None, one, **kwargs)
            network.apply_to(None, one, apply_text_encoder=False, apply_unet=True)
        else:
            network = networks.lora.create_network(1.0, dim, 2, None, None, one, **kwargs)
            network.apply_to(None, one, False, True)
        rates: dict[str, Any] = {} if host == "musubi" else {"text_encoder_lr": None}
        optimizer = torch.optim.AdamW(network.prepare_optimizer_params(unet_lr=1e-2, **rates)[0])
        for _ in range(2):
            (one(signal()) - 0.3).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        network.eval()
        wanted = one(signal()).detach()
        assert (wanted - base).abs().max() > 1e-3, kwargs
        file = tmp_path / "a.safetensors"
        network.save_weights(str(file), None, {})
        again = model()
        if host == "musubi":
            made = networks.lora.create_arch_network_from_weights(1.0, load_file(file), unet=again, for_inference=True)
        else:
            made, _ = networks.lora.create_network_from_weights(1.0, str(file), None, None, again, for_inference=True)
        made.apply_to(None, again, False, True)
        torch.testing.assert_close(again(signal()), wanted, atol=1e-5, rtol=1e-5)
        save_file(model().state_dict(), tmp_path / "model.safetensors")
        files = [str(tmp_path / "model.safetensors"), str(file), "--out", str(tmp_path / "merged.safetensors")]
        assert main(["merge", *files, "--overwrite"]) in (0, None)
        merged = model()
        merged.load_state_dict(load_file(tmp_path / "merged.safetensors"))
        torch.testing.assert_close(merged(signal()), wanted, atol=1e-5, rtol=1e-5)


# -- models of other kinds


def _language_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)).double().eval().requires_grad_(False)


def _vision_model() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    return ViTModel(ViTConfig(num_hidden_layers=2, **sizes)).double().eval().requires_grad_(False)


def _logits(one: nn.Module) -> Tensor:
    return one(input_ids=torch.arange(12).reshape(2, 6)).logits  # type: ignore[no-any-return]


def _picture(one: nn.Module) -> Tensor:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return one(pixel_values=pixels).last_hidden_state  # type: ignore[no-any-return]


@pytest.mark.parametrize(("make", "run", "layers"), [(_language_model, _logits, 14), (_vision_model, _picture, 12)])
def test_models_of_transformers(make: Any, run: Any, layers: int, tmp_path: Path) -> None:
    """Trained, saved, loaded, merged."""
    one = make()
    network = api.apply(one, algo="lokr", dim=2, factor=4).double()
    assert len(network.layers) == layers
    start, optimizer = run(one).detach(), torch.optim.AdamW(network.optimizer_groups(1e-2))
    for _ in range(3):
        run(one).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = run(one).detach()
    assert (wanted - start).abs().max() > 1e-3
    network.save(tmp_path / "a.safetensors", torch.float64)
    loaded, merged = make(), make()
    api.load(loaded, tmp_path / "a.safetensors").double()
    api.merge(merged, tmp_path / "a.safetensors")
    for other in (loaded, merged):
        torch.testing.assert_close(run(other), wanted, atol=1e-6, rtol=1e-6)  # the file's values go through fp32


@pytest.mark.parametrize(
    "kwargs", [{}, {"use_dora": True}, {"algo": "loha"}, {"algo": "lokr", "full_matrix": True}], ids=str
)
def test_peft_reads_the_file_of_a_language_model(
    kwargs: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And what is said of PEFT before is what it does."""
    import peft

    one = _language_model()
    network = moved(api.apply(one, dim=4, save_format="peft", **kwargs))
    wanted = _logits(one)
    with caplog.at_level(logging.INFO):
        network.save(tmp_path / "a")
    assert any("a-peft: PEFT" in text and "14/14 layers" in text for text in caplog.messages), caplog.messages
    read = peft.PeftModel.from_pretrained(_language_model(), tmp_path / "a-peft")
    torch.testing.assert_close(_logits(read), wanted, atol=1e-5, rtol=1e-5)


def test_adapters_of_peft_load_on_its_own_models(tmp_path: Path) -> None:
    """Whose names begin as those of many checkpoints do: `model.layers.0`."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(_language_model(), config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = _language_model()
    assert len(api.load(ours, tmp_path).layers) == 4
    torch.testing.assert_close(_logits(ours), _logits(theirs), atol=1e-6, rtol=1e-6)


def test_plans_of_folders_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _language_model().save_pretrained(tmp_path)  # type: ignore[operator]
    assert main(["plan", str(tmp_path)]) in (0, None)
    out = capsys.readouterr().out
    assert "14 layers (14x lora dim 4" in out and "no record knows LlamaForCausalLM" in out
