"""The one gate: format, lint, types, branches per function, generated docs, tests. It runs all and says what failed.

Run it inside the environment: `python scripts/start.py check`. `--fix` formats and mends what ruff can mend;
`--no_tests` leaves out the tests, for a quick look or a commit hook; `--full` takes the long sweeps of the tests, too.
Further arguments go to pytest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("networks", "kohya_networks", "kohya_trainer", "scripts", "tests")
STYLE = ("--line-length", "120", "--target-version", "py310")  # ruff does not read setup.cfg, where all else stands
# pycodestyle, pyflakes, import order, bugbear, syntax of Python 3.10; O and I are our letters for tensor axes (E741)
RULES = ("--select", "E,F,W,I,B,UP", "--ignore", "E741")


def build_steps(fix: bool, tests: bool, pytest_args: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The steps in order, as (name, command)."""
    python = [sys.executable, "-m"]
    folders = [name for name in FOLDERS if (ROOT / name).is_dir()]
    steps = [
        ("format", [*python, "ruff", "format", *([] if fix else ["--check"]), *STYLE, *folders]),
        ("lint", [*python, "ruff", "check", *(["--fix"] if fix else []), *STYLE, *RULES, *folders]),
        ("types", [*python, "mypy", "networks", "kohya_networks", "kohya_trainer", "scripts"]),
        ("branches", [sys.executable, str(ROOT / "scripts" / "branches.py")]),
    ]
    docs = ROOT / "scripts" / "docs.py"
    if docs.is_file():
        steps.append(("docs", [sys.executable, str(docs), *([] if fix else ["--check"])]))
    if tests:
        steps.append(("tests", [*python, "pytest", "-n", "auto", "--dist", "worksteal", *pytest_args]))
    return steps


def main(argv: Sequence[str] | None = None) -> int:
    """Run all steps, also after one failed; returns 0 only if every one passed."""
    parser = argparse.ArgumentParser(
        description="Format, lint, types, branches per function, generated docs and tests.", allow_abbrev=False
    )
    parser.add_argument("--fix", action="store_true", help="format, and mend what ruff can mend")
    parser.add_argument("--no_tests", action="store_true", help="leave out the tests")
    parser.add_argument(
        "--full", action="store_true", help="all combinations of the tests' sweeps: 15 minutes and more"
    )
    args, pytest_args = parser.parse_known_args(argv)
    pytest_args += ["--full"] if args.full else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")  # several test processes with tiny models
    rows = []
    for name, command in build_steps(args.fix, not args.no_tests, pytest_args):
        print(f"\n== {name}: {subprocess.list2cmdline(command[1:])}", flush=True)
        start = time.monotonic()
        code = subprocess.call(command, cwd=ROOT, env=environment)
        rows.append((name, code, time.monotonic() - start))
    print(
        "\n"
        + "\n".join(f"{name:8} {'ok' if code == 0 else f'FAILED ({code})':12} {s:6.1f} s" for name, code, s in rows)
    )
    failed = [name for name, code, _ in rows if code]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
