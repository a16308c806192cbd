"""No program writes over what it reads, and over other files only with --overwrite; it says so before any work."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import demo
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kohya_trainer import generate
from kohya_trainer.data.caption_folder import PICTURES
from kohya_trainer.drawing.requests import save_png
from networks.cli import merge, resize
from networks.files.outputs import check_outputs

EMOJI = Path(__file__).resolve().parents[1] / "scripts" / "emoji"
KEY = "blocks.0.attn.to_q"
NAME = "lora_unet_blocks_0_attn_to_q"


def emoji_script(name: str) -> ModuleType:
    sys.path[:0] = [str(EMOJI)]
    try:
        spec = importlib.util.spec_from_file_location(f"emoji_{name}", EMOJI / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(EMOJI))


def contents(folder: Path) -> dict[str, Any]:
    """What a user has: files, and where links point to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


@dataclass
class Case:
    """A call of a program.

    Attributes:
        main: takes the command line.
        arguments: all but the output.
        option: the output's, before its path; "" where the name follows from the inputs.
        output: where it goes.
        inputs: what is read.
    """

    main: Callable[[list[str]], int]
    arguments: list[str]
    option: str
    output: Path
    inputs: list[Path]

    def run(self, output: Path | None = None, *more: str) -> int:
        placed = [self.option, str(output or self.output)] if self.option else []
        return self.main([*self.arguments, *placed, *more])


def lora(path: Path, columns: int = 8) -> Path:
    torch.manual_seed(columns)
    tensors = {"lora_up.weight": torch.randn(8, 4), "lora_down.weight": torch.randn(4, columns)}
    save_file({f"{NAME}.{key}": tensor for key, tensor in tensors.items()}, path)
    return path


