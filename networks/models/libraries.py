"""The libraries that hold the model classes, kept from remarks of their own."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Silence the libraries' remarks at import time, which a user can do nothing about."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # what they lack on this machine
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    # the older name of `dtype`, which every version understands
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
