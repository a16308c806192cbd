"""show --as_args: the options that make the network of a file again, and how shells and TOML files spell them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from registry import ALGORITHMS
from registry_archs import DATA, data_of
from safetensors.torch import save_file
from tiny_parts import sd_unet, text_encoder
from torch import nn
from toy_models import toy

import networks.lora
from networks.args.coerce import read_toml
from networks.args.shells import CommandLine
from networks.cli import show as script
from networks.files import codec
from networks.files.adapter_file import FileTensors
from networks.hosts.file_arguments import arguments_of
from networks.hosts.sd_scripts import LoRANetwork
from networks.models.skeleton import skeleton
from networks.network.saving import translated
from networks.plan.groups import patterns_for
from networks.plan.plan import PlanRow
from networks.plan.recover import Recovered
from networks.records import ALGORITHMS as SPECS


class Model:
    """A small model, as hosts hand it over."""

    def __init__(self, unet: nn.Module, encoders: list[nn.Module] | None = None) -> None:
        self.unet, self.encoders = unet, encoders

    @classmethod
    def of(cls, arch: str, encoders: bool = False) -> Model:
        parts = toy(arch)
        denoiser = next(model for name, model in parts.items() if not name.startswith("text"))
        return cls(denoiser, [one for name, one in parts.items() if name.startswith("text")] if encoders else None)

    def network(self, dim: int = 4, alpha: float = 2, **args: str) -> LoRANetwork:
        return networks.lora.create_network(1.0, dim, alpha, None, self.encoders, self.unet, **args)

    def recovered(self, network: LoRANetwork, host: str = "sd_scripts", **metadata: str) -> Recovered:
        saved, form = [codec.saved_layer(layer) for layer in network.adapted_layers], network.file_format
        file = FileTensors(codec.written(translated(saved, form, network.adapted_layers)[0], form))
        file.metadata = metadata
        return arguments_of(file, self.encoders, self.unet, host)

    def planned(self, line: CommandLine, host: str = "sd_scripts") -> dict[tuple[str, str], PlanRow]:
        encoders = None if host == "musubi" else self.encoders
        plan = networks.lora.plan(line.dim, line.alpha, encoders, self.unet, host, **line.args)
        texts = {row.part for row in plan.rows if row.part.startswith("text")}
        denoiser = {row.part for row in plan.rows} - texts
        kept = {"network_train_unet_only": denoiser, "network_train_text_encoder_only": texts}
        return {(row.part, row.saved_name): row for row in plan.keep([*kept.get(line.only, denoiser | texts)]).trained}


def assert_alike(model: Model, network: LoRANetwork, line: CommandLine, host: str = "sd_scripts") -> None:
    """Layer by layer: shapes, strength, and what the shapes do not show."""
    own = {(row.part, row.saved_name): row for row in network.plan.trained}
    again = model.planned(line, host)
    assert again.keys() == own.keys(), line
    for key, row in own.items():
        found = again[key]
        assert found.layout.shapes == row.layout.shapes, (key, line)
        assert found.scale == pytest.approx(row.scale) and found.dora == row.dora, (key, line)
        for option in ("constraint", "train_on_input"):
            assert found.options.get(option, 0) == pytest.approx(row.options.get(option, 0)), (key, line)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm(algo: str) -> None:
    """What trained a file is in its metadata, where several algorithms have the same files."""
    model = Model(sd_unet())
    network = model.network(max(4, ALGORITHMS[algo].least_dim), algo=algo)
    found = model.recovered(network, ss_network_module="networks.lora", ss_network_args=json.dumps({"algo": algo}))
    assert not found.differences and found.line.only == "network_train_unet_only"
    assert_alike(model, network, found.line)
    assert found.line.args.get("algo", "lora") == algo


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_option_of_an_algorithm(algo: str) -> None:
    model = Model(sd_unet())
    for name in sorted(SPECS[algo].options - SPECS[algo].unsaved - {"block_size"}):
        base, value = ALGORITHMS[algo].effects.get(name, ({}, "True"))
        value = {"constraint": "0.01", "use_tucker": "True"}.get(name, value)
        more = {"conv_dim": "3"} if name == "use_tucker" else {}
        network = model.network(max(4, ALGORITHMS[algo].least_dim), algo=algo, **base, **more, **{name: value})
        found = model.recovered(network)
        assert not found.differences, (name, found)
        assert_alike(model, network, found.line)


@pytest.mark.sweep
@pytest.mark.parametrize("host", ["sd_scripts", "musubi"])
@pytest.mark.parametrize("arch", DATA)
def test_every_architecture(arch: str, host: str) -> None:
    """All that can be trained, with dims of two kinds of layer and an alpha that is not the dim."""
    model = Model.of(arch)
    widest = {name: value for name, value in data_of(arch).widest.items() if name != "train_t5xxl"}
    kernels = any(isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1 for m in model.unet.modules())
    widest = widest if kernels else {name: value for name, value in widest.items() if name != "conv_dim"}
    network = model.network(6, 3, algo="lokr", factor="4", **widest)
    found = model.recovered(network, host)
    assert not found.differences
    assert_alike(model, network, found.line, host)


CASES: dict[str, tuple[str, bool, dict[str, str]]] = {
    "dims and alphas by layer": (
        "sdxl", True, {"network_reg_dims": "{'.*attn1.*': 8, '.*ff.*': 2}", "network_reg_alphas": "{'.*to_q': 8}"},
    ),
    "convolutions": ("sdxl", True, {"conv_dim": "2", "conv_alpha": "1", "algo": "loha", "use_tucker": "True"}),
    "blocks": ("wan", False, {"blocks": "1"}),
    "one kind of blocks": ("flux", False, {"train_blocks": "single"}),
    "blocks by their own numbers": ("flux", False, {"train_double_block_indices": "1"}),
    "left out": ("wan", False, {"exclude_patterns": "['.*ffn.*']"}),
    "a few layers": ("flux", False, {"only_patterns": "['double_blocks.0.img_attn.qkv', '.*linear2']"}),
    "what the record leaves out": ("zimage", False, {"include_patterns": "['layers.0.adaLN.*']"}),
    "attention alone": ("flux", False, {"enable_all_linear": "False"}),
    "DoRA": ("qwen_image", False, {"use_dora": "True"}),
    "DoRA of columns": ("qwen_image", False, {"use_dora": "True", "wd_on_output": "False", "algo": "loha"}),
    "rs-LoRA": ("zimage", False, {"rs_lora": "True"}),
    "projections apart": ("flux", False, {"split_qkv": "True"}),
    "layers outside the blocks": ("flux", False, {"in_dims": "4,2,0,0,8", "algo": "lokr", "decompose_both": "True"}),
    "names of diffusers": ("wan", False, {"save_format": "diffusers"}),
    "an encoder with its own dims": (
        "sdxl", True, {"network_reg_dims": "{'text_encoder2:.*fc1': 7}", "exclude_patterns": "['text_encoder1:.*fc2']"},
    ),
}  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("told", [True, False])
def test_choices(case: str, told: bool) -> None:
    """With and without what a trainer writes into metadata."""
    arch, encoders, args = CASES[case]
    model = Model.of(arch, encoders)
    network = model.network(**args)
    metadata = {"ss_network_module": "networks.lora", "ss_network_args": json.dumps(args)} if told else {}
    found = model.recovered(network, **metadata)
    assert not found.differences, found
    if case != "names of diffusers" and (told or case != "projections apart"):  # files at scale 1; as one layer
        assert_alike(model, network, found.line)
    assert ("save_format" in found.line.args) == (told and "save_format" in args)


def test_norms_and_one_part_alone() -> None:
    model = Model(sd_unet(), [text_encoder()])
    network = model.network(train_norm="affine", conv_dim="2")
    assert_alike(model, network, model.recovered(network).line)
    for parts, only in (((True, False), "text_encoder"), ((False, True), "unet")):
        network = model.network()
        network.apply_to(model.encoders, model.unet, *parts)
        found = model.recovered(network)
        assert found.line.only == f"network_train_{only}_only" and not found.differences
        assert_alike(model, network, found.line)
        network.detach()


def test_what_metadata_tell_beside() -> None:
    model = Model.of("wan")
    args = {"rank_dropout": "0.1", "loraplus_lr_ratio": "4", "init_seed": "7", "blocks": "0", "no_such": "1"}
    network = model.network(blocks="0")
    metadata = {"ss_network_args": json.dumps(args), "ss_network_dropout": "None", "networks_dialect": "comfyui"}
    line = model.recovered(network, **metadata).line
    told = {"rank_dropout": "0.1", "loraplus_lr_ratio": "4", "init_seed": "7"}
    assert line.args == {"blocks": "0", "save_format": "comfyui", **told}
    wrong = model.recovered(network, ss_network_args='{"use_dora": "True", "algo": "lokr", "factor": "8"}').line
    assert wrong.args == {"blocks": "0"}  # the tensors contradict them


def test_starts_of_which_files_hold_the_difference() -> None:
    model = Model.of("wan")
    network = model.network(4, 2)
    network = model.network(8, 4)  # what init=pissa writes at dim 4
    starts = json.dumps({"init": ["pissa"], "ranks": "2 x dim"})
    line = model.recovered(network, networks_init=starts).line
    assert (line.dim, line.alpha, line.args) == (4, 2, {"init": "pissa"})


def test_what_no_arguments_give_is_told() -> None:
    model = Model.of("flux", encoders=True)
    network = model.network(alpha=-0.0)
    tensors = codec.encode(network.adapted_layers, network.file_format)
    kept = next(key for key in tensors if "double_blocks" in key and key.endswith("alpha"))
    name = kept.removesuffix(".alpha")
    tensors = {key: t for key, t in tensors.items() if not key.startswith(f"{name}.")}
    tensors[f"{name}.diff"] = torch.zeros(
        next(row for row in network.plan.trained if row.saved_name == name).geometry.weight_shape
    )
    found = arguments_of(FileTensors(tensors), model.encoders, model.unet, "sd_scripts")
    assert any("another algorithm" in text and name in text for text in found.differences)


# -- patterns


def test_patterns_mean_these_layers_alone() -> None:
    every = [f"double_blocks.{i}.{name}" for i in range(19) for name in ("img_attn.qkv", "txt_attn.qkv", "img_mlp.0")]
    every += [f"single_blocks.{i}.linear{n}" for i in range(38) for n in (1, 2)]
    chosen = [
        [name for name in every if name.endswith("attn.qkv")], [name for name in every if ".1." in name],
        [name for name in every if re.search(r"[.](3|17)[.]\w+_attn", name)], every[:1], every, every[::7],
    ]  # fmt: skip
    for wanted in chosen:
        patterns = patterns_for(wanted, every)
        assert [name for name in every if any(re.fullmatch(p, name) for p in patterns)] == wanted, patterns
        assert not any("\\" in p or '"' in p or "'" in p for p in patterns)
    assert patterns_for(chosen[0], every) == [".*qkv"]


# -- spellings

ODD = {
    "plain": "8", "a map": "{'.*attn.*': 8, 'a(1|2)': 4}", "a list": "['.*a', '.*b']", "spaces": "a b", "empty": "",
    "a path": r"C:\my presets\a.toml", "a dollar": "a$b$(c)`d`", "quotes": "it's", "both": "'a' $b", "unicode": "ü’x“",
    "a comma": "1,2,3", "a tilde": "~/x", "an at": "@f.txt", "bang": "a!b",
}  # fmt: skip
LINE = CommandLine("networks.lora", 4, 0.5, ODD, "network_train_unet_only")
WANTED = [
    "--network_module", "networks.lora", "--network_dim", "4", "--network_alpha", "0.5", "--network_train_unet_only",
    "--network_args", *(f"{name}={value}" for name, value in ODD.items()),
]  # fmt: skip


def test_bash() -> None:
    assert shlex.split(LINE.bash().replace("\\\n", "")) == WANTED
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {LINE.bash()}"], check=True, capture_output=True, encoding="utf-8"
    )
    assert done.stdout.split("\0")[:-1] == WANTED


def test_powershell() -> None:
    assert powershell(LINE.powershell()) == WANTED


def powershell(text: str) -> list[str]:
    """The arguments that PowerShell makes of a line: bare words without a sign that means something, '..' with doubled
    quotes, "..." without variables and escapes."""
    words, i, text = list[str](), 0, text.replace("`\n", " ")
    while i < len(text):
        if text[i] == " ":
            i += 1
        elif text[i] == "'":
            end = i + 1
            while text[end] not in "'‘’‚‛" or text[end + 1 : end + 2] in tuple("'‘’‚‛"):
                end += 2 if text[end] in "'‘’‚‛" else 1
            words.append(re.sub("(['‘’‚‛])\\1", r"\1", text[i + 1 : end]))
            i = end + 1
        elif text[i] == '"':
            end = text.index('"', i + 1)
            words.append(text[i + 1 : end])
            assert not set(words[-1]) & set("$`“”„"), words[-1]
            i = end + 1
        else:
            end = next((n for n in range(i, len(text)) if text[n] == " "), len(text))
            words.append(text[i:end])
            assert not set(words[-1]) & set("{}()[]@#;,&|<>'\"$`~*?"), words[-1]
            i = end
    return words


def test_toml() -> None:
    found = read_toml(LINE.toml())
    assert found.pop("network_args") == WANTED[-len(ODD) :]
    assert found == {
        "network_module": "networks.lora", "network_dim": 4, "network_alpha": 0.5, "network_train_unet_only": True,
    }  # fmt: skip


# -- the program


def test_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is found by names and shapes; what is printed plans the same layers."""
    model = skeleton("wan_t2v_1_3b")
    network = networks.lora.create_network(1.0, 8, 4, None, None, model.unet, algo="loha", blocks="0-1")
    path = save(network, tmp_path / "a.safetensors")
    found = json.loads(shown(capsys, str(path), "--as_args", "--host", "musubi", "--json"))
    assert "1.3B" in found["model"] and found["differences"] == []
    assert found["line"]["args"] == {"algo": "loha", "blocks": "0-1"} and found["line"]["dim"] == 8
    text = shown(capsys, str(path), "--as_args", "--model", "wan_t2v_1_3b")
    assert text.count("network_module") == 3 and "# PowerShell" in text and "# bash" in text
    assert read_toml(text.partition("# TOML")[2])["network_dim"] == 8


def test_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(
        {"lora_unet_x.lora_down.weight": torch.ones(4, 8), "lora_unet_x.lora_up.weight": torch.ones(8, 4)},
        tmp_path / "x.safetensors",
    )
    assert script.main([str(tmp_path / "x.safetensors"), "--as_args"]) == 2
    assert "--model" in capsys.readouterr().err


def save(network: LoRANetwork, path: Path) -> Path:
    tensors = codec.encode(network.adapted_layers, network.file_format)
    save_file({key: torch.full(t.shape, 0.01) if t.is_meta else t for key, t in tensors.items()}, path)
    return path


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert script.main(argv) == 0
    return capsys.readouterr().out
