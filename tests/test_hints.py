"""A misspelt or misplaced argument ends in a sentence that names what the user meant."""

from __future__ import annotations

import argparse
import re
from typing import Any

import pytest
from toy_models import toy

import networks.dylora
import networks.lokr
import networks.lora
from networks import api
from networks.args import hints
from networks.args.parse import Problems, parse
from networks.args.table import BY_NAME

# What people write -> what the sentence must name.
NAMES = {
    "rank=8": "--network_dim 8",
    "dim=16": "--network_dim 16",
    "r=4": "--network_dim 4",
    "network_rank=4": "--network_dim 4",
    "alpha=4": "--network_alpha 4",
    "lora_alpha=4": "--network_alpha 4",
    "network_weights=a.safetensors": "--network_weights a.safetensors",
    "dim_from_weights=True": "write --dim_from_weights outside",
    "network_train_unet_only=True": "write --network_train_unet_only outside",
    "scale_weight_norms=1": "--scale_weight_norms 1",
    "learning_rate=1e-4": "--learning_rate 1e-4",
    "--unet_lr=1e-4": "--unet_lr 1e-4",
    "lr=1e-4": "--learning_rate 1e-4",
    "conv_rank=8": "conv_dim=8",
    "conv=8": "conv_dim=8",
    "convdim=8": "did you mean conv_dim?",
    "network_dropout=0.1": "dropout=0.1",
    "lora_dropout=0.1": "dropout=0.1",
    "target_modules=['to_q']": "only_patterns",
    "exclude_modules=mlp": "exclude_patterns=",
    "rank_pattern={'a': 8}": "network_reg_dims={'regex': 8}",
    "init_lora_weights=pissa": "init=pissa",
    "lokr_factor=8": "factor=8",
    "loraplus_ratio=16": "loraplus_lr_ratio=16",
    "type=lokr": "algo=lokr",
    "use_coft=True": "constraint=1e-3",
    "multiplier=0.8": "strength 1",
    "rslora=True": "rs_lora=True",
    "use_rs_lora=True": "did you mean",
    "use_drora=True": "did you mean use_dora?",
    "ues_tucker=True": "did you mean use_tucker?",
    "exclude_pattern=a": "did you mean exclude_patterns?",
    "moduledropout=0.1": "did you mean module_dropout?",
    "trian_norm=True": "did you mean train_norm?",
    "blok_size=4": "did you mean block_size?",
    "quite_another=1": "kohya-networks args lists all",
}
VALUES = {
    "algo=oft": "networks.oft",
    "algo=OFT": "diag-oft",
    "algo=dora": "use_dora=True",
    "algo=pissa": "init=pissa",
    "algo=lora-fa": "lora_fa",
    "algo=lohaa": "did you mean loha?",
    "algo=ia^3": "ia3",
    "algo=rslora": "rs_lora=True",
}


def message(text: str) -> str:
    key, _, value = text.partition("=")
    problems = Problems("networks.x")
    parse({key: value}, "lora", problems)
    with pytest.raises(ValueError) as caught:
        problems.raise_if_any()
    return str(caught.value)


def test_what_people_write_is_understood() -> None:
    for text, named in {**NAMES, **VALUES}.items():
        said = message(text)
        assert named in said, f"{text}: {said}"
        assert said.count("\n") == 0 and len(said) < 300, said


def test_from_python_there_are_no_options_of_a_trainer() -> None:
    model = toy("flux")["dit"]
    for name, said in {"rank": "write dim=8", "lora_alpha": "write alpha=8", "conv_rank": "write conv_dim=8"}.items():
        with pytest.raises(ValueError, match=f"no argument is called {name}: {said}"):
            api.plan(model, **{name: 8})
    with pytest.raises(ValueError) as caught:
        api.plan(model, learning_rate=1e-4)  # type: ignore[call-arg]
    assert "--" not in str(caught.value)


def test_hints_name_what_there_is() -> None:
    """Every argument that a hint tells to write is one, and no hint stands for a name that is an argument itself."""
    for name in (*hints._NAMES, *hints._OPTIONS):
        assert name not in BY_NAME, name
        written = re.findall(r"\b(\w+)=", hints.of_name(name, "8"))
        assert written or hints.of_name(name, "8"), name
        assert all(word in BY_NAME for word in written), (name, written)
    for (argument, value), text in hints._VALUES.items():
        assert value not in BY_NAME[argument].choices
        assert all(word in BY_NAME for word in re.findall(r"\b(\w+)=", text)), text


