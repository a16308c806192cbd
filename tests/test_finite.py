"""NaN, infinity, and numbers far beyond every model are met where a user's number is read, by argument and value."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_parts import sd_unet, text_encoder
from torch import nn
from toy_models import toy

import networks.dylora
import networks.lora
import networks.lora_qwen_image
from kohya_trainer import generate, train_options
from kohya_trainer.drawing.requests import ImageRequest, parse_prompt_line
from networks.args import presets
from networks.args.parse import Problems, parse
from networks.args.table import TABLE
from networks.cli import merge
from networks.cli import plan as plan_script
from networks.cli.command_line import finite_number, parse_arguments
from networks.hosts.key_merge import merge_weights_to_tensor
from networks.hosts.sd_compat import LoRAInfModule, LoRAModule
from networks.network.single import SingleLayer

NAN, INF = math.nan, math.inf
BROKEN = (NAN, INF, -INF, "nan", "NaN", "inf", "-inf", "Infinity", "1e999", "-1e999", 10**400)
NOT_WHOLE = (2.7, "2.7", [4], "[4]", None, True, "8 8")


def refusal(call: Callable[[], Any], *words: str) -> str:
    """The one sentence of a refusal, with these words in it."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message
    return message


def read(**raw: Any) -> Any:
    problems = Problems("networks.x")
    args = parse(raw, raw.get("algo", "lora"), problems)
    problems.raise_if_any()
    return args


# -- network arguments


def written(kind: str, value: Any) -> list[Any]:
    """A number as a value of this kind, in all ways to write it."""
    text = str(value)
    if kind in ("int", "float"):
        return [value, text, f" {text} "]
    if kind in ("ints", "floats", "rates"):
        return [[4, value], (value,), f"4,{text}", f"[{text}, 4]", value] + [f"cosine+{text}"] * (kind == "rates")
    return [{".*": value}, f".*={text}", f"x=4,.*={text}", json.dumps({".*": value})]


NUMBERS = [arg for arg in TABLE if arg.kind in ("int", "float", "ints", "floats", "rates", "regex_int", "regex_float")]


@pytest.mark.parametrize("arg", NUMBERS, ids=lambda arg: arg.name)
def test_every_argument_with_numbers(arg: Any) -> None:
    assert len(NUMBERS) > 50
    given = {"algo": arg.algos[0]} if arg.algos else {}
    for name in arg.names:
        for value in BROKEN:
            for raw in written(arg.kind, value):
                refusal(lambda raw=raw, name=name: read(**given, **{name: raw}), f"{name}=", str(value)[:50])
    if arg.kind in ("int", "ints", "regex_int"):
        for value in (2.7, "2.7", "1.5e0"):
            for raw in written(arg.kind, value):
                refusal(lambda raw=raw: read(**given, **{arg.name: raw}), f"{arg.name}=", str(value), "whole number")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e999"])
