"""One thread for every test: the models are tiny, and thread pools of parallel test processes only wait for each other."""

import torch

torch.set_num_threads(1)