@pytest.mark.parametrize("name", ["network_dim", "network_alpha", "multiplier", "vae", "text_encoder", "unet"])
@pytest.mark.parametrize("create", ["create_network", "create_arch_network"])
def test_an_option_of_the_trainer_given_twice(name: str, create: str) -> None:
    """Hosts hand their options over by position and network_args by name: the same one in both is a mistake of the
    user, not of Python."""
    given: dict[str, Any] = {name: "8"}
    with pytest.raises(ValueError, match=rf"networks.lora: .*{name}"):
        getattr(networks.lora, create)(1.0, 4, 1, None, None, toy("flux")["dit"], **given)


EACH = ",".join(["2"] * 21)  # a dim for every block of the stand-in for FLUX.1
# Calls in which something passes that decides nothing or is seldom meant -> what is said of it.
TOLD: dict[str, tuple[str, int, float, dict[str, str], str]] = {
    "alpha and dim in the wrong order": ("lora", 8, 128, {}, "alpha 128 over dim 8 makes the updates of .* 16 times"),
    "ranks that learn together, all of them": ("dylora", 4, 1, {"block_size": "4"}, "all ranks in one block"),
    "a Kronecker product that splits nothing": ("lokr", 2, 1, {"factor": "0"}, "have a first factor of one number"),
    "a last block of fewer ranks": ("dylora", 32, 1, {"dyloRA": "5"}, "a last block of 2 ranks, as 32 is no multiple"),
    "a kind of blocks, and numbers of the other": (
        "lora", 4, 1, {"train_blocks": "single", "train_double_block_indices": "0"},
        "train_double_block_indices has no effect: another argument leaves all these blocks out",
    ),
    "dims by block below an expression": (
        "lora", 4, 1, {"block_dims": EACH, "network_reg_dims": "{'.*': 8}"}, "block_dims has no effect: no tr",
    ),
    "an alpha of convolutions that are not there": ("lora", 4, 1, {"conv_alpha": "4"}, r"conv_alpha \(without conv"),
    "more ranks in a block than there are": ("dylora", 4, 1, {"unit": "8"}, "block_size=8 is not below their dim"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_what_decides_nothing_is_told(case: str) -> None:
    name, dim, alpha, arguments, said = TOLD[case]
    model = toy("flux")["dit"]
    try:
        plan = getattr(networks, name).plan(dim, alpha, None, model, **arguments)
        found = "\n".join((*plan.notes, *plan.warnings))
    except ValueError as error:
        found = str(error)
    assert re.search(said, found), found


@pytest.mark.parametrize(
    ("only", "arguments", "said"),
    [
        (True, {"train_t5xxl": "true"}, "only dit is trained: train_t5xxl"),
        (True, {"loraplus_text_encoder_lr_ratio": "4"}, "only dit is trained: loraplus_text_encoder_lr_ratio"),
        (True, {"exclude_patterns": ".*self_attn.*"}, r"only dit is trained: exclude_patterns '\.\*self_attn\.\*'"),
        (False, {"loraplus_unet_lr_ratio": "4"}, "trained: loraplus_unet_lr_ratio"),
        (False, {"block_dims": EACH}, "trained: block_dims"),
    ],
)
def test_what_speaks_of_a_part_that_is_not_trained_is_told(
    only: bool, arguments: dict[str, str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """--network_train_unet_only and --network_train_text_encoder_only reach a network when it is applied."""
    found = toy("flux")
    encoders = [found["text_encoder1"], found["text_encoder3"]]
    network = networks.lora.create_network(1.0, 4, 1, None, encoders, found["dit"], **arguments)
    assert not [record for record in caplog.records if "without effect" in record.getMessage()]
    network.apply_to(encoders, found["dit"], not only, only)
    told = [record.getMessage() for record in caplog.records if "without effect" in record.getMessage()]
    assert len(told) == 1 and re.search(said, told[0]), told


def test_a_dim_beside_the_file_that_decides(caplog: pytest.LogCaptureFixture) -> None:
    network = networks.lora.create_network(1.0, 4, 1, None, None, toy("flux")["dit"])
    network.prepare_network(argparse.Namespace(dim_from_weights=True, network_dim=8))
    assert "--network_dim 8 is not used: --dim_from_weights takes the dims of the file" in caplog.text
