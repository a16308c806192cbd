"""`plan` of a trainer's own command line or settings: read as the trainer reads it, all mistakes at once."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from toy_models import recorded

from networks.archs.detect import detect
from networks.args.parse import Problems
from networks.cli import plan as script
from networks.cli import trainer_line
from networks.hosts.trainer_scripts import MUSUBI, SCRIPTS, WHOLE_MODEL
from networks.models.releases import RELEASES, arch_of, release_called
from networks.models.skeleton import skeleton

SDXL = "accelerate launch --num_cpu_threads_per_process 1 sdxl_train_network.py --pretrained_model_name_or_path m "


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = script.main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def read(text: str, mistakes: int = 0) -> trainer_line.TrainerRun:
    problems = Problems("line")
    found = trainer_line.run_of_text(text, problems)
    assert len(problems.messages) == mistakes, problems.messages
    return found


def mistakes(text: str) -> str:
    problems = Problems("line")
    trainer_line.run_of_text(text, problems)
    return "\n".join(problems.messages)


def test_starters_shells_and_forms_of_a_line_say_the_same() -> None:
    """As one text for each shell, or as words; what stands before the script and after the command does not count."""
    options = (
        "--network_module networks.lokr --network_dim=8 --network_args factor=8 'use_dora=True' --xformers --seed 7"
    )
    starts = (
        "accelerate launch --mixed_precision bf16 sdxl_train_network.py",
        "CUDA_VISIBLE_DEVICES=0 python -u /x/y/sdxl_train_network.py",
        "uv run --extra cu128 accelerate launch ./sdxl_train_network.py",
        "torchrun --nproc_per_node 2 sdxl_train_network.py",
        "kohya-networks launch --allow_missing=lora_te2 sdxl_train_network.py",
        "cd sd-scripts && source venv/bin/activate; python sdxl_train_network.py",
    )
    for start in starts:
        for end in ("", " > log.txt 2>&1", " | tee log.txt", " # the last one"):
            found = read(start + " " + options + end)
            assert (found.name, found.host, found.others) == ("sdxl_train_network.py", "sd-scripts", 2), start
            assert found.given | {"network_args": 0} == {
                "network_module": "networks.lokr", "network_dim": "8", "network_args": 0
            }  # fmt: skip
            assert found.words == {"factor": "8", "use_dora": "True"}
    module = read("python -m musubi_tuner.wan_train_network --network_module networks.lora_wan --network_dim 4")
    assert (module.name, module.host) == ("wan_train_network.py", MUSUBI)
    for text in (
        "python wan_train_network.py `\n --dit C:\\a\\b.safetensors --network_module networks.lora_wan # c",
        "python wan_train_network.py ^\n --dit C:\\a\\b.safetensors --network_module networks.lora_wan & pause",
        "set M=C:\\a\\b.safetensors\npython wan_train_network.py --dit %M% --network_module networks.lora_wan",
        "$m = 'C:\\a\\b.safetensors'\npython wan_train_network.py `\n --dit \"$m\" --network_module networks.lora_wan",
        "M='C:\\a\\b.safetensors'\npython wan_train_network.py \\\n --dit $M --network_module networks.lora_wan",
    ):
        assert read(text).given == {"dit": "C:\\a\\b.safetensors", "network_module": "networks.lora_wan"}, text
    ours = read("kohya-networks train --network_module networks.lora --train_data_dir x")
    assert (ours.script, ours.others) == (trainer_line.OURS, 1)


LINE = "python sdxl_train_network.py --network_module networks.lora "
MISTAKES = [  # what stands behind the line; what is said of it
    ("--network_dimm 8", "no option is called --network_dimm; did you mean --network_dim?"),
    ("--networks_args a=1", "did you mean --network_args?"),
    ("--network-dim 8", "--network-dim is not known to the trainer: write --network_dim"),
    ("--network_rank 8", "no option is called --network_rank"),
    ("--conv_dim 8", "--conv_dim is no option but a network argument: write it into --network_args, conv_dim=VALUE"),
    ("--unet_lrr 1", "did you mean --unet_lr?"),
    ("–network_dim 8", "begins with a dash of print, which is no hyphen: write --network_dim"),
    ("--network_dim 8 16", "--network_dim takes a single value, not 8 16"),
    ("--network_dim", "--network_dim takes a single value: give one"),
    ("--network_train_unet_only True", "--network_train_unet_only takes no value: remove True"),
    ("--network_args=factor=8 conv_dim=4", "write --network_args factor=8 conv_dim=4, without the ="),
    (
        "--network_args a=1 --network_args b=2",
        "--network_args stands there twice, and the trainer takes the last alone",
    ),
    ("--network_args algo", '"algo" is not of the form NAME=VALUE'),
    ("--network_args a=1 a=2", "a is given twice, and the trainer takes the last"),
    ("--network_dim $DIM_OF_NOBODY", "a variable which this line does not set: write its value (bash)"),
    ("--seed 1 ^", "^ is where a line goes on in another shell"),
    ("--dim_from_weights", "--dim_from_weights is given without --network_weights"),
    ("--network_train_unet_only --network_train_text_encoder_only", "leave nothing: give one of them"),
]


def test_mistakes_of_a_line() -> None:
    """Each is told, and none where it is right; abbreviations work as in the trainers."""
    for rest, said in MISTAKES:
        assert said in mistakes(LINE + rest), rest
    assert "--network_module is missing" in mistakes("python train_network.py --network_dim 8")
    assert "x stands before the first option" in mistakes("python train_network.py x --network_module networks.lora")
    found = read(LINE + "--network_arg a=1 --network_args_of_mine 1", 1)
    assert found.words == {"a": "1"} and "--network_arg is taken as --network_args" in found.notes[0]
    wan = "python wan_train_network.py --network_module networks.lora_wan "
    assert "wan_train_network.py has no --unet_lr" in mistakes(wan + "--unet_lr 1")
    assert "a=b=c has a second =, at which musubi-tuner stops" in mistakes(wan + "--network_args a=b=c")
    assert "opens the switch as if it were the file" in mistakes(wan + "--network_weights a --dim_from_weights")
    assert read(LINE + "--network_args network_reg_dims=.*a=1,b=2").words == {"network_reg_dims": ".*a=1,b=2"}


def test_lines_that_do_not_go_on() -> None:
    """Documents print them so; in a shell they end the command."""
    text = "python sdxl_train_network.py \n --network_module networks.lora \n --network_dim 8\n"
    found = read(text)
    assert found.given["network_dim"] == "8" and "line 2 begins with an option" in found.notes[0]
    for name, sign in (("a.sh", "\\"), ("a.ps1", "`"), ("a.bat", "^")):
        problems = Problems("")
        assert trainer_line.run_of_text(text, problems, name).given["network_dim"] == "8"
        assert problems.messages[0].endswith(f"must end in {sign}")


def test_lines_that_train_no_network() -> None:
    for text, said in (
        ("ls -la", "no script of a trainer is started here"),
        ("", "holds no command"),
        ("python sdxl_train_netwrk.py --a", "Did you mean sdxl_train_network.py?"),
        ("accelerate launch flux_train.py --a", "flux_train.py trains the model itself and takes no network"),
        (LINE + "\n\n" + LINE, "starts 2 trainings, in lines 1, 3"),
        (LINE + "'a", "is never closed"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            trainer_line.run_of_text(text, Problems(""))
    assert not WHOLE_MODEL & SCRIPTS.keys()


def test_scripts_that_know_what_is_trained() -> None:
    """LECO: a network module of its own, and no text encoder."""
    found = read("python train_leco.py --prompts_file p.toml --network_dim 8 --network_train_unet_only")
    assert found.given["network_module"] == "networks.lora" and "networks.lora" in found.notes[0]
    found = read("accelerate launch sdxl_train_leco.py --network_module networks.loha --unet_lr 1e-4")
    assert found.given["network_module"] == "networks.loha" and found.given["network_train_unet_only"] is True
    assert not found.notes and found.script is not None and found.script.release == "sdxl"
    told = mistakes("python train_leco.py --network_train_text_encoder_only --text_encoder_lr 1e-4")
    assert "train_leco.py trains no text encoder: remove --network_train_text_encoder_only" in told
    assert "train_leco.py has no --text_encoder_lr" in told and "leave nothing" not in told
    found = read("python mage_flow_train_network.py --dit m --network_dim 8")
    assert found.given["network_module"] == "musubi_tuner.networks.lora_mage_flow"
    told = mistakes("python mage_flow_train_network.py --dit m --network_module networks.lora_mage_flow")
    assert "takes no other --network_module than musubi_tuner.networks.lora_mage_flow" in told
    for module in ("lora_qwen_image_21", "lora_minimax_h3", "lora_lens"):
        name = f"{module.removeprefix('lora_')}_train_network.py"
        assert read(f"python {name} --dit m").given["network_module"] == f"networks.{module}"
    assert {"flux_2_train.py", "flux_kontext_train.py", "ideogram4_train.py", "krea2_train.py"} <= WHOLE_MODEL


def test_every_script_has_a_release_for_each_of_its_choices() -> None:
    for name, one in SCRIPTS.items():
        releases = {one.release, *(release for found in one.choices.values() for release in found.values())} - {""}
        archs = {arch_of(RELEASES[release]).entry for release in releases}
        assert len(archs) <= 1, name
    for text, release in (
        ("wan_train_network.py --task t2v-1.3B", "wan_t2v_1_3b"),
        ("wan_train_network.py --task i2v-A14B", "wan22_i2v_14b"),
        ("wan_train_network.py", "wan_t2v_14b"),
        ("train_network.py --v2 --v_parameterization", "sd21"),
        ("train_network.py", "sd15"),
        ("flux_train_network.py --model_type chroma", "chroma"),
        ("flux_2_train_network.py --model_version klein-base-9b", "flux_2_klein_9b"),
        ("kandinsky5_train_network.py --task k5-pro-i2v-5s-hd", "kandinsky"),
        ("kandinsky5_train_network.py --task k5-lite-i2i-hd", "kandinsky_lite_image"),
    ):
        found, problems = read(f"python {text} --network_module networks.lora"), Problems("")
        assert found.script and script._release(found.script, found, problems) == release and not problems.messages
    found, problems = read("python wan_train_network.py --task t2v-14b --network_module networks.lora"), Problems("")
    assert found.script and script._release(found.script, found, problems) == "wan_t2v_14b"
    assert "--task t2v-14b is none of" in problems.messages[0] and "did you mean t2v-14B?" in problems.messages[0]


def test_a_line_is_checked_and_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """Parts, learning rates and defaults are those of the run, and what it says of itself comes first."""
    rest = "--network_module lycoris.kohya --network_args algo=loha preset=attn-mlp --network_dim 4 --base_weights b"
    line = f"{SDXL} {rest} --unet_lr 1e-4 --text_encoder_lr 5e-5 0".split()
    code, out, err = run(capsys, "--trained", "--", *line)
    assert code == 0 and not err
    assert "lycoris.kohya is another package's module; planned is networks.lycoris" in out
    assert "m is not on this machine, so this is planned for Stable Diffusion XL (sdxl)" in out
    assert "--base_weights b is merged" in out
    assert "learning rates: text_encoder1 5e-05, text_encoder2 0 (not trained), unet 0.0001" in out
    assert "text_encoder1: 72 layers (72x loha dim 4" in out and "text_encoder2: " not in out
    line = "python train_network.py --network_module networks.lora --network_train_unet_only"
    code, out, _ = run(capsys, "--json", "--trained", "--", line)
    data = json.loads(out)
    assert set(data["totals"]["trained_by_part"]) == {"unet"} and data["run"]["script"] == "train_network.py"
    others = {"sd21": "Stable Diffusion 2.1"}
    assert data["model"] == {"title": "Stable Diffusion 1.5", "release": "sd15", "others": others}


def test_mistakes_come_together(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the options, of the network arguments and of what only the model shows."""
    line = "--network_module networks.lora_flux --network_dimm 8 --network_args rank_dropot=1 conv_dim=x --unet_lr nan"
    code, out, err = run(capsys, SDXL + line)
    assert code == 2 and not out
    assert "4 problems" in err or "5 problems" in err
    for word in ("--network_dimm", "rank_dropout", "conv_dim=x is not", "use --network_module networks.lora\n"):
        assert word in err, word
    code, _, err = run(capsys, SDXL + "--network_module networks.lora --unet_lr nan --learning_rate x")
    assert code == 2 and "2 problems" in err and "--unet_lr=nan is not a finite number" in err


