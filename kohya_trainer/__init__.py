"""The reference trainer and generator: small programs that call a network module exactly as sd-scripts does.

    train.py, train_options.py      the trainer: one run, from its options to the saved file
    generate.py                     the generator
    data/                           examples on disk: pictures, sounds, captions
    drawing/                        what is to be drawn, and sheets of what was
    families/                       how each family of models reads text and data, learns and draws: a file for each
    model_folder, small_weights     opening a model in diffusers' layout, frozen; in 4 or 8 bits
    training_data                   which examples and which noise a step has; caches of what stays the same
    losses, loss_log, samples       what is minimised, the record of it, and pictures on the way
    training, sharding              network, optimizer and accelerate, as the options ask; the model over several GPUs
    state/                          interrupting, going on, and whose files are in a folder

Importing any of it needs what networks needs; running it needs the libraries of the extra `train`. `networks` is ours
in their process, wherever they are started: also inside a trainer's checkout, which has a folder of that name.
"""

from __future__ import annotations

import importlib.util

from kohya_networks.hosts.beside import claim

claim()

# names of modules; the packages have the same name, or the one behind the colon
TRAINING = ("accelerate", "diffusers", "transformers", "numpy", "PIL:pillow", "tqdm", "matplotlib")
DRAWING = ("diffusers", "transformers", "numpy", "PIL:pillow", "tqdm")


def check_libraries(names: tuple[str, ...]) -> None:
    """Raise ValueError when one of these libraries is not installed, see TRAINING and DRAWING."""
    missing = [name.split(":")[-1] for name in names if importlib.util.find_spec(name.split(":")[0]) is None]
    if missing:
        raise ValueError(
            f"libraries of the reference trainer and generator are not installed: {', '.join(missing)}. "
            'Install them: pip install "kohya-networks[train]"'
        )
