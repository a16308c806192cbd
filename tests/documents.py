"""The written pages as a reader meets them: fenced blocks, links, headings, and the commands that a block holds.

And a folder with everything that the pages' examples speak of, under the names that they use.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_models import make_sd
from torch import Tensor

from networks import api
from networks.cli.shell_text import BASH, CMD, POWERSHELL, commands

ROOT = Path(__file__).resolve().parents[1]
SHELLS = {"bash": BASH, "powershell": POWERSHELL, "bat": CMD}
OUTPUT = {"console", "text"}  # console: lines that begin with `$ ` are commands, and the others what they print
TAGS = {*SHELLS, *OUTPUT, "toml", "python", "mermaid"}
ELISION = "..."  # arguments of the trainer's own that an example leaves out
# What a reader puts the path of the checkout for.
CHECKOUT = re.compile(r"PATH_OF_THIS_CHECKOUT|path[/\\]to[/\\]kohya-networks")


def pages() -> list[Path]:
    """All that is checked."""
    alone = ("README.md", "CONTRIBUTING.md", "presets/README.md", "scripts/emoji/README.md")
    return [*(ROOT / name for name in alone), *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: of its fence, from 1.
        tag: its language; "" = none is given.
        text: what it holds, with the end of its last line.
    """

    line: int
    tag: str
    text: str


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page; one that is never closed ends with the page."""
    begun: tuple[int, str, str] | None = None
    held: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"\s*(```+|~~~+)\s*(\S*)", line)
        if begun is None and fence:
            begun, held = (number, fence[2], fence[1]), []
        elif begun is not None and fence and fence[1].startswith(begun[2]) and not fence[2]:
            yield Block(begun[0], begun[1], "".join(held))
            begun = None
        else:
            held.append(f"{line}\n")
    if begun is not None:
        yield Block(begun[0], "never closed", "".join(held))


def prose(text: str) -> str:
    """A page without its fenced blocks, with as many lines."""
    lines = text.splitlines()
    for block in blocks(text):
        lines[block.line - 1 : block.line + block.text.count("\n") + 1] = [""] * (block.text.count("\n") + 2)
    return "\n".join(lines)


def inline_code(text: str) -> list[str]:
    """What stands between backticks in the prose, on one line or over the end of one."""
    return [re.sub(r"\s+", " ", code).strip() for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(text))]


def links(text: str) -> list[str]:
    """Targets of links and pictures, without those inside of code."""
    plain = re.sub(r"(?<!`)`[^`]+`(?!`)", "", prose(text))
    return re.findall(r"\]\(\s*<?([^)\s>]+)", plain)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them: lower case, blanks to hyphens, what is neither letter nor number away."""
    found: dict[str, int] = {}
    names = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for title in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", prose(text), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
        names.add(f"{name}-{found[name]}" if found[name] else name)
    return names


@dataclass(frozen=True)
class Line:
    """A command of a block.

    Attributes:
        line: of the page, from 1.
        words: with the checkout's path in its place, without elisions and without variables set before it.
        printed: what the page shows under it; None = it shows nothing.
    """

    line: int
    words: tuple[str, ...]
    printed: str | None = None


def shell_lines(block: Block) -> Iterator[Line]:
    """The commands of a block for a shell."""
    shell = SHELLS[block.tag]
    text = CHECKOUT.sub(ROOT.as_posix(), block.text)
    for command in commands(text, shell, {}):
        words = [word for word in command.words if word != ELISION]
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words:
            yield Line(block.line + command.line, tuple(words))


def console_lines(block: Block) -> Iterator[Line]:
    """The commands of a block that shows what they print."""
    for found in re.finditer(r"^\$ (.+(?:\\\n.+)*)\n((?:(?!\$ ).*\n)*)", block.text, re.M):
        inner = Block(block.line + block.text[: found.start()].count("\n"), "bash", found[1] + "\n")
        for line in shell_lines(inner):
            yield Line(line.line, line.words, found[2].strip())


# -- the files of the examples

