"""What a trainer's script would find: a program, run by its path in a process of its own.

    probe.py FOLDER LATE LIBRARY,... NAME ...

It imports nothing of ours by itself, so that it sees what a script in FOLDER sees which puts LATE last on sys.path. The
last line that it prints is JSON. `probe.py FOLDER torch` asks for torch alone, which takes its time.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import platform
import site
import sys


def owners(names: list[str]) -> dict[str, str | None]:
    """The file of each module; None if there is none."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            spec = importlib.util.find_spec(name)
        except Exception:  # a package on the way may fail in any way; a script would, too
            spec = None
        found[name] = None if spec is None else spec.origin or next(iter(spec.submodule_search_locations or ()), None)
    return found


def distributions(names: list[str]) -> dict[str, str]:
    """The versions of those libraries that are installed."""
    found: dict[str, str] = {}
    for each in importlib.metadata.distributions():
        name = (each.metadata["Name"] or "").lower().replace("_", "-")
        if name in names or any(name.startswith(f"{wanted}-") for wanted in names):
            found.setdefault(name, each.version)
    return found


def added_by() -> dict[str, str]:
    """Folders of sys.path, each with the .pth file that put it there."""
    found: dict[str, str] = {}
    for folder in {*site.getsitepackages(), site.getusersitepackages()}:
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            if name.endswith(".pth"):
                with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
                    found.update((os.path.abspath(os.path.join(folder, line.strip())), name) for line in file)
    return found


def path_facts(late: str, libraries: list[str], names: list[str]) -> dict[str, object]:
    """Whose each module is, and all that decides about it."""
    sys.path.append(late)
    package = importlib.machinery.PathFinder.find_spec("networks")
    return {
        "python": platform.python_version(),
        "prefix": sys.prefix,
        "path": [os.path.abspath(entry or ".") for entry in sys.path],
        "pythonpath": [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry],
        "site": [*site.getsitepackages(), site.getusersitepackages()],
        "pth": added_by(),
        "package": None if package is None else package.origin,
        "modules": owners(names),
        "libraries": distributions(libraries),
        "pip": importlib.util.find_spec("pip") is not None,
    }


def torch_facts() -> dict[str, object]:
    """Its version and what it can compute on; `error` if it does not start."""
    try:
        import torch

        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        mps = torch.backends.mps.is_available()
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else ""
        build = build or (f"ROCm {torch.version.hip}" if torch.version.hip else "")
        return {"version": torch.__version__, "build": build, "devices": names + ["MPS"] * mps}
    except Exception as error:  # a library that it cannot load, a driver that does not answer
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = sys.argv[1]  # where the folder of a script stands
    if sys.argv[2] == "torch":
        answer = torch_facts()
    else:
        answer = path_facts(sys.argv[2], sys.argv[3].split(","), sys.argv[4:])
    print("\n" + json.dumps(answer))
