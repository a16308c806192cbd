"""Every program of ours that is given an adapter file opens it once, and comes to the verdict that all others do."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import resize as resize_script
import show as show_script
import torch
from merge import main as merge_main
from safetensors.torch import load_file, save_file
from tiny_parts import randomise, sd_unet
from torch import Tensor, nn

import networks.lora
from networks.files import codec, reader, soundness
from networks.hosts import key_merge

LOADER = """
def load_safetensors_with_fp8_optimization_and_hook(files, weight_hook=None):
    for name in [] if weight_hook is None else files:
        weight_hook(name, files[name], keep_on_calc_device=False)
    return {}
def load_safetensors_with_lora_and_fp8(files, lora_weights_list, lora_multipliers, calc_device):
    return load_safetensors_with_fp8_optimization_and_hook(files, weight_hook=None)
"""


def network_of(unet: nn.Module, **options: str) -> Any:
    made = networks.lora.create_network(1.0, 4, 2, None, None, unet, **options)
    made.apply_to(None, unet, False, True)
    return made


def saved(path: Path, change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None, **options: str) -> Path:
    """A file with random values, changed by hand. Its layers are Linears, which all dialects hold."""
    made = network_of(sd_unet(), **options)
    randomise(made)
    made.save_weights(path, None, {})
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


# -- the doors: each takes a path and the arguments of the network that meets it, and raises ValueError


def network_weights(file: Path, **options: str) -> None:
    network_of(sd_unet(), **options).load_weights(str(file))


def network_weights_of_tensors(file: Path, **options: str) -> None:
    network_of(sd_unet(), **options).load_state_dict(load_file(file))


def dim_from_weights(file: Path, **options: str) -> None:
    unet = sd_unet()
    network, _ = networks.lora.create_network_from_weights(1.0, str(file), None, None, unet, **options)
    network.apply_to(None, unet, False, True)


def base_weights(file: Path, **options: str) -> None:
    unet = sd_unet()
    network, tensors = networks.lora.create_network_from_weights(1.0, str(file), None, None, unet, **options)
    network.merge_to(None, unet, tensors)


def base_weights_of_tensors(file: Path, **options: str) -> None:
    unet, tensors = sd_unet(), load_file(file)
    network = networks.lora.create_arch_network_from_weights(1.0, tensors, unet=unet, for_inference=True, **options)
    network.merge_to(None, unet, tensors)


def gen_img(file: Path, **options: str) -> None:
    unet = sd_unet()
    create = networks.lora.create_network_from_weights
    network, tensors = create(1.0, str(file), None, None, unet, for_inference=True, **options)
    network.apply_to(None, unet)
    network.load_state_dict(tensors, False)


def script(main: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    if code := main(arguments):
        assert code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        raise ValueError(message.removeprefix("error: ").strip())


def show(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints what can be seen, and why the others do not take the file."""
    script(show_script.main, [str(file)], capsys)
    _, refused, why = capsys.readouterr().out.partition("this package, and the trainers with it: no: ")
    if refused:
        raise ValueError(why)


def by_key(file: Path) -> None:
    """What scripts/launch.py makes of a trainer that merges while it loads."""
    utils = ModuleType("lora_utils")
    exec(LOADER, vars(utils))
    key_merge.extend(utils)
    weights = sd_unet().state_dict()
    utils.load_safetensors_with_lora_and_fp8(weights, [load_file(file)], [1.0], calc_device="cpu")


def weight_by_weight(file: Path) -> None:
    tensors = load_file(file)
    left = set(tensors)
    for name, weight in sd_unet().state_dict().items():
        if name.endswith(".weight"):
            flat = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            key_merge.merge_weights_to_tensor(weight, flat, tensors, left, 1.0, "cpu")
    assert not [key for key in left if "." in key]


NETWORKS: dict[str, Callable[..., None]] = {  # with arguments, which may contradict the file
    "--network_weights": network_weights,
    "--network_weights, as tensors": network_weights_of_tensors,
}
FOLLOWERS: dict[str, Callable[..., None]] = {  # their network is what the file says
    "--dim_from_weights": dim_from_weights,
    "--base_weights": base_weights,
    "--base_weights, as tensors": base_weights_of_tensors,
    "gen_img": gen_img,
}
BY_KEY: dict[str, Callable[..., None]] = {"launch.py": by_key, "weight by weight": weight_by_weight}
OF_TENSORS = {"--network_weights, as tensors", "--base_weights, as tensors", *BY_KEY}


@pytest.fixture
def doors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Callable[[Path], None]]:
    """All of them, by name."""
    model, out = tmp_path / "model.safetensors", tmp_path / "out"
    save_file({name: tensor.clone() for name, tensor in sd_unet().state_dict().items()}, model)
    out.mkdir()
    merged = str(out / "merged.safetensors")
    scripts: dict[str, Callable[[Path], None]] = {
        "merge.py": lambda file: script(merge_main, [str(model), str(file), "--out", merged, "--overwrite"], capsys),
        "resize.py": lambda file: script(
            resize_script.main, [str(file), "--dims", "1", "--out_dir", str(out), "--overwrite"], capsys
        ),
        "show.py": lambda file: show(file, capsys),
    }
    return {**NETWORKS, **FOLLOWERS, **BY_KEY, **scripts}


