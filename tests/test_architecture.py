"""Who may import whom, and that the data folders stay data."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import branches
import imports as drawing
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "networks"
API = PACKAGE / "api.py"

# folder -> folders of ours that it may import
ARROWS = {
    "foreign": set(),
    "records": set(),
    "args": {"foreign", "records"},
    "archs": set(),
    "tensors": set(),
    "algos": {"records", "tensors"},
    "layers": {"algos", "tensors"},
    "files": {"foreign", "layers", "algos", "records", "tensors", "archs"},
    "plan": {"foreign", "files", "layers", "algos", "tensors", "archs", "args"},
    "network": {"plan", "files", "layers", "algos", "tensors", "archs", "args"},
    "hosts": {"foreign", "network", "plan", "files", "args", "archs", "records"},
    "models": {"foreign", "plan", "files", "args", "archs"},
    "tools": {"foreign", "models", "plan", "files", "layers", "algos", "records", "tensors", "archs", "args"},
    "cli": {"foreign", "tools", "models", "hosts", "files", "args", "archs", "records"},
    "": {"hosts"},
    "api": {"tools", "hosts", "network", "plan", "files", "archs", "args"},
}
TRAINER = ROOT / "kohya_trainer"
TRAINER_ARROWS = {"data": set(), "drawing": set(), "families": {"data", "drawing"}}
CORE_LIBRARIES = {"torch", "safetensors", "toml"}
TORCHLESS = {"foreign", "records", "args", "archs"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(file: Path, package: Path = PACKAGE) -> list[tuple[str, bool]]:
    """(module, at top level) of every import; the package's own as `.folder`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    folder = file.parent.relative_to(package).parts
    found = []
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                found.append(((node.module or "").split(".")[0], top))
                continue
            base = folder[: len(folder) - (node.level - 1)]
            path = [*base, *(node.module or "").split(".")]
            found.append(("." + (path[0] if path[0] else ""), top))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_arrows(file: Path) -> None:
    folder = file.parent.relative_to(PACKAGE).parts[0] if file.parent != PACKAGE else ""
    folder = "api" if file == API else folder
    for module, top in imports(file):
        assert module != "networks", f"{file}: absolute import of ourselves; the folder must work under another name"
        if module.startswith("."):
            target = module[1:]
            inside = target in ("", folder) or not (PACKAGE / target).is_dir()  # "": the version
            assert inside or target in ARROWS[folder], f"{file}: {folder} must not import {target}"
        elif module == "kohya_trainer":
            assert (folder, top) == ("cli", False), f"{file}: only commands know the trainer, inside their functions"
        elif module not in sys.stdlib_module_names:
            assert folder not in TORCHLESS or (module == "toml" and not top), f"{file}: {module} in a data folder"
            assert module in CORE_LIBRARIES or not top or folder == "hosts", f"{file}: {module} at import time"


def test_two_commands_know_the_trainer() -> None:
    know = [file.name for file in FILES if any(module == "kohya_trainer" for module, _ in imports(file))]
    assert len(know) <= 2, f"train and generate call the trainer, and nothing else: {know}"


@pytest.mark.parametrize("file", sorted(TRAINER.rglob("*.py")), ids=lambda f: str(f.relative_to(TRAINER)))
def test_arrows_of_the_trainer(file: Path) -> None:
    """It calls networks by its absolute name, as any trainer does, and nothing of the checkout beside the two."""
    folder = file.parent.relative_to(TRAINER).parts[0] if file.parent != TRAINER else ""
    beside = {path.stem for part in ("scripts", "scripts/emoji", "tests") for path in (ROOT / part).glob("*.py")}
    for module, top in imports(file, TRAINER):
        if module.startswith("."):
            inside = module[1:] in ("", folder) or folder in ("", "state")
            assert inside or module[1:] in TRAINER_ARROWS[folder], f"{file}: {folder} must not import {module}"
        elif module not in sys.stdlib_module_names:
            assert module not in beside | {"kohya_trainer"}, f"{file}: {module} is not packed, or is itself"
            assert module in CORE_LIBRARIES | {"networks", "kohya_networks"} or not top, (
                f"{file}: {module} at import time"
            )