def test_numbers_in_files(number: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(f"'.*' = {number}\n" if number != "1e999" else "'.*' = '1e999'\n")
    in_json = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(number, number)
    (tmp_path / "a.json").write_text(f'{{".*": {in_json}}}')
    (tmp_path / "a.txt").write_text(f".*={number}\n")
    for file in tmp_path.iterdir():
        for name in ("network_reg_dims", "network_reg_alphas", "network_reg_lrs"):
            refusal(lambda file=file, name=name: read(**{name: f"@{file}"}), name)
    for key in ("dim", "alpha", "conv_dim", "conv_alpha", "factor"):
        toml = f"[name_algo_map.x]\nalgo = 'lokr'\n{key} = {number if number != '1e999' else repr(number)}\n"
        (tmp_path / "preset.toml").write_text(toml)
        refusal(lambda: presets.load(str(tmp_path / "preset.toml")), f"x.{key} = ")
    (tmp_path / "preset.toml").write_text("[name_algo_map.x]\nalgo = 'lora'\ndim = 2.7\n")
    refusal(lambda: presets.load(str(tmp_path / "preset.toml")), "x.dim = 2.7", "whole number")


# -- the calls of the hosts


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return sd_unet()


def create(unet: nn.Module, multiplier: Any = 1.0, dim: Any = 4, alpha: Any = 1, **more: Any) -> Any:
    return networks.lora.create_network(multiplier, dim, alpha, None, None, unet, **more)


@pytest.mark.parametrize("value", BROKEN, ids=lambda value: str(value)[:9])
def test_numbers_of_a_call(value: Any, unet: nn.Module) -> None:
    refusal(lambda: create(unet, dim=value), f"network_dim={value} is not a whole number")
    refusal(lambda: create(unet, alpha=value), f"network_alpha={value} is not a finite number")
    refusal(lambda: create(unet, multiplier=value), f"multiplier={value} is not a finite number")
    refusal(lambda: networks.lora.plan(4, value, None, unet), f"network_alpha={value}")
    dit = toy("qwen_image")["dit"]
    ours = networks.lora_qwen_image.create_arch_network
    refusal(lambda: ours(value, 4, 1, None, None, dit), f"multiplier={value}")
    refusal(lambda: ours(1.0, value, 1, None, None, dit), f"network_dim={value}")
    refusal(lambda: ours(1.0, 4, value, None, None, dit), f"network_alpha={value}")


@pytest.mark.parametrize("value", NOT_WHOLE, ids=str)
def test_a_dim_is_a_whole_number(value: Any, unet: nn.Module) -> None:
    if value is not None:  # the module's own default
        refusal(lambda: create(unet, dim=value), f"network_dim={value} is not a whole number")
        refusal(lambda: LoRAModule("x", nn.Linear(4, 4), lora_dim=value), f"lora_dim={value}")
    assert create(unet, dim=8.0).plan.trained[0].dim == create(unet, dim="8").plan.trained[0].dim == 8


@pytest.mark.parametrize("value", [NAN, INF, -INF, "nan", "1e999"], ids=str)
def test_numbers_during_a_run(value: Any, unet: nn.Module) -> None:
    network = networks.lora.create_network(1.0, 4, 1, None, text_encoder(), unet)
    for strength in (value, [1.0, value], (value,), torch.tensor([1.0, float(value)]), torch.tensor(float(value))):
        if not isinstance(value, str) or strength == value:
            refusal(lambda strength=strength: network.set_multiplier(strength), "multiplier=")
            assert network.runtime.multiplier == 1.0
    refusal(lambda: network.apply_max_norm_regularization(value, "cpu"), f"scale_weight_norms={value}")
    several, one = network.prepare_optimizer_params_with_multiple_te_lrs, network.prepare_optimizer_params
    for rates, name in (
        ((value, 1e-3, 1e-3), "text_encoder_lr"),
        (([1e-4, value], 1e-3, 1e-3), "text_encoder_lr"),
        ((1e-4, value, 1e-3), "unet_lr"),
        ((1e-4, 1e-3, value), "learning_rate"),
    ):
        refusal(lambda rates=rates: several(*rates), f"{name}=")
    refusal(lambda: one(1e-4, value, 1e-3), "unet_lr=")
    musubi = networks.lora.create_arch_network(1.0, 4, 1, None, None, unet)
    refusal(lambda: musubi.prepare_optimizer_params(unet_lr=value), "learning_rate=")
    if not isinstance(value, str):
        for name in ("learning_rate", "unet_lr", "scale_weight_norms", "text_encoder_lr"):
            for given in (value, [1e-4, value]):
                options = SimpleNamespace(**{name: given})
                refusal(lambda options=options: network.prepare_network(options), f"--{name}={value}")
                refusal(lambda options=options: networks.lora.prepare_network(musubi, options), f"--{name}={value}")


def test_a_negative_learning_rate_is_none(unet: nn.Module) -> None:
    """It would leave the part out, without a word."""
    network = networks.lora.create_network(1.0, 4, 1, None, text_encoder(), unet)
    call = network.prepare_optimizer_params_with_multiple_te_lrs
    refusal(lambda: call([-1e-4], 1e-3, 1e-3), "text_encoder_lr=-0.0001 is too small")
    groups, _ = call([0.0], 1e-3, 1e-3)
    assert len(groups) == 1


@pytest.mark.parametrize("value", [NAN, INF, "nan", "1e999"], ids=str)
def test_single_layers_and_merges_by_key(value: Any) -> None:
    layer = nn.Linear(4, 4)
    refusal(lambda: SingleLayer("x", layer, "lora", 2, value, {}), f"x: alpha={value}")
    refusal(lambda: SingleLayer("x", layer, "lora", 2, 1, {}, value), f"x: multiplier={value}")
    module = LoRAInfModule("x", layer, 1.0, 2, 1)
    refusal(lambda: setattr(module, "multiplier", value), f"multiplier={value}")
    refusal(lambda: module.get_weight(value), f"multiplier={value}")
    keys = {
        f"x.lora_{part}.weight": torch.ones(4, 1).reshape(shape) for part, shape in (("up", (4, 1)), ("down", (1, 4)))
    }
    call = (layer.weight.detach(), "x", keys, set(keys), value, "cpu")
    refusal(lambda: merge_weights_to_tensor(*call), f"multiplier={value}")


# -- command lines


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "merge": merge.build_parser,
    "gen_img": generate.build_parser,
    "plan": plan_script.build_parser,
    "train_network": train_options.build_parser,
}
PROGRAMS = [Path(__file__).parents[1] / name for name in ("scripts", "networks/cli", "kohya_trainer")]


