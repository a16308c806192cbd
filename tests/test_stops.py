"""help=True lists the arguments of a module on a model, dry_run=True prints the plan; both end the call, status 0.

And `kohya-networks args`, which lists them without a model.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tiny_parts import sd_unet, text_encoder
from toy_models import toy

import networks.lokr
import networks.lora
from networks.args.table import TABLE
from networks.cli import args as args_command


def leaves(capsys: pytest.CaptureFixture[str], create: Any, *args: Any, **kwargs: Any) -> str:
    """What a call prints before it ends the program with the exit status 0."""
    with pytest.raises(SystemExit) as stop:
        create(*args, **kwargs)
    assert stop.value.code == 0
    return capsys.readouterr().out


def head(text: str, name: str) -> str:
    """The line of an argument in a list."""
    found = [line for line in text.splitlines() if line.startswith(f"  {name}") and line[2 + len(name)] in ":,"]
    assert len(found) == 1, (name, found)
    return found[0]


def test_help_lists_what_applies_here_whatever_else_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    unet = sd_unet()
    call = (networks.lokr.create_network, 1.0, 8, 1, None, text_encoder(), unet)
    text = leaves(capsys, *call, help="True", rank_dropot="0.1", factor="x", only_patterns="nothing")
    assert text.startswith("networks.lokr on Stable Diffusion 1.x / 2.x, algo=lokr")
    body, others = text.split("With another algorithm, or on other models:")
    assert "(default -1)" in head(body, "factor") and "sine" in body and "down_lr_weight" in body
    listed = set(others.replace(",", " ").split())
    assert {"train_t5xxl", "exclude_mod", "block_size"} <= listed and "factor" not in listed
    assert listed | {arg.name for arg in TABLE if f"\n  {arg.name}" in body} == {arg.name for arg in TABLE}
    assert "factor" in leaves(capsys, *call, help="on", algo="loha").partition("With another")[2]


def test_help_says_the_defaults_of_this_call(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the host, the entry, the network's options and the architecture; and help needs no model that we know."""
    denoiser = toy("qwen_image")["dit"]
    text = leaves(capsys, networks.lora.create_arch_network, 1.0, 8, 2, None, None, denoiser, help="1")
    assert "(default 8)" in head(text, "conv_dim") and "(default 2" in head(text, "conv_alpha")
    assert "(default True)" in head(text, "exclude_mod")
    text = leaves(capsys, networks.lora.create_network, 1.0, 8, 2, None, None, denoiser, help="1", algo="loha")
    assert "(default -)" in head(text, "conv_dim") and "algo=loha" in text.splitlines()[0]
    text = leaves(capsys, networks.lora.create_network, 1.0, 8, 2, None, None, text_encoder(), help="1")
    assert text.startswith("networks.lora, algo=lora")


def test_dry_run_prints_the_plan_and_touches_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, encoder = sd_unet(), text_encoder()
    call = (networks.lokr.create_network, 1.0, 8, 1, None, encoder, unet)
    before = [dict(module.__dict__) for module in unet.modules()]
    text = leaves(capsys, *call, dry_run="True", algo="full", rank_dropout="0.1")
    assert "lora_unet_mid_block_attentions_0_proj_in" in text and "in all 60 layers" in text
    assert "warning: networks.lokr: without effect here, so not used: rank_dropout" in text
    assert "sd-scripts" in text and "dry_run=True: nothing is trained" in text and "--network_train_unet_only" in text
    assert [dict(module.__dict__) for module in unet.modules()] == before
    with pytest.raises(ValueError, match="did you mean factor"):
        networks.lokr.create_network(1.0, 8, 1, None, encoder, unet, dry_run="True", factr="2")
    text = leaves(capsys, networks.lora.create_arch_network, 1.0, 4, 1, None, None, toy("wan")["dit"], dry_run="1")
    assert "lora_unet_blocks_0_self_attn_q" in text and "--network_train_unet_only" not in text
    monkeypatch.setenv("RANK", "1")  # of several processes one prints, and all end
    assert leaves(capsys, *call, dry_run="True") == "" and leaves(capsys, *call, help="True") == ""


def test_files_stop_in_training_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    unet, encoder = sd_unet(), text_encoder()
    file = str(tmp_path / "a.safetensors")
    network = networks.lora.create_network(1.0, 4, 1, None, encoder, unet)
    network.save_weights(file, None, {})
    create = networks.lora.create_network_from_weights
    for stop in ("help", "dry_run"):
        with caplog.at_level(logging.WARNING, logger="networks"):
            made, _ = create(1.0, file, None, encoder, unet, for_inference=True, **{stop: "True"})
        assert len(made.layers) == 60 and f"{stop}: no effect" in caplog.text
        assert leaves(capsys, create, 1.0, file, None, encoder, unet, **{stop: "True"})
        assert len(create(1.0, file, None, encoder, unet, **{stop: "False"})[0].layers) == 60


def arguments(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Exit status, and what `kohya-networks args` prints, wherever."""
    code = args_command.main(argv)
    out, err = capsys.readouterr()
    return code, out + err


def test_arguments_of_a_module_on_a_model_or_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    """As people write them, without torch."""
    code, text = arguments(capsys, "networks.lora", "--model", "Stable Diffusion XL")
    body, others = text.split("With another algorithm, or on other models:")
    assert code == 0 and "  down_lr_weight" in body and "train_t5xxl" in others and "factor" in others
    code, text = arguments(capsys, "--model", "flux", "--json")
    names = {row["name"] for row in json.loads(text)}
    assert {"train_t5xxl", "factor", "block_size"} <= names and "down_lr_weight" not in names
    for name, title in (("lycoris.kohya", "networks.lycoris"), ("LoKr", "networks.lokr"), ("locon", "algo=locon")):
        assert title in arguments(capsys, name)[1].splitlines()[0]
    code, text = arguments(capsys, "dropout")
    assert code == 0 and head(text, "module_dropout") and "factor" not in text and "With another" not in text
    assert "  rank_dropout" not in arguments(capsys, "lokr", "factor")[1]
    for argv, said in (
        (("fctor",), "Did you mean factor?"),
        (("lokr", "fctor"), "no argument is called fctor, or in part. Did you mean factor?"),
        (("lokrr",), "Did you mean lokr?"),
        (("--model", "sdxll"), "did you mean sdxl?"),
    ):
        assert (2, True) == (arguments(capsys, *argv)[0], said in arguments(capsys, *argv)[1]), argv