@pytest.mark.parametrize("module", ["kohya_trainer.train", "kohya_trainer.generate"])
def test_the_trainer_says_what_to_install(module: str) -> None:
    """Without the libraries of the extra `train`: --help is there, and a run ends with one sentence."""
    code = (
        "import sys\n"
        "for name in 'diffusers transformers accelerate matplotlib PIL tqdm numpy'.split(): sys.modules[name] = None\n"
        f"from {module} import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    found = {}
    for option in ("--help", "--debug"):
        found[option] = subprocess.run([sys.executable, "-c", code, option], cwd=ROOT, capture_output=True, text=True)
    assert found["--help"].returncode == 0 and "usage:" in found["--help"].stdout
    assert found["--debug"].returncode == 2
    last = found["--debug"].stderr.splitlines()[-1]
    assert all(name in last for name in ("diffusers", "pillow", 'pip install "kohya-networks[train]"')), last
    assert ("accelerate" in last) == module.endswith("train")


def undocumented(tree: ast.AST) -> set[str]:
    """Public functions with four or more parameters whose docstrings do not say what these are."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if len([name for name in names if name not in ("self", "cls")]) >= 4:
                found |= set() if "Args" in (ast.get_docstring(node) or "") else {node.name}
    return found


def test_functions_of_the_trainer_say_what_they_take() -> None:
    """The methods of a family are described once, in the contract."""
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(TRAINER.rglob("*.py"))}
    contract = {
        node.name for node in ast.walk(trees[TRAINER / "families" / "base.py"]) if isinstance(node, ast.FunctionDef)
    }
    for file, tree in trees.items():
        inherited = contract if file.parent.name == "families" and file.stem != "base" else set()
        assert undocumented(tree) <= inherited, file


def test_core_imports_only_torch_and_safetensors() -> None:
    """Every entry, imported in a fresh interpreter in which the optional libraries do not exist."""
    entries = sorted(f.stem for f in PACKAGE.glob("*.py") if f.stem != "__init__")
    code = (
        "import sys\n"
        "for name in 'diffusers transformers accelerate bitsandbytes matplotlib PIL tqdm peft'.split():\n"
        "    sys.modules[name] = None\n"
        f"import importlib\nfor entry in {entries}:\n    importlib.import_module('networks.' + entry)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_entries_are_short() -> None:
    for file in set(PACKAGE.glob("*.py")) - {API}:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 40, f"{file.name} is an entry"


def test_no_function_has_too_many_branches() -> None:
    assert branches.problems() == []


def test_branches_and_boolean_operators_are_counted() -> None:
    source = "def f(a, b):\n if a and b or a:\n  return [x for x in a if x]\n def g():\n  return 1 if a else 2"
    assert branches.count(ast.parse(source).body[0]) == 5  # if, and, or, for, if of the list; g counts by itself


def test_imports_have_no_circle() -> None:
    assert drawing.circle(drawing.module_graph()) == []
    assert drawing.circle(drawing.folder_graph()) == []


def test_a_circle_of_imports_is_found() -> None:
    assert set(drawing.circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    assert "networks.tensors" in drawing.folder_graph()["networks.algos"]  # and the imports are seen


def test_no_script_hides_a_standard_module() -> None:
    for file in (ROOT / "scripts").glob("*.py"):
        assert file.stem not in sys.stdlib_module_names


def test_a_host_module_of_the_same_package_still_imports(tmp_path: Path) -> None:
    """sd-scripts' networks folder has no __init__.py: ours wins where both have a module, theirs fills the rest. An
    installed copy of ours, made here or there where the tests run, comes behind."""
    host, other = tmp_path / "host", tmp_path / "installed"
    for folder in (host, other):
        (folder / "networks").mkdir(parents=True)
        (folder / "networks" / "lora.py").write_text("raise SystemExit('the wrong one')\n")
    (host / "networks" / "control_net_lllite.py").write_text("NAME = 'host'\n")
    (other / "networks" / "__init__.py").write_text("raise SystemExit('the wrong copy')\n")
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import networks.lora, networks.control_net_lllite as c\n"
        "print(networks.lora.__file__, c.NAME)"
    )
    folders = [str(folder) for folder in (host, ROOT, other)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, *folders], check=True, capture_output=True, text=True, cwd=tmp_path,
        env=environment,
    )  # fmt: skip
    assert str(PACKAGE / "lora.py") in done.stdout and done.stdout.strip().endswith("host")