WIDTH, TEXT, DIM = 640, 2048, 4
LAYERS = {  # of SDXL, a few of one block: dotted name in a checkpoint -> shape
    f"input_blocks.4.1.transformer_blocks.0.{name}": (WIDTH, width)
    for name, width in (("attn1.to_q", WIDTH), ("attn1.to_out.0", WIDTH), ("attn2.to_k", TEXT))
}
LORAS = ("my-lora", "undo", "cat", "dog", "out/last", "my-dora")
STEPS = (100, 200, 300)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_examples(folder: Path) -> None:
    """Everything that the pages' examples read: a few layers of SDXL as checkpoints and adapters, a tiny Stable
    Diffusion in diffusers' layout, and a trainer's settings.

    Args:
        folder: empty.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 0.02) -> Tensor:
        return std * torch.randn(*shape, generator=generator)

    def saved(name: str) -> str:
        return "lora_unet_" + name.replace(".", "_")

    def lora() -> dict[str, Tensor]:
        found = {}
        for name, (rows, columns) in LAYERS.items():
            found[f"{saved(name)}.lora_up.weight"] = normal(rows, DIM)
            found[f"{saved(name)}.lora_down.weight"] = normal(DIM, columns)
            found[f"{saved(name)}.alpha"] = torch.tensor(float(DIM))
        return found

    def form(pairs: str) -> dict[str, Tensor]:
        """LoHa (`hada`) or LoKr (`lokr`)."""
        found: dict[str, Tensor] = {}
        for name, (rows, columns) in LAYERS.items():
            found[f"{saved(name)}.alpha"] = torch.tensor(2.0)
            if pairs == "lokr":
                found[f"{saved(name)}.lokr_w1"] = normal(8, 8)
                found[f"{saved(name)}.lokr_w2_a"] = normal(rows // 8, 2)
                found[f"{saved(name)}.lokr_w2_b"] = normal(2, columns // 8)
                continue
            for index in (1, 2):
                found[f"{saved(name)}.hada_w{index}_a"] = normal(rows, 2)
                found[f"{saved(name)}.hada_w{index}_b"] = normal(2, columns)
        return found

    (folder / "out").mkdir()
    for name in LORAS:
        save_file(lora(), folder / f"{name}.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    first = lora()
    for step in STEPS:
        moved = {key: value + 0.001 * normal(*value.shape) if value.dim() else value for key, value in first.items()}
        save_file(moved, folder / f"my-lora-step{step:08}.safetensors", {"ss_steps": str(step)})
    save_file(form("hada"), folder / "my-loha.safetensors")
    save_file(form("lokr"), folder / "my-lokr.safetensors")
    broken = lora()
    del broken[next(key for key in broken if key.endswith("lora_up.weight"))]
    save_file(broken, folder / "broken.safetensors")
    weights = {f"model.diffusion_model.{name}.weight": normal(*shape).half() for name, shape in LAYERS.items()}
    save_file(weights, folder / "base.safetensors")
    save_file(weights, folder / "model.safetensors")
    changed = {key: value + normal(*value.shape, std=0.002).half() for key, value in weights.items()}
    save_file(changed, folder / "tuned.safetensors")
    make_sd(folder / "sd")
    write_tiny(folder)
    line = "accelerate launch sdxl_train_network.py{0}\n --network_module networks.lokr --network_args factor=8\n"
    (folder / "train.sh").write_text(line.format(" \\"), encoding="utf-8")
    (folder / "train.ps1").write_text(line.format(" `"), encoding="utf-8")
    settings = 'network_module = "networks.lokr"\nnetwork_dim = 8\nnetwork_args = ["factor=8"]\n'
    (folder / "settings.toml").write_text(settings, encoding="utf-8")
    (folder / "dims.toml").write_text("'.*attn2.*' = 8\n", encoding="utf-8")
    (folder / "mine.toml").write_text('unet_target_module = ["*"]\nexclude_name = [".*attn1.*"]\n', encoding="utf-8")


def write_tiny(folder: Path) -> None:
    """A UNet of diffusers, the same after it was trained, and adapters of it: what the tools' examples work on."""
    (folder / "model").mkdir()
    shutil.copytree(folder / "sd" / "unet", folder / "model" / "unet")
    shutil.copytree(folder / "sd" / "unet", folder / "tuned")
    weights = load_file(folder / "tuned" / WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    for key, value in weights.items():
        if not key.startswith("conv_out"):
            value += 0.02 * torch.randn(value.shape, generator=generator)
    save_file(weights, folder / "tuned" / WEIGHTS, {"format": "pt"})
    unet = UNet2DConditionModel.from_pretrained(str(folder / "model" / "unet"), local_files_only=True)
    for seed, name in enumerate(("style", "person", "run-step00000001")):
        network = api.apply(unet, dim=DIM)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for parameter in network.parameters():
                parameter.data.normal_(std=0.1)
        network.save(folder / f"{name}.safetensors", metadata={"ss_steps": "1"})
        for step in (2, 3) if name.startswith("run") else ():
            for parameter in network.parameters():
                parameter.data *= 1.01
            network.save(folder / f"run-step0000000{step}.safetensors", metadata={"ss_steps": str(step)})
        network.detach()


def copy_examples(source: Path, target: Path) -> None:
    """The same for one page: no tool writes over an input, so large files need no copy of their own."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            linked(path, place)


def linked(path: Path, place: Path) -> None:
    """One more name for a file, or a copy where the system has no links."""
    try:
        os.link(path, place)
    except OSError:
        shutil.copy(path, place)


def link_scripts(folder: Path) -> None:
    """The embedded model, under the path that it has in a checkout."""
    model = ROOT / "scripts" / "emoji" / "model"
    for path in model.rglob("*.*"):
        place = folder / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        linked(path, place)