def header(path: Path, arch: str) -> Path:
    """A checkpoint of full size without its content."""
    shapes = {f"{e.dotted}.weight": e.shape for e in recorded(arch) if e.part in ("unet", "dit") and e.shape}
    entries = {key: {"dtype": "F16", "shape": list(shape), "data_offsets": [0, 0]} for key, shape in shapes.items()}
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


def test_settings_and_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, model = tmp_path / "s.toml", header(tmp_path / "w.safetensors", "wan")
    settings.write_text(
        f"dit = '{model}'\nseed = 1\n[net]\nnetwork_module = 'networks.lora_wan'\nnetwork_dim = 8\n"
        "network_args = ['loraplus_lr_ratio=4']\n",
        encoding="utf-8",
    )
    code, out, err = run(capsys, "--config", str(settings), "--trained")
    assert code == 0, err
    assert "this is planned" not in out and "(wan); other sizes: wan_t2v_14b" in out  # by its header
    assert "480x lora dim 8 scale 0.125" in out and out.count("x1/x4") == 480
    problems = Problems("")
    found = trainer_line.run_of_settings(str(tmp_path / "s"), "wan_train_network.py", "", problems)
    assert (found.host, found.others, found.given["network_dim"]) == (MUSUBI, 1, 8) and not problems.messages
    line = read(f"python wan_train_network.py --config_file {settings.as_posix()} --network_dim 2 --learning_rate 1e-4")
    assert (line.given["network_dim"], line.words) == ("2", found.words) and "settings of" in line.notes[0]
    found, problems = read(f"{SDXL} --network_module networks.lora"), Problems("")
    script._check_model(skeleton("sdxl"), found, problems)
    assert not problems.messages
    script._check_model(skeleton("wan"), found, problems)
    assert "sdxl_train_network.py does not train Wan 2.1 / 2.2" in problems.messages[0]
    settings.write_text(
        "network_modul = 'networks.lora'\nnetwork_args = 'a=1'\nnetwork_train_unet_only = 'false'\nnetwork_dim = [1]\n"
        "conv_dim = 8\n[x]\nunet_lrr = 1\n",
        encoding="utf-8",
    )
    code, _, err = run(capsys, "sdxl", "--config", str(settings))
    for word in ("network_modul; did you mean network_module?", "network_args = 'a=1' is not a list",
                 "conv_dim is no option",
                 "network_train_unet_only = 'false' is not true or false", "network_dim = [1] is not a single value",
                 "unet_lrr; did you mean unet_lr?", "--network_module is missing"):  # fmt: skip
        assert word in err, word
    settings.write_text("network_module = 'networks.lora'\n", encoding="utf-8")
    code, _, err = run(capsys, "--config", str(settings))
    assert code == 2 and "what it trains is not known without the model" in err and "dry_run=True" in err
    code, _, err = run(capsys, "sdxl_train.py", "--config", str(settings))
    assert code == 2 and "sdxl_train.py trains the model itself and takes no network" in err
    code, _, err = run(capsys, "sdxl_train_netwrk.py", "--config", str(settings))
    assert code == 2 and "is no script that trains a network; did you mean sdxl_train_network.py?" in err


