"""networks.api: the package from Python, on models and pipelines of diffusers."""

from __future__ import annotations

import logging
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_parts import draw, inputs, randomise, sd_unet, text_encoder
from torch import Tensor, nn
from toy_models import toy

from networks import api
from networks.algos import ALGOS
from networks.archs.flux import CHROMA
from networks.args import render
from networks.args.options import Options
from networks.args.table import TABLE


def pipeline() -> Any:
    parts = {"vae": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    scheduler = DDIMScheduler()
    return StableDiffusionPipeline(
        unet=sd_unet(), text_encoder=text_encoder(), scheduler=scheduler, requires_safety_checker=False, **parts
    )


def words(encoder: nn.Module) -> Tensor:
    with torch.no_grad():
        return encoder(torch.tensor([[0, 3, 4, 1]])).last_hidden_state


def test_a_loop_of_ones_own_in_five_lines(tmp_path: Path) -> None:
    """The loss falls; the base keeps every bit, is itself inside off(), and has its own forwards after detach()."""
    unet, file = sd_unet(), tmp_path / "a.safetensors"
    weights, base = {k: t.clone() for k, t in unet.state_dict().items()}, draw(unet)
    latents, timesteps, text = inputs()
    target = torch.ones_like(latents)

    network = api.apply(unet.requires_grad_(False), algo="lokr", dim=4, factor=4)
    optimizer = torch.optim.AdamW(network.optimizer_groups(1e-2))
    losses = []
    for _ in range(8):
        loss = nn.functional.mse_loss(unet(latents, timesteps, text).sample, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    network.save(file)

    assert losses[-1] < losses[0] and not any(p.grad is not None for p in unet.parameters())
    trained = draw(unet)
    assert not torch.allclose(trained, base, atol=1e-3)
    with network.off():
        assert torch.equal(draw(unet), base)
    assert torch.equal(draw(unet), trained)
    network.detach()
    assert torch.equal(draw(unet), base) and all(torch.equal(t, weights[k]) for k, t in unet.state_dict().items())

    loaded = api.load(unet, file)
    assert torch.allclose(draw(unet), trained, atol=1e-6)
    loaded.set_multiplier(0)
    assert torch.equal(draw(unet), base)


def test_the_example_of_the_module_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = textwrap.dedent("\n".join(line for line in (api.__doc__ or "").splitlines() if line.startswith("    ")))
    monkeypatch.chdir(tmp_path)
    pipe = pipeline()
    exec(code, {"torch": torch, "unet": sd_unet(), "pipe": pipe})
    assert (tmp_path / "my-lokr.safetensors").is_file() and "forward" in vars(
        pipe.unet.get_submodule("mid_block.attentions.0.proj_in")
    )


@pytest.mark.parametrize("algo", ALGOS)
def test_every_algorithm_from_a_pipeline_to_a_file_and_back(algo: Any, tmp_path: Path) -> None:
    """With the text encoder; scale 1 without an alpha, also of convolutions; the file merges to what it does."""
    pipe, file = pipeline(), tmp_path / "a.safetensors"
    schedule: dict[str, Any] = {"alpha_rank_scale": 0} if algo == "tlora" else {}  # a merge knows no timestep
    network = api.apply(pipe, algo=algo, dim=4, conv_dim=2, text_encoders=True, **schedule)
    assert all(row.scale == 1 for row in network.plan.trained)
    assert network.plan.rows == api.plan(pipe, algo=algo, dim=4, conv_dim=2, text_encoders=True, **schedule).rows
    parts = {"unet"} if algo == "norm" else {"text_encoder", "unet"}  # its blocks have no norms inside
    assert {row.part for row in network.plan.trained} == parts
    randomise(network)
    network.eval()
    expected = draw(pipe.unet), words(pipe.text_encoder)
    api.save(network, file)
    network.detach()
    plain = draw(pipe.unet), words(pipe.text_encoder)
    changed = [not torch.allclose(a, b, atol=1e-4) for a, b in zip(expected, plain, strict=True)]
    assert changed == [True, "text_encoder" in parts]

    loaded = api.load(pipe, file)
    found = draw(pipe.unet), words(pipe.text_encoder)
    loaded.detach()
    api.merge(pipe, file)
    merged = draw(pipe.unet), words(pipe.text_encoder)
    for got in (found, merged):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got, expected, strict=True)), algo


def test_a_file_says_what_made_it(tmp_path: Path) -> None:
    network = api.apply(sd_unet(), algo="dylora", dim=4, alpha=2, block_size=2)
    api.save(network, tmp_path / "a.safetensors", dtype=torch.bfloat16, metadata={"title": "mine"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata, tensor = file.metadata(), file.get_tensor(next(k for k in file.keys() if "lora_up" in k))
    assert tensor.dtype == torch.bfloat16 and metadata["title"] == "mine"
    assert (metadata["ss_network_module"], metadata["ss_network_dim"]) == ("networks.lora", "4")
    assert metadata["ss_network_args"] == '{"algo": "dylora", "block_size": 2}'


def assert_same(first: Path, second: Path) -> None:
    """Tensors of two files, bit for bit but for what a strength that was read and written again may round."""
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], rtol=1e-6, atol=0, msg=key)


