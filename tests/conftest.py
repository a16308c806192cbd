"""For every test: one thread, and accelerate as in a new process.

The models are tiny, and thread pools of parallel test processes, or of programs that a test starts, only wait for each
other. accelerate keeps one state per process, with the precision that came first.
"""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_accelerator_of_an_earlier_test() -> None:
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