def test_every_option_with_a_number_has_the_one_type() -> None:
    files = [file for folder in PROGRAMS for file in folder.rglob("*.py")]
    assert not [file.name for file in files if "type=float" in file.read_text("utf-8")]


@pytest.mark.parametrize("program", PARSERS)
def test_options_with_numbers(program: str, tmp_path: Path) -> None:
    """On the command line and, where there are any, in config files."""
    parser = PARSERS[program]()
    options = [action for action in parser._actions if action.type is finite_number]
    needed = {"merge": ["m", "a", "--out", "o"], "plan": ["sd"]}.get(program, [])
    for action in options:
        name = action.option_strings[-1]
        for value in ("nan", "inf", "-inf", "1e999", "one"):
            kind = "number" if value == "one" else "finite number"
            refusal(lambda name=name, value=value: parse_arguments(parser, [*needed, f"{name}={value}"]),
                    name, f"'{value}' is not a {kind}")  # fmt: skip
        if program == "train_network":
            for value in ("nan", "inf", "-inf"):
                (tmp_path / "a.toml").write_text(f"{action.dest} = {value}\n")
                config = ["--config_file", str(tmp_path / "a.toml")]
                # in a list, argparse takes -inf for an option that there is not
                words = ["-inf"] if action.nargs and value == "-inf" else [name, "finite number"]
                refusal(lambda config=config: parse_arguments(parser, config), *words)
    counts = {"merge": 0, "plan": 2, "gen_img": 3, "train_network": 20}
    assert len(options) >= counts[program]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_multipliers_beside_files_and_in_prompts(value: str) -> None:
    refusal(lambda: merge.split_multiplier(f"a.safetensors={value}"), f"a.safetensors={value}", "is no multiplier")
    defaults = ImageRequest("", "", 1, 64, 64, 1, 1.0)
    for option in ("--am", "--l", "--sec"):
        for line in [f"a cat {option} {value}"] + [f"a cat --am 1,{value}"] * (option == "--am"):
            refusal(lambda line=line: parse_prompt_line(line, defaults), option, value)


# -- far beyond every model


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"blocks": "0-999999999"}, ["blocks=0-999999999", "no model has so many blocks"]),
        ({"blocks": "3," + "9" * 5000}, ["blocks="]),
        (
            {"dim": 10**9},
            ["network_dim=1000000000 is far above the full rank of every layer here, which is 32 at most"],
        ),
        ({"dim": "1e30"}, ["network_dim=1", "far above"]),
        ({"conv_dim": "1e9"}, ["conv_dim=1000000000 is far above"]),
        ({"network_reg_dims": "{'.*attn1.*': 1000000000}"}, ["network_reg_dims=1000000000 is far above"]),
        ({"block_dims": ",".join(["99999"] * 25)}, ["block_dims=99999 is far above"]),
        ({"dim": 10**9, "algo": "loha"}, ["network_dim=1000000000"]),
        ({"dim": 10**9, "algo": "glora"}, ["network_dim=1000000000"]),
        ({"dim": 10**9, "algo": "tlora"}, ["network_dim=1000000000"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_memory_holds_is_refused_at_once(arguments: dict[str, Any], words: list[str], unet: nn.Module) -> None:
    start = time.process_time()
    refusal(lambda: create(unet, **arguments), *words)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("algo", ["lokr", "full", "ia3", "norm", "diag-oft"])
def test_forms_that_end_at_the_full_rank_take_any_dim(algo: str, unet: nn.Module) -> None:
    """LyCORIS' users write network_dim=100000 for LoKr's whole matrices."""
    plans = [networks.lora.plan(dim, 1, None, unet, algo=algo) for dim in (10**5, 10**9)]
    assert plans[0].trained and len({sum(row.parameters for row in plan.trained) for plan in plans}) == 1


def test_a_dim_above_the_full_rank_of_small_layers_is_the_users_choice(unet: nn.Module) -> None:
    assert networks.lora.plan(512, 1, None, unet).trained[0].dim == 512