@pytest.mark.parametrize(
    ("save_format", "options"),
    [
        ("portable", {"use_dora": True}),
        ("comfyui", {"use_dora": True}),
        ("diffusers", {}),
        ("blissful", {"rs_lora": True}),
    ],
)
def test_the_form_of_a_file_is_chosen_at_the_start_or_at_the_end(
    save_format: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    """Both ways the same tensors, and the network goes on as it was."""
    files = []
    for at_start in (True, False):
        torch.manual_seed(0)
        more: dict[str, Any] = {"save_format": save_format} if at_start else {}
        network = api.apply(sd_unet(), dim=4, **options, **more)
        randomise(network)
        files.append(tmp_path / f"{at_start}.safetensors")
        api.save(network, files[-1], save_format=None if at_start else save_format)
        if not at_start:
            assert network.file_format.dialect.name == "portable"
    assert_same(*files)
    again = [api.load(sd_unet(), file, strength=0.5) for file in files]
    assert again[0].call.dim is None
    for i, network in enumerate(again):
        api.save(network, tmp_path / f"{i}.safetensors", save_format="portable")
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    again[0].save(tmp_path / "own.safetensors", save_format=save_format)
    assert_same(tmp_path / "own.safetensors", files[0])


def test_a_form_that_cannot_hold_the_network_is_refused(tmp_path: Path) -> None:
    network = api.apply(sd_unet(), algo="loha", dim=2)
    with pytest.raises(ValueError, match="save_format=oft "):
        api.save(network, tmp_path / "a.safetensors", save_format="oft")
    with pytest.raises(ValueError, match="did you mean comfyui"):
        api.save(network, tmp_path / "a.safetensors", save_format="confyui")
    assert not any(tmp_path.iterdir())


def test_merging_changes_nothing_before_all_files_fit(tmp_path: Path) -> None:
    """Several in one call, each at a strength of its own; a wrong one behind a right one leaves the weights alone."""
    files = {}
    for name, algo, strength in (("a", "lora", 0.5), ("b", "lokr", -1.0)):
        network = api.apply(sd_unet(), algo=algo, dim=2)  # type: ignore[arg-type]
        randomise(network)
        network.save(tmp_path / f"{name}.safetensors")
        files[tmp_path / f"{name}.safetensors"] = strength
    flux = api.apply(toy("flux")["dit"], dim=2)
    flux.save(tmp_path / "flux.safetensors")

    unet = sd_unet()
    weights = {k: t.clone() for k, t in unet.state_dict().items()}
    with pytest.raises(ValueError, match=r"no layer of .*flux\.safetensors belongs to this model"):
        api.merge(unet, [*files, tmp_path / "flux.safetensors"])
    assert all(torch.equal(t, weights[k]) for k, t in unet.state_dict().items())

    together, apart = sd_unet(), sd_unet()
    api.merge(together, files)
    for file, strength in files.items():
        api.merge(apart, file, strength=strength)
    assert all(torch.equal(t, apart.state_dict()[k]) for k, t in together.state_dict().items())
    assert not torch.allclose(draw(together), draw(unet), atol=1e-3)


def test_rates_of_parts_and_kinds_reach_the_optimizer() -> None:
    network = api.apply(pipeline(), dim=2, text_encoders=True, loraplus_lr_ratio=4)
    rates = {group["lr"] for group in network.optimizer_groups(1e-3, text_encoder_lr=1e-5)}
    assert rates == {1e-3, 4e-3, 1e-5, 4e-5}
    assert {group["lr"] for group in network.optimizer_groups(1e-3)} == {1e-3, 4e-3}
    network.optimizer_groups(1e-3, text_encoder_lr=0)
    assert not any(p.requires_grad for layer in network.text_encoder_loras for p in layer.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fcator": 8}, "networks.api: no argument is called fcator; did you mean factor?"),
        ({"factor": 8}, "networks.api: factor=8 has no effect with algo=lora; it works with lokr"),
        ({"algo": "lorka"}, "is none of lora"),
        ({"dim": 0}, "dim=0 is too small; the least is 1"),
        ({"alpha": float("nan")}, "alpha=nan is not a finite number"),
        ({"multiplier": float("inf")}, "multiplier=inf is not a finite number"),
        ({"text_encoders": True}, "text_encoders=True, but UNet2DConditionModel has none that can be trained"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    unet = sd_unet()
    with pytest.raises(ValueError) as raised:
        api.apply(unet, **options)
    assert message in str(raised.value) and "forward" not in vars(unet.conv_in)


def test_what_is_no_model() -> None:
    with pytest.raises(ValueError, match="str is neither a model nor a pipeline with a unet or a transformer"):
        api.apply("sdxl")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no layer is left to train; the reasons: the model has no Linear"):
        api.apply(nn.Linear(2, 2))


class Bag:
    """A pipeline as far as the names of its models go."""

    def __init__(self, **components: Any) -> None:
        self.components = components


def test_an_encoder_takes_the_place_that_fits(caplog: pytest.LogCaptureFixture) -> None:
    """Chroma's pipeline has T5 alone, under the name which CLIP has in others; a second expert is told of."""

    class T5Attention(nn.Module):
        pass

    t5 = nn.ModuleList([T5Attention()])
    assert T5Attention.__name__ in CHROMA.text_encoders[1].containers
    assert api._in_order(CHROMA, [t5, None, None]) == [None, t5]
    with caplog.at_level(logging.WARNING):
        api.plan(Bag(unet=sd_unet(), transformer_2=nn.Linear(1, 1)), dim=2)
    assert "give transformer_2 itself" in caplog.text


def test_the_types_of_keywords_are_those_of_the_table() -> None:
    """Every argument has its keyword, and the written file is the one that the table makes."""
    file = Path(api.__file__).parent / "args" / "options.py"
    assert file.read_text(encoding="utf-8") == render.typed(), "run python scripts/docs.py"
    assert {*Options.__annotations__, "algo"} == {arg.name for arg in TABLE}
