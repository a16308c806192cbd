"""One thread for every test and every program that a test starts: the models are tiny, and thread pools of parallel
test processes only wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

torch.set_num_threads(1)
