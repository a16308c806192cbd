"""For every test: one thread, accelerate and log levels as in a new process. And what a usual run leaves out of long
sweeps.

The models are tiny, and thread pools of parallel test processes, or of programs that a test starts, only wait for each
other. accelerate keeps one state per process, with the precision that came first.

A test marked `sweep` has more combinations of its parameters than a usual run needs, which takes every value of every
parameter at least once. Of `sweep(4)`, whose parameters are combinations themselves, or one list of which a part is
enough, it takes about every fourth, chosen by its name. `--full` takes all, and the tests marked `long` besides; so do
`scripts/check.py --full` and a test that is asked for by its name.
"""

import logging
import os
import sys
import zlib
from collections.abc import Iterator, Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="all combinations of tests marked `sweep`, and those marked `long`"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("full") or any("::" in argument for argument in config.args):
        return
    kept = usual(items)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def usual(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """What a usual run takes of these tests."""
    kept, seen = set[pytest.Item](), set[tuple[str, str, str]]()
    for item in items:
        mark = item.get_closest_marker("sweep")
        if mark is None:
            kept |= set() if item.get_closest_marker("long") else {item}
            continue
        function = item.nodeid.partition("[")[0]
        parameters = item.callspec.params  # type: ignore[attr-defined]
        values = {(function, name, repr(value)) for name, value in parameters.items()}
        chosen = zlib.crc32(item.nodeid.encode()) % mark.args[0] == 0 if mark.args else not values <= seen
        if chosen:
            kept.add(item)
            seen |= values
    return kept


@pytest.fixture(autouse=True)
def _no_accelerator_of_an_earlier_test() -> None:
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _log_levels_of_its_own() -> Iterator[None]:
    """Programs of ours set those of our modules for the whole process."""
    loggers = [logging.getLogger(name) for name in ("networks", "kohya_networks")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