def _merge(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    model, first, second = folder / "m.safetensors", lora(folder / "a.safetensors"), lora(folder / "b.safetensors")
    save_file({f"{KEY}.weight": torch.ones(8, 8)}, model)
    arguments = [str(model), str(first), f"{second}=0.5"]
    return Case(merge.main, arguments, "--out", folder / "o.safetensors", [model, first, second])


def _resize(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    file = lora(folder / "a.safetensors")
    arguments = [str(file), "--dims", "1,2", "--out_dir", str(folder)]
    return Case(resize.main, arguments, "", folder / "a-0002.safetensors", [file])


def _demo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    model = folder / "model"
    model.mkdir()
    (model / "model_index.json").write_text("{}")

    def train(script: str, arguments: list[str]) -> None:
        (folder / "before_after.png").write_text("new")
        raise ValueError("all that follows is the trainer's and the generator's")

    monkeypatch.setattr(demo, "run", train)
    arguments = [f"--model={model}", f"--output={folder}"]
    return Case(
        lambda argv: demo.main(argv) - 2, arguments, "", folder / "before_after.png", [model / "model_index.json"]
    )


def _compare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    compare = emoji_script("compare")
    model = folder / "model"
    model.mkdir()
    (model / "model_index.json").write_text("{}")

    def draw(compared: Any, pictures: Path, path: Path) -> None:
        path.write_text("new")

    monkeypatch.setattr(compare, "draw_chart", draw)
    arguments = [f"--model={model}", "--redraw"]
    return Case(compare.main, arguments, "--chart", folder / "chart.png", [model / "model_index.json"])


def _render(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    render = emoji_script("render")
    rows = [render.Emoji("0", "a cat", "style"), render.Emoji("1", "a dog", "heldout")]
    monkeypatch.setattr(render, "read_table", lambda: rows)
    picture = np.full((48, 48, 3), 255, np.uint8)
    picture[:6] = 0
    monkeypatch.setattr(render, "outline_image", lambda code_point: picture)
    monkeypatch.setattr(render, "HERE", folder)
    (folder / "emoji.tsv").write_text("table")
    (folder / "style").mkdir()
    return Case(render.main, [f"--out={folder}"], "", folder / "style" / "a_cat.png", [folder / "emoji.tsv"])


def _pretrain(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    pretrain = emoji_script("pretrain")
    checkpoint = folder / "out" / "checkpoint.pt"
    checkpoint.parent.mkdir()
    checkpoint.write_text("state")

    def write(*args: Any) -> int:
        (folder / "grid.png").write_text("new")
        raise ValueError("all that follows takes an hour")

    monkeypatch.setattr(pretrain, "read_table", write)
    arguments = ["--resume", f"--out={checkpoint.parent}", f"--model={folder / 'model'}"]
    return Case(lambda argv: pretrain.main(argv) - 2, arguments, "", folder / "grid.png", [checkpoint])


MAKERS = {
    "merge": _merge,
    "resize": _resize,
    "demo": _demo,
    "compare": _compare,
    "render": _render,
    "pretrain": _pretrain,
}
every_program = pytest.mark.parametrize("program", MAKERS)
LINKS: dict[str, Callable[[Path, Path], Any]] = {
    "symlink": lambda path, target: path.symlink_to(target),
    "link to a link": lambda path, target: (
        path.with_name("between").symlink_to(target), path.symlink_to(path.with_name("between"))
    ),
    "hard link": lambda path, target: os.link(target, path),
}  # fmt: skip


def refused(case: Case, folder: Path, capsys: pytest.CaptureFixture[str], words: str, *call: Any) -> None:
    before = contents(folder)
    capsys.readouterr()
    code = case.run(*call)
    said = capsys.readouterr().err
    # the two that end in an error anyway subtract its code
    assert said.startswith("error: ") and words in said and said.count("\n") == 1 and code in (0, 2), said
    assert contents(folder) == before


@every_program
@pytest.mark.parametrize("link", LINKS)
def test_an_output_that_is_an_input_by_a_link_is_refused(
    program: str, link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = MAKERS[program](tmp_path, monkeypatch)
    for target in case.inputs:
        LINKS[link](case.output, target)
        for more in ((), ("--overwrite",)):
            refused(case, tmp_path, capsys, "is read", None, *more)
        case.output.unlink()
        case.output.with_name("between").unlink(missing_ok=True)


def test_an_output_that_is_an_input_by_its_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = _merge(tmp_path, monkeypatch)
    (tmp_path / "x").mkdir()
    for target in case.inputs:
        for spelled in (target, tmp_path / "x" / ".." / target.name, Path(os.path.relpath(target))):
            refused(case, tmp_path, capsys, "is read", spelled, "--overwrite")


def test_files_are_compared_and_not_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system that ignores case: two names for which it reports one file."""
    lower, upper = tmp_path / "a.txt", tmp_path / "A.TXT"
    lower.write_text("")
    upper.write_text("")
    found = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **more: found(lower if path == upper else path, **more))
    with pytest.raises(ValueError, match="A.TXT is read \\(as .*a.txt\\)"):
        check_outputs([upper], [lower], overwrite=True)


@every_program
def test_another_file_is_replaced_only_with_overwrite(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = MAKERS[program](tmp_path, monkeypatch)
    case.output.write_text("the user's")
    refused(case, tmp_path, capsys, "--overwrite")
    before = {path: path.read_bytes() for path in case.inputs}
    assert case.run(None, "--overwrite") == 0, capsys.readouterr().err
    assert case.output.read_bytes() != b"the user's"
    assert {path: path.read_bytes() for path in case.inputs} == before


@every_program
def test_a_new_file_needs_no_switch(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = MAKERS[program](tmp_path, monkeypatch)
    assert case.run() == 0, capsys.readouterr().err
    assert case.output.is_file()


def test_all_outputs_are_looked_at_before_the_first_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = _resize(tmp_path, monkeypatch)
    case.output.write_text("the user's")  # of the second dim
    monkeypatch.setattr("networks.files.reader.read_tensors", lambda file: pytest.fail("work before the check"))
    refused(case, tmp_path, capsys, "a-0002.safetensors would be replaced")
    (tmp_path / "a-0001.safetensors").write_text("the user's")
    refused(case, tmp_path, capsys, "a-0001.safetensors and 1 other outputs would be replaced")


def test_merge_looks_at_its_output_before_it_reads_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = _merge(tmp_path, monkeypatch)
    monkeypatch.setattr("networks.files.reader.read_tensors", lambda file: pytest.fail("work before the check"))
    refused(case, tmp_path, capsys, "is read", case.inputs[1])


def test_a_merge_through_a_link_writes_where_it_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _merge(tmp_path, monkeypatch)
    (tmp_path / "disk").mkdir()
    case.output.symlink_to(Path("disk") / "merged.safetensors")
    assert case.run() == 0
    assert case.output.is_symlink() and load_file(tmp_path / "disk" / "merged.safetensors")
    assert case.run() == 2 and case.run(None, "--overwrite") == 0 and case.output.is_symlink()


# -- folders of weights


def component(folder: Path, files: dict[str, list[str]], index: dict[str, str] | None = None) -> Path:
    """A diffusers component: file -> keys; the index is what it should be unless another is given."""
    for name, keys in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({f"{key}.weight": torch.ones(8, 8) for key in keys}, folder / name)
    own = {f"{key}.weight": name for name, keys in files.items() for key in keys}
    (folder / "x.safetensors.index.json").write_text(json.dumps({"weight_map": index or own}))
    (folder / "config.json").write_text("{}")
    return folder


def merge_folder(capsys: pytest.CaptureFixture[str], folder: Path, out: Path, *more: str) -> tuple[int, str]:
    adapter = folder.parent / "a.safetensors"
    code = merge.main([str(folder), str(adapter if adapter.exists() else lora(adapter)), "--out", str(out), *more])
    return code, capsys.readouterr().err


def test_a_folder_is_not_merged_into_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = component(tmp_path / "unet", {"x-1.safetensors": [KEY], "x-2.safetensors": ["other"]})
    (tmp_path / "link").symlink_to("unet")
    lora(tmp_path / "a.safetensors")
    before = contents(tmp_path)
    for out in (folder, tmp_path / "link", folder / "x-1.safetensors", folder / "new", tmp_path / "link" / "new"):
        for more in ((), ("--overwrite",)):
            code, said = merge_folder(capsys, folder, out, *more)
            assert code == 2 and ("is read" in said or "lies in the folder" in said), said
    assert contents(tmp_path) == before


def test_a_folder_replaces_an_empty_one_or_an_earlier_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = component(tmp_path / "unet", {"x-1.safetensors": [KEY], "x-2.safetensors": ["other"]}), tmp_path / "o"
    out.mkdir()
    assert merge_folder(capsys, folder, out)[0] == 0
    merged = contents(out)
    (out / "x-2.safetensors").write_text("older")
    code, said = merge_folder(capsys, folder, out)
    assert code == 2 and "--overwrite" in said
    (tmp_path / "link").symlink_to("o")
    assert merge_folder(capsys, folder, tmp_path / "link", "--overwrite")[0] == 0
    assert contents(out) == merged and (tmp_path / "link").is_symlink()
    (out / "notes.txt").write_text("the user's")
    code, said = merge_folder(capsys, folder, out, "--overwrite")
    assert code == 2 and "notes.txt" in said and (out / "notes.txt").read_text() == "the user's"
    file = tmp_path / "file"
    file.write_text("the user's")
    code, said = merge_folder(capsys, folder, file, "--overwrite")
    assert code == 2 and "is a file" in said and file.read_text() == "the user's"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "sub/../../outside.safetensors", "absolute", "..\\outside"]
)
def test_an_index_that_points_outside_is_refused(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merged folder would name the file without the change."""
    outside = tmp_path / "outside.safetensors"
    save_file({f"{KEY}.weight": torch.ones(8, 8)}, outside)
    place = str(outside) if place == "absolute" else place
    index = {f"{KEY}.weight": place, "other.weight": "x-2.safetensors"}
    folder = component(tmp_path / "unet", {"x-2.safetensors": ["other"], "sub/y.safetensors": ["more"]}, index)
    code, said = merge_folder(capsys, folder, tmp_path / "o")
    assert code == 2 and place in said and "outside its folder" in said and said.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 3}}', "\udcff", "[" * 9999],
)
def test_a_damaged_index_is_one_sentence(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = component(tmp_path / "unet", {"x-1.safetensors": [KEY]})
    (folder / "x.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
    code, said = merge_folder(capsys, folder, tmp_path / "o")
    assert code == 2 and "x.safetensors.index.json is damaged" in said and said.count("\n") == 1, said


def test_the_copy_has_no_weights_without_the_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Files below the folder are merged where they are; weights beside the index's stay behind, by name."""
    folder = component(tmp_path / "unet", {"sub/x-1.safetensors": [KEY], "x-1.safetensors": ["other"]})
    adapter = lora(tmp_path / "a.safetensors")
    kept = ["tokens/vocab.json", "config.json"]
    behind = ["x.fp16.safetensors", "x.bin", "sub/y.ckpt", "x.bin.index.json"]
    (folder / "tokens").mkdir()
    for name in [*kept, *behind]:
        (folder / name).write_text("{}")
    code, said = merge_folder(capsys, folder, tmp_path / "o")
    assert code == 0, said
    inside = {path.relative_to(tmp_path / "o").as_posix() for path in (tmp_path / "o").rglob("*") if path.is_file()}
    assert inside == {*kept, "sub/x-1.safetensors", "x-1.safetensors", "x.safetensors.index.json"}
    assert all(name in caplog.text for name in behind)
    factors = {key.rpartition("lora_")[2]: tensor.double() for key, tensor in load_file(adapter).items()}
    update = factors["up.weight"] @ factors["down.weight"]
    merged = load_file(tmp_path / "o" / "sub" / "x-1.safetensors")[f"{KEY}.weight"]
    assert float((merged.double() - 1 - update).abs().max()) < 1e-5
    assert torch.equal(load_file(tmp_path / "o" / "x-1.safetensors")["other.weight"], torch.ones(8, 8))


# -- pictures


class Family:
    """Draws one colour."""

    title, suffix, native_size, vae, text_encoder_argument = "x", ".png", 8, None, None
    medium, denoiser, device = PICTURES, torch.nn.Identity(), torch.device("cpu")

    def check_size(self, *args: Any) -> None: ...

    def draw(self, batch: Any) -> list[Image.Image]:
        return [Image.new("RGB", (8, 8), "red") for _ in batch]

    def save(self, image: Image.Image, path: Path, request: Any, more: dict[str, str]) -> None:
        save_png(image, path, request, more)


def test_the_generator_goes_on_after_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another run has drawn since it began, and where a link leads to a file or nowhere."""
    monkeypatch.setattr(generate.model_folder, "check_model_folder", lambda *args: None)
    monkeypatch.setattr(generate.model_folder, "load_model", lambda *args: Family())
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("one\ntwo\n")
    folder.mkdir()
    (folder / "im_000000.png").symlink_to(prompts)
    (folder / "im_000001.png").symlink_to(tmp_path / "nothing")
    arguments = [f"--ckpt={tmp_path}", f"--outdir={folder}", f"--from_file={prompts}", "--seeds", "1"]
    first = generate.next_number

    def another_run(folder: Path, name: str) -> int:
        number = first(folder, name)
        for later in (number, number + 1):
            (folder / f"{name}{later:06d}.png").write_text("another run's")
        return number

    monkeypatch.setattr(generate, "next_number", another_run)
    assert generate.main(arguments) == 0
    new = {path.name for path in folder.iterdir() if not path.is_symlink() and path.read_bytes()[1:4] == b"PNG"}
    assert new == {"im_000004.png", "im_000005.png", "grid_000002.png", "grid_000003.png"}
    assert prompts.read_text() == "one\ntwo\n" and not (tmp_path / "nothing").exists()
    assert (folder / "im_000002.png").read_text() == "another run's"


# -- the demo's and the table's own folders


def test_the_demos_own_folder_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _demo(tmp_path, monkeypatch)
    case.output.write_text("of the last demo")
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "x" / "..")
    assert case.run() == 0 and case.output.read_text() == "new"


def test_the_demo_removes_its_own_pictures_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "images"
    for name in ("base/im_000000.png", "base/mine.png", "adapter/im_000007.png", "mine/im_000000.png", "mine.png"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_text("")
    monkeypatch.setattr(demo, "run", lambda script, arguments: None)
    monkeypatch.setattr(demo, "read_images", lambda folder, count: [])
    demo.draw_rows(tmp_path, tmp_path, 1)
    left = {path.relative_to(images).as_posix() for path in images.rglob("*.png")}
    assert left == {"base/mine.png", "mine/im_000000.png", "mine.png"}


def test_outlines_remove_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = _render(tmp_path, monkeypatch)
    (tmp_path / "style" / "holiday.png").write_text("the user's")
    refused(case, tmp_path, capsys, "holiday.png is of no row", None, "--overwrite")