def test_zero_and_nothing_in_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 is a rate, and as alpha the dim; an empty text and false are what programs write for options that are not
    given."""
    settings = tmp_path / "s.toml"
    settings.write_text(
        "network_module = 'networks.lora'\nnetwork_alpha = 0\nunet_lr = 0\ntext_encoder_lr = 5e-5\n"
        "network_weights = ''\nscale_weight_norms = 0\ndim_from_weights = false\nnetwork_args = []\n",
        encoding="utf-8",
    )
    code, out, err = run(capsys, "train_network.py", "--config", str(settings), "--trained")
    assert code == 0 and "text_encoder: 72 layers (72x lora dim 4 scale 1)" in out and "unet 0 (not trained)" in out, (
        err
    )
    assert "unet: " not in out
    code, out, _ = run(capsys, "sd15", "--network_alpha", "0", "--network_train_unet_only", "--trained")
    assert "unet: 192 layers (192x lora dim 4 scale 1)" in out


def test_command_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.ps1"
    text = "# train\n$dim = 2\npython sdxl_train_network.py `\n --network_module networks.lora --network_dim $dim\n"
    file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    code, out, err = run(capsys, "sd15", "--command_file", str(file), "--json", "--trained")  # the model goes before
    assert (
        code == 0 and {row["dim"] for row in json.loads(out)["rows"]} == {2} and len(json.loads(out)["rows"]) == 264
    ), err
    file.write_bytes(text.encode("utf-16"))
    code, _, err = run(capsys, "--command_file", str(file))
    assert code == 2 and "is no text in UTF-8" in err
    code, _, err = run(capsys, "--command_file", str(file), "--config", "x")
    assert code == 2 and "give one" in err


def test_a_file_that_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, layer = tmp_path / "a.safetensors", "lora_unet_mid_block_attentions_0_proj_in"
    factors = {
        f"{layer}.lora_down.weight": torch.ones(3, 1280, 1, 1),
        f"{layer}.lora_up.weight": torch.ones(1280, 3, 1, 1),
    }
    save_file(factors | {f"{layer}.alpha": torch.tensor(6.0)}, file)
    line = ["python", "train_network.py", "--network_module", "networks.lora", "--network_weights", str(file)]
    code, out, err = run(capsys, "--trained", "--", *line, "--dim_from_weights")
    assert code == 0 and "unet: 1 layers (1x lora dim 3 scale 2), 0 left out" in out and layer in out, err
    code, out, _ = run(capsys, "--trained", "--", *line, "--network_dim", "3")
    assert code == 0 and "training goes on from its values, 263 layers start anew" in out
    code, _, err = run(capsys, "--", *line)
    assert code == 2 and f"1 layers have another form in it, such as {layer}, lora of dim 3, here lora of dim 4" in err
    assert "resume_resize=True gives a file of another dim these ranks" in err
    code, out, err = run(capsys, "--trained", "--", *line, "--network_args", "resume_resize=True")
    assert code == 0 and "1 layers get other ranks as they are loaded" in out, err
    code, _, err = run(
        capsys, "--", *line[:-1], str(tmp_path / "b.safetensors"), "--dim_from_weights", "--network_args", "a=1"
    )
    assert code == 2 and "2 problems" in err and "b.safetensors" in err


def test_what_a_network_says_of_the_trainers_options(capsys: pytest.CaptureFixture[str]) -> None:
    """As it does in the trainer, when that shows them."""
    line = "python wan_train_network.py --task t2v-1.3B --network_module networks.lora_wan --full_bf16 "
    line += "--optimizer_type prodigyopt.Prodigy --network_args loraplus_lr_ratio=4 "
    code, out, _ = run(capsys, "--trained", "--", line)
    assert code == 0 and "warning: --full_bf16: bf16 has two to three digits" in out
    assert "warning: prodigyopt.prodigy expects one learning rate" in out
    code, out, _ = run(capsys, "--trained", "--", line + "adapter_dtype=fp32")
    assert code == 0 and "--full_bf16" not in out
    code, _, err = run(capsys, "--", line + "use_dora=True --dit_high_noise x")
    assert code == 2 and "use_dora does not go with two experts" in err
    code, _, err = run(capsys, "--", line + "ggpo_sigma=0.1 ggpo_beta=0.1")
    assert code == 2 and "this trainer does not tell a network when a step is over" in err


def test_models_by_the_names_that_people_have(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {
        "SDXL": "sdxl", "sd xl": "sdxl", "wan2.1-t2v-1.3b": "wan_t2v_1_3b", "WAN": "wan",
        "Wan 2.2 TI2V 5B": "wan22_ti2v_5b",
        "flux.1-dev": "flux", "FLUX.2-klein-9B": "flux_2_klein_9b", "SD1.5": "sd15", "sd3.5-large": "sd35_large",
        "Qwen-Image": "qwen_image", "hunyuanvideo": "hunyuan_video", "HunyuanVideo 1.5": "hv_1_5", "z-image": "zimage",
        "kandinsky-lite": "kandinsky_lite", "anima": "anima", "Lumina Image 2.0": "lumina",
    }  # fmt: skip
    found = {name: release_called(name) for name in rows}
    assert {name: one and one.name for name, one in found.items()} == rows
    model = skeleton("Wan 2.1 T2V-1.3B")
    assert model.release is RELEASES["wan_t2v_1_3b"] and detect(model.unet).name == "wan"
    code, out, _ = run(capsys, "WAN", "--trained")
    title = out.splitlines()[0]
    assert code == 0 and title.startswith("Wan 2.1 / 2.2: Wan 2.1 image to video, 14B (wan); other sizes: ")
    assert "wan_t2v_1_3b (Wan 2.1 text to video, 1.3B)" in title
    code, _, err = run(capsys, "flx")
    assert code == 2 and "did you mean flux?" in err
    code, out, _ = run(capsys, "sd15", "--network_module", "lycoris.kohya", "--trained")
    assert code == 0 and "planned is networks.lycoris" in out


def test_modules_of_others_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "foreign_module.py").write_text("def create_network(): ...\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    code, _, err = run(capsys, "sd15", "--network_module", "foreign_module")
    assert code == 2 and "foreign_module is another package's" in err and len(err.splitlines()) == 1


def test_warnings_are_printed_and_stages_only_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["flux", "--trained", "--network_args", "train_norm=True"]
    code, out, err = run(capsys, *words)
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert code == 0 and warnings and not err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    code, out, err = run(capsys, *words, "--json")
    assert [f"warning: {text}" for text in json.loads(out)["warnings"]] == warnings
    assert "loading torch" in err and "planning" in err and err.rstrip(" \r").endswith("writing ...")


PATHS = [os.environ[name] for name in ("SD_SCRIPTS_PATH", "MUSUBI_PATH") if os.environ.get(name)]


def check_options(path: str) -> None:
    """Every name of an option in the sources of a trainer."""
    sources: list[Any] = [*Path(path).glob("*train_network*.py"), *Path(path, "library").glob("*.py")]
    sources += Path(path).glob("*train_leco.py")
    package = Path(path, "src", "musubi_tuner")
    sources += [*package.glob("*_train_network*.py"), *package.glob("training/*.py"), *package.glob("*/*utils.py")]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    host = MUSUBI if Path(path, "src").exists() else "sd-scripts"
    name = next(name for name, one in SCRIPTS.items() if one.host == host)
    for option in sorted(set(re.findall(r'"--([a-z_0-9A-Z]+)"', text)) - trainer_line.NETWORK.keys() - {"unet_lr"}):
        known = trainer_line._known(SCRIPTS[name])
        run = trainer_line.TrainerRun(name, host, SCRIPTS[name])
        assert option in known or not trainer_line._misspelt(option, known, run, str), option
    programs = {
        source.name for source in sources if re.search("_train_network(_self_flow)?.py$|train_leco.py$", source.name)
    }
    assert programs <= SCRIPTS.keys() and len(programs) > 5


if PATHS:

    @pytest.mark.parametrize("path", PATHS)
    def test_options_of_the_trainers_are_never_taken_for_misspelt_ones(path: str) -> None:
        check_options(path)
