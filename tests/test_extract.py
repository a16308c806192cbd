"""Extraction, against numpy in float64 and differences that were put in by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from registry_archs import RELEASED, SPECS, data_of
from safetensors.torch import load_file, save_file
from tiny_parts import sd_unet, text_encoder
from torch import Tensor
from toy_models import toy

from networks.cli import extract as script
from networks.cli import merge
from networks.tools.extract import extract
from networks.tools.ranks import RankRule

Tensors = dict[str, Tensor]
ALL = RankRule(rule="energy", value=1 - 1e-9)
FLUX = "double_blocks.0.img_attn.qkv"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def flux() -> Tensors:
    return denoiser("flux")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def make(tensors: Mapping[str, Tensor], name: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path)
        return str(path)

    return make


def denoiser(arch: str) -> Tensors:
    return dict(toy(arch, blocks=1, shrink=128)[SPECS[arch].denoiser.name].state_dict())


def tuned(base: Mapping[str, Tensor], rank: int = 2) -> Tensors:
    """Every matrix changed by a product of that rank."""
    return {key: t + planted(t, rank) if t.dim() > 1 else t for key, t in base.items()}


def planted(weight: Tensor, rank: int) -> Tensor:
    rows, columns = len(weight), weight[0].numel()
    return (torch.randn(rows, rank) @ torch.randn(rank, columns)).reshape(weight.shape) * 0.1


def dense(path: str | Path) -> dict[str, np.ndarray]:
    """Saved name -> up down alpha / rank, by hand, [O, J]."""
    tensors, found = load_file(path), {}
    for key in tensors:
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            down = tensors[key].double().flatten(1).numpy()
            up = tensors[f"{name}.lora_up.weight"].double().flatten(1).numpy()
            found[name] = up @ down * float(tensors[f"{name}.alpha"]) / len(down)
    return found


def change(new: Tensor, old: Tensor) -> np.ndarray:
    return (new.double() - old.double()).flatten(1).numpy()


def check(
    found: Mapping[str, np.ndarray],
    base: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    prefix: str,
) -> None:
    """Every changed matrix is there, whole, and nothing else."""
    wanted = {
        f"{prefix}_{key.removesuffix('.weight')}".replace(".", "_"): change(new[key], base[key])
        for key in base
        if base[key].dim() > 1 and not torch.equal(new[key], base[key])
    }
    assert found.keys() == wanted.keys()
    for name, truth in wanted.items():
        assert np.linalg.norm(found[name] - truth) < 2e-5 * np.linalg.norm(truth), name


@pytest.mark.sweep(5)
@pytest.mark.parametrize("arch", RELEASED)
def test_planted_update_is_found_exactly_with_its_rank(arch: str, write: Callable[..., str], tmp_path: Path) -> None:
    """The toys of three lack so many layers that the name has to say what they are."""
    base = denoiser(arch)
    new = tuned(base)
    model = SPECS[arch].releases[0].name if arch in ("sd", "lumina", "hunyuan_image") else ""
    out = tmp_path / "o.safetensors"
    report = extract(
        write(new, "t.safetensors"),
        write(base, "b.safetensors"),
        out,
        rule=ALL,
        model=model,
    )
    assert report.details["architecture"] == arch
    assert {row.rank for row in report.rows} <= {1, 2}
    assert report.error < 1e-5
    check(dense(out), base, new, SPECS[arch].denoiser.prefix)
    metadata = json.loads(_header(out)["__metadata__"]["networks_history"])[0]
    assert metadata["command"] == "extract" and metadata["tuned"] == "t.safetensors"


def _header(path: Path) -> dict[str, dict[str, str]]:
    data = path.read_bytes()
    found: dict[str, dict[str, str]] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


def test_other_names_of_the_same_model(flux: Tensors, write: Callable[..., str], tmp_path: Path) -> None:
    """The tuned model as diffusers has it, in a pipeline and in two files; the base as its trainer, below a prefix."""
    flux = {key: t for key, t in flux.items() if not key.startswith("final_layer")}
    new = tuned(flux)
    foreign, hidden = dict[str, Tensor](), new[f"{FLUX}.weight"].shape[1]
    for own, trainer in data_of("flux").pairs.items():
        for kind in ("weight", "bias"):
            tensor = new.get(f"{trainer}.{kind}")
            if tensor is None:
                continue
            sizes = [hidden] * 3 + [len(tensor) - 3 * hidden] if len(own) == 4 else [len(tensor) // len(own)] * len(own)
            foreign |= {f"{name}.{kind}": t for name, t in zip(own, tensor.split(sizes), strict=True)}
    write(foreign, "pipe/transformer/model.safetensors")
    (tmp_path / "pipe/model_index.json").write_text("{}")
    base = write({f"model.diffusion_model.{key}": t for key, t in flux.items()}, "b.safetensors")
    out = tmp_path / "o.safetensors"
    report = extract(tmp_path / "pipe", base, out, rule=ALL)
    assert not report.dropped and report.error < 1e-5
    check(dense(out), flux, new, "lora_unet")


def test_pipeline_with_text_encoder_convolutions_and_norms(write: Callable[..., str], tmp_path: Path) -> None:
    unet, encoder = sd_unet().state_dict(), dict(text_encoder().state_dict())
    new, other = (
        tuned(unet, 1),
        {key: t + planted(t, 1) if "mlp" in key and t.dim() > 1 else t for key, t in encoder.items()},
    )
    new["conv_norm_out.weight"] = new["conv_norm_out.weight"] + 0.25
    new["conv_out.bias"] = new["conv_out.bias"] + torch.tensor([0.0, 0.0, 0.0, 0.5])
    for root, one, two in (("t", new, other), ("b", unet, encoder)):
        write(one, f"{root}/unet/model.safetensors")
        write(two, f"{root}/text_encoder/model.safetensors")
        (tmp_path / root / "model_index.json").write_text("{}")
    out = tmp_path / "o.safetensors"
    report = extract(tmp_path / "t", tmp_path / "b", out, rule=ALL, dtype=torch.float32)
    found, tensors = dense(out), load_file(out)
    check(
        {name: t for name, t in found.items() if name.startswith("lora_unet")},
        unet,
        new,
        "lora_unet",
    )
    assert {name for name in found if name.startswith("lora_te_")} == {
        f"lora_te_text_model_encoder_layers_{i}_mlp_fc{j}" for i in (0, 1) for j in (1, 2)
    }
    assert torch.allclose(tensors["lora_unet_conv_norm_out.w_norm"], torch.full((16,), 0.25))
    assert tensors["lora_unet_conv_out.diff_b"].tolist() == [0.0, 0.0, 0.0, 0.5]
    assert not any(key.endswith("diff_b") for key in tensors if "conv_out" not in key)
    assert report.details["unchanged"] > 0
    # What a training takes by default: attention of the UNet, and the encoder.
    report = extract(
        tmp_path / "t", tmp_path / "b", out, rule=RankRule(2), trained_only=True, overwrite=True,
        exclude_patterns=["text_encoder:.*", ".*attn2.*"], include_patterns=["conv_in"],
    )  # fmt: skip
    kept = dense(out)
    assert "lora_unet_conv_in" in kept and "lora_unet_down_blocks_0_attentions_0_proj_in" in kept
    assert not any("lora_te" in name or "attn2" in name or "resnets" in name for name in kept)
    assert kept.keys() == {key.partition(".")[0] for key in load_file(out)}


def test_rank_and_clamp_as_numpy(flux: Tensors, write: Callable[..., str], tmp_path: Path) -> None:
    base = {key: t.bfloat16() for key, t in flux.items()}
    new = {key: (t.float() + 0.1 * torch.randn(t.shape)).bfloat16() if t.dim() > 1 else t for key, t in base.items()}
    files, out = (
        (write(new, "t.safetensors"), write(base, "b.safetensors")),
        tmp_path / "o.safetensors",
    )
    report = extract(*files, out, rule=RankRule(3), clamp_quantile=0.9, dtype=torch.float32)
    found = dense(out)
    lost, whole = 0.0, 0.0
    for key in (key for key in base if base[key].dim() > 1):
        truth = change(new[key].float(), base[key].float())
        u, s, vh = np.linalg.svd(truth, full_matrices=False)
        up, down = u[:, :3] * s[:3], vh[:3]
        # The quantile depends on the signs of the singular vectors, which are free: ours come out of the file.
        name = f"lora_unet_{key.removesuffix('.weight')}".replace(".", "_")
        own = load_file(out)[f"{name}.lora_down.weight"].double().numpy()
        signs = np.sign((own * down).sum(1))
        up, down = up * signs, down * signs[:, None]
        limit = np.quantile(np.concatenate([up.ravel(), down.ravel()]), 0.9)
        wanted = up.clip(-limit, limit) @ down.clip(-limit, limit)
        assert np.linalg.norm(found[name] - wanted) < 1e-4 * np.linalg.norm(wanted), name
        lost, whole = (
            lost + np.linalg.norm(wanted - truth) ** 2,
            whole + np.linalg.norm(truth) ** 2,
        )
    assert math.isclose(report.error, math.sqrt(lost / whole), rel_tol=1e-4)
    # Without one: the best of that rank, and the dtype of the tuned model.
    report = extract(*files, out, rule=RankRule(3), overwrite=True)
    assert {t.dtype for key, t in load_file(out).items() if not key.endswith("alpha")} == {torch.bfloat16}
    truth = change(new[f"{FLUX}.weight"].float(), base[f"{FLUX}.weight"].float())
    tail = np.linalg.norm(np.linalg.svd(truth, compute_uv=False)[3:]) / np.linalg.norm(truth)
    row = next(row for row in report.rows if row.name.endswith("0_img_attn_qkv"))
    assert row.error is not None and tail <= row.error < tail + 0.01


def test_kronecker_difference_and_whole_difference(flux: Tensors, write: Callable[..., str], tmp_path: Path) -> None:
    new, key = dict(flux), f"{FLUX}.weight"
    rows, columns = flux[key].shape
    first, second = torch.randn(4, 4), torch.randn(rows // 4, columns // 4)
    new[key] = flux[key] + 0.1 * torch.kron(first, second)
    files, out = (
        (write(new, "t.safetensors"), write(flux, "b.safetensors")),
        tmp_path / "o.safetensors",
    )
    report = extract(*files, out, to="lokr", factor=4)
    tensors = load_file(out)
    assert {name.partition(".")[2] for name in tensors} == {
        "lokr_w1",
        "lokr_w2",
        "alpha",
    }
    w1, w2 = (tensors[f"lora_unet_{FLUX.replace('.', '_')}.{name}"].double().numpy() for name in ("lokr_w1", "lokr_w2"))
    truth = change(new[key], flux[key])
    assert np.linalg.norm(np.kron(w1, w2) - truth) < 1e-5 * np.linalg.norm(truth)
    assert report.details["unchanged"] == sum(t.dim() > 1 for t in flux.values()) - 1
    extract(*files, out, to="diff", overwrite=True)
    found = load_file(out)[f"lora_unet_{FLUX.replace('.', '_')}.diff"]
    assert np.linalg.norm(found.double().numpy() - truth) < 1e-6 * np.linalg.norm(truth)


def test_merged_into_the_base_it_is_the_tuned_model(flux: Tensors, write: Callable[..., str], tmp_path: Path) -> None:
    """fp8 with scales, biases among what has changed."""
    scale, new, base = torch.tensor(0.5), tuned(flux), dict[str, Tensor]()
    new |= {key: t + 0.25 for key, t in flux.items() if t.dim() == 1}
    for key, tensor in flux.items():
        base[key] = (tensor / scale).to(torch.float8_e4m3fn) if key == f"{FLUX}.weight" else tensor
    base[f"{FLUX}.scale_weight"] = scale
    old = {**flux, f"{FLUX}.weight": base[f"{FLUX}.weight"].float() * scale}
    files, out, merged = (
        (write(new, "t.safetensors"), write(base, "b.safetensors")),
        tmp_path / "o.safetensors",
        tmp_path / "m.safetensors",
    )
    report = extract(*files, out, rule=RankRule(64))
    assert report.error < 1e-5
    check(dense(out), old, new, "lora_unet")
    plain = write(old, "plain.safetensors")
    assert merge.main([plain, str(out), "--out", str(merged)]) == 0
    for key, tensor in load_file(merged).items():
        assert torch.allclose(tensor, new[key], atol=1e-5), key


def test_what_has_not_changed(flux: Tensors, write: Callable[..., str], tmp_path: Path) -> None:
    """A copy in another precision is the same; a small change counts above min_diff alone."""
    new, key, out = (
        {k: t.half() for k, t in flux.items()},
        f"{FLUX}.weight",
        tmp_path / "o.safetensors",
    )
    new[key] = new[key] + torch.tensor(0.01).half()
    coarse = {
        "img_in.bias": new["img_in.bias"].bfloat16(),
        "txt_in.weight": new["txt_in.weight"].bfloat16(),
    }
    base = write({**flux, **coarse}, "b.safetensors")
    report = extract(write(new, "t.safetensors"), base, out, rule=ALL)
    assert [row.name for row in report.rows] == [f"lora_unet_{FLUX.replace('.', '_')}"]
    with pytest.raises(ValueError, match="none of .* layers differs by more than min_diff 0.1"):
        extract(
            tmp_path / "t.safetensors",
            base,
            out,
            rule=ALL,
            min_diff=0.1,
            overwrite=True,
        )
    with pytest.raises(ValueError, match="none of .* layers differs between"):
        extract(base, base, out, rule=ALL, overwrite=True)
    assert load_file(out), "the former file stays"


def test_what_would_be_lost_is_told(flux: Tensors, write: Callable[..., str], tmp_path: Path) -> None:
    """Embeddings, single parameters, other models beside it; what has no counterpart."""
    more = {
        "table.weight": torch.randn(9, 4),
        "token": torch.randn(4),
        "vae.conv.weight": torch.randn(4, 4, 3, 3),
        "n": torch.arange(3),
    }
    base, new = (
        {**flux, **more},
        {
            **tuned(flux),
            **{key: t + 1 for key, t in more.items()},
            "alone.weight": torch.randn(4, 4),
        },
    )
    files, out = (
        (write(new, "t.safetensors"), write(base, "b.safetensors")),
        tmp_path / "o.safetensors",
    )
    with pytest.raises(ValueError, match="4 layers or tensors would be lost.*--allow_dropped"):
        extract(*files, out, rule=RankRule(2))
    assert not out.exists()
    report = extract(*files, out, rule=RankRule(2), allow_dropped=True)
    assert {name for name, _ in report.dropped} == more.keys()
    assert any("alone.weight" in note for note in report.notes)
    check(
        dense(out),
        flux,
        new | {key: flux[key] for key in flux if flux[key].dim() < 2},
        "lora_unet",
    )


def test_what_does_not_belong_together(flux: Tensors, write: Callable[..., str], tmp_path: Path) -> None:
    base, out = write(flux, "b.safetensors"), tmp_path / "o.safetensors"
    lacking = {key: t for key, t in flux.items() if not key.startswith(FLUX)}
    other = {**flux, f"{FLUX}.weight": torch.randn(8, 8)}
    broken = {**flux, f"{FLUX}.weight": flux[f"{FLUX}.weight"] * math.nan}
    strange = {
        **flux,
        f"{FLUX}.weight": torch.zeros(4, dtype=torch.uint8),
        f"{FLUX}.weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8),
    }
    cases: dict[str, tuple[Mapping[str, Tensor], str]] = {
        "anima": (denoiser("anima"), "is Anima.*is FLUX.1"),
        "lacking": (
            lacking,
            r"lacks 1 of the .* e.g. lora_unet_double_blocks_0_img_attn_qkv",
        ),
        "other": (other, r"1 of .* layers have another shape.*\(8, 8\)"),
        "broken": (broken, "double_blocks.0.img_attn.qkv.weight has NaN"),
        "adapter": (
            {
                "lora_unet_x.lora_down.weight": torch.ones(1, 4),
                "lora_unet_x.lora_up.weight": torch.ones(4, 1),
            },
            "is an adapter",
        ),
        "nothing": (
            {"x.weight": torch.ones(2, 2)},
            "not the layers of an architecture that is known",
        ),
        "strange": (strange, "another shape|cannot be read"),
    }
    for name, (tensors, words) in cases.items():
        with pytest.raises(ValueError, match=words):
            extract(write(tensors, f"{name}.safetensors"), base, out, rule=RankRule(2))
    for wrong, words in (
        ({}, "a lora has a rank"),
        ({"rule": RankRule(2), "to": "lara"}, "there is no target lara .*did you mean lora"),
        (
            {"rule": RankRule(2), "exclude_patterns": ["double.*qvk"]},
            "no layer is called",
        ),
        ({"rule": RankRule(2), "min_diff": -1.0}, "min_diff=-1"),
    ):
        with pytest.raises(ValueError, match=words):
            extract(base, base, out, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is read, and writing it would destroy it"):
        extract(base, base, base, rule=RankRule(2), overwrite=True)
    assert not out.exists()


def test_command(
    flux: Tensors,
    write: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files, out = (
        [write(tuned(flux), "t.safetensors"), write(flux, "b.safetensors")],
        tmp_path / "o.safetensors",
    )
    assert script.main([*files, "--out", str(out), "--dim", "1", "--max_error", "0.01"]) == 2
    assert "--max_error" in capsys.readouterr().err and not out.exists()
    assert (
        script.main(
            [
                *files,
                "--out",
                str(out),
                "--dim",
                "2",
                "--json",
                "--exclude-patterns",
                "single.*",
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["architecture"] == "flux" and told["out"] == str(out) and len(told["layers"]) == len(dense(out))
    assert not any("single" in row["name"] for row in told["layers"])
    clip = {key: t for key, t in text_encoder().state_dict().items() if t.is_floating_point()}
    pair = write(tuned(clip, 1), "te_t.safetensors"), write(clip, "te_b.safetensors")
    line = [
        *files,
        "--out",
        str(out),
        "--dim",
        "2",
        "--overwrite",
        "--allow_dropped",
        "--text_encoder",
        "lora_te1",
        *pair,
    ]
    assert script.main(line) == 0
    assert "lora_te1_text_model_encoder_layers_1_self_attn_q_proj" in dense(out)