def verdicts(doors: Mapping[str, Callable[[Path], None]], file: Path) -> dict[str, str]:
    """Door -> its message; "" where it takes the file."""
    found = {}
    for name, door in doors.items():
        try:
            door(file)
            found[name] = ""
        except ValueError as error:
            found[name] = str(error)
    return found


def test_a_sound_file_passes_every_door(doors: Any, tmp_path: Path) -> None:
    assert not any(verdicts(doors, saved(tmp_path / "a.safetensors")).values())


# -- one verdict


def broken(suffix: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        key = [key for key in tensors if key.endswith(suffix)][-1]
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[-1] = value

    return change


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], dict[str, str], str]] = {
    "NaN": (broken("lora_up.weight", math.nan), {}, "lora_up.weight has NaN or infinite values: the file is broken"),
    "infinite alpha": (broken(".alpha", math.inf), {}, "alpha has NaN or infinite values: the file is broken"),
    "NaN magnitude": (broken("dora_scale", math.nan), {"use_dora": "True"}, "dora_scale has NaN or infinite values"),
    "a value that nobody knows": (
        lambda tensors: tensors.update({f"{next(iter(tensors)).partition('.')[0]}.gate.weight": torch.ones(2)}),
        {},
        "has gate.weight, a form which this version does not know",
    ),
    "half a layer": (
        lambda tensors: tensors.pop([key for key in tensors if key.endswith("lora_up.weight")][0]),
        {},
        "has lora_down.weight without lora_up.weight",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_file_is_refused_at_every_door(fault: str, doors: Any, tmp_path: Path) -> None:
    change, options, message = FAULTS[fault]
    file = saved(tmp_path / "a.safetensors", change, **options)
    assert {name: said for name, said in verdicts(doors, file).items() if message not in said} == {}
    assert not list((tmp_path / "out").iterdir())


SOURCES: dict[str, tuple[dict[str, str], dict[str, Any] | None, str]] = {
    "header and alpha": (
        {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 3})},
        None,
        "is 0.5 by its alpha, but 0.75 by lora_adapter_metadata in the header: remove the one that is wrong",
    ),
    "settings and alpha": (
        {},
        {"peft_type": "LORA", "r": 4, "lora_alpha": 3},
        "is 0.5 by its alpha, but 0.75 by adapter_config.json: remove the one that is wrong",
    ),
    "a number that is none": ({"alpha": "much"}, None, "alpha is 'much', which is no strength"),
    "two numbers": ({"alpha": "1", "lora_alpha": "2"}, None, "says alpha = 1 and lora_alpha = 2: remove the one"),
}


def with_dots(path: Path) -> Path:
    """The same under diffusers' names."""
    named = {
        f"unet.{name.replace('.', '_')}": f"unet.{name}"
        for name, module in sd_unet().named_modules()
        if isinstance(module, nn.Linear)
    }
    tensors = {}
    for key, tensor in load_file(path).items():
        name, _, suffix = key.partition(".")
        layer = named.get(name.replace("lora_unet_", "unet."))
        if layer is not None:
            tensors[f"{layer}.{suffix}"] = tensor
    assert tensors
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("source", SOURCES)
def test_sources_of_strength_must_agree_at_every_door(source: str, doors: Any, tmp_path: Path) -> None:
    """Where tensors are handed over alone, there is one source."""
    header, settings, message = SOURCES[source]
    file = with_dots(saved(tmp_path / "a.safetensors"))
    save_file(load_file(file), file, header)
    if settings is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    found = verdicts({name: door for name, door in doors.items() if name not in OF_TENSORS}, file)
    assert len(found) == 7 and {name: said for name, said in found.items() if message not in said} == {}


@pytest.mark.parametrize("what", ["cut off", "no header", "pickled", "away", "a folder"])
def test_a_file_that_cannot_be_read_has_one_message(what: str, doors: Any, tmp_path: Path) -> None:
    file = saved(tmp_path / "a.safetensors")
    if what == "cut off":
        file.write_bytes(file.read_bytes()[:-1])
    elif what == "no header":
        file.write_bytes(b"\xff" * 64)
    elif what == "pickled":
        file = file.rename(tmp_path / "a.pt")
    elif what == "away":
        file.unlink()
    else:
        file = tmp_path / "out"
    found = verdicts({name: door for name, door in doors.items() if name not in OF_TENSORS}, file)
    assert len(found) == 7 and len({said.removeprefix("networks.lora: ") for said in found.values()}) == 1
    assert all(found.values())


# -- RS-LoRA and DoRA: a network with arguments must agree with the file, all others follow it


@pytest.mark.parametrize(("trained", "here"), [("True", "False"), ("False", "True")])
def test_rs_lora_has_one_verdict(trained: str, here: str, doors: Any, tmp_path: Path) -> None:
    only_linear = {"save_format": "blissful", "exclude_patterns": ".*(conv|proj_in|proj_out).*"}
    file = saved(tmp_path / "a.safetensors", use_rslora=trained, **only_linear)
    message = f"RS-LoRA flag mismatch: .*use_rslora_flag = {trained}, this network has use_rslora={here}"
    for door in (*NETWORKS.values(), *FOLLOWERS.values()):
        with pytest.raises(ValueError, match=message):
            door(file, use_rslora=here, **only_linear)
        door(file, use_rslora=trained, **only_linear)
    found = verdicts({name: door for name, door in doors.items() if name not in NETWORKS}, file)
    assert not any(found.values())


def test_all_that_follow_a_file_make_the_same_weights(doors: Any, tmp_path: Path) -> None:
    """Of a file with flags, whose alphas mean another strength than in the portable form."""
    options = {"save_format": "blissful", "exclude_patterns": ".*(conv|proj_in|proj_out).*"}
    file = saved(tmp_path / "a.safetensors", use_rslora="True", **options)
    tensors, before = load_file(file), sd_unet().state_dict()
    wanted = {}
    for name, weight in before.items():
        layer = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        if f"{layer}.alpha" in tensors:
            up, down = (tensors[f"{layer}.lora_{side}.weight"].double() for side in ("up", "down"))
            wanted[name] = weight.double() + up @ down * float(tensors[f"{layer}.alpha"]) / math.sqrt(len(down))
    assert len(wanted) > 20
    doors["merge.py"](file)
    made = {"merge.py": load_file(tmp_path / "out" / "merged.safetensors")}
    for name, create in (
        ("--base_weights", lambda unet: networks.lora.create_network_from_weights(1.0, str(file), None, None, unet)[0]),
        ("as tensors", lambda unet: networks.lora.create_arch_network_from_weights(1.0, tensors, unet=unet)),
    ):
        unet = sd_unet()
        create(unet).merge_to(None, unet)
        made[name] = unet.state_dict()
    one_by_one, left = {}, set(tensors)
    for name in wanted:
        flat = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        one_by_one[name] = key_merge.merge_weights_to_tensor(before[name], flat, tensors, left, 1.0, "cpu")
    made["weight by weight"] = one_by_one
    for door, weights in made.items():
        for name, weight in wanted.items():
            torch.testing.assert_close(weights[name].double(), weight, rtol=1e-5, atol=1e-6, msg=f"{door}: {name}")


def test_dora_has_one_verdict(doors: Any, tmp_path: Path) -> None:
    plain = saved(tmp_path / "plain.safetensors")
    some = saved(tmp_path / "some.safetensors", lambda tensors: tensors.pop(next(k for k in tensors if "dora" in k)),
                 use_dora="True")  # fmt: skip
    for file, message in ((plain, "expects DoRA but .* has no magnitudes"), (some, "no DoRA magnitude for 1 of ")):
        for door in NETWORKS.values():
            with pytest.raises(ValueError, match=message):
                door(file, use_dora="True")
        found = verdicts({name: door for name, door in doors.items() if name not in NETWORKS}, file)
        assert not any(found.values())


# -- one decode


def test_a_file_is_opened_once_at_every_door(doors: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes, its values and its layers are looked at once; one weight at a time, each tensor is."""
    calls: Counter[str] = Counter()
    decoded: Counter[str] = Counter()
    for module, name in ((codec, "decode"), (soundness, "readable"), (reader, "read_tensors")):
        real = getattr(module, name)

        def counted(first: Any, *rest: Any, name: str = name, real: Any = real) -> Any:
            calls[name] += 1
            decoded.update([*first] if name == "decode" else [])
            return real(first, *rest)

        monkeypatch.setattr(module, name, counted)
    file = saved(tmp_path / "a.safetensors")
    keys = load_file(file).keys()
    for name, door in doors.items():
        calls.clear()
        decoded.clear()
        door(file)
        times = 2 if name == "show.py" else 1  # under its own names, and under those of the model that it is for
        assert decoded == dict.fromkeys(keys, times), name
        if name != "weight by weight":
            assert calls.pop("decode") == calls.pop("readable") == times, name
            assert calls == ({} if name in OF_TENSORS else {"read_tensors": 1}), name


def test_saving_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network_of(sd_unet(), algo="dylora", save_dims="1,2")
    monkeypatch.setattr(codec, "decode", lambda *args: pytest.fail("decoded what was just encoded"))
    made.save_weights(tmp_path / "a.safetensors", None, {})
    assert {file.name for file in tmp_path.iterdir()} == {
        "a.safetensors", "a-0001.safetensors", "a-0002.safetensors",
    }  # fmt: skip
