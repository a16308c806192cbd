"""Run any trainer or generator script of sd-scripts or musubi-tuner with these network modules first.

    kohya-networks launch train_network.py ... --network_module networks.lokr
    accelerate launch -m kohya_networks.cli launch train_network.py ... --network_module networks.lokr
    accelerate launch PATH_OF_THE_CHECKOUT/scripts/launch.py train_network.py ... --network_module networks.lokr

The script comes first, all that follows belongs to it. It does not matter how or whether this package is installed, or
whether the script stands in the trainer's root or in musubi-tuner's src/musubi_tuner. The scripts that put adapter
files into a model by code of their own (anima_minimal_inference.py, hunyuan_image_minimal_inference.py, and those of
musubi-tuner that generate or merge) then take every kind of file that this package can save, in the given order.
An adapter file of which much has no place in the model stops them, unless --allow_missing (or --allow_missing=PART)
stands before the script. So does --replace_lycoris, for command lines that say --network_module lycoris.kohya: that
name is networks.lycoris then, whether LyCORIS is installed or not; its other modules stay what they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..hosts import launching
from .command_line import USER_ERROR
from .terminal import fitted

ROOT = Path(__file__).parents[2]  # the folder that holds our packages


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 2 for a mistake in the script's name; otherwise the script's own exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    allowed: list[str] = []
    given: set[str] = set()
    while arguments:
        name, _, value = arguments[0].partition("=")
        spelt = "--" + name[2:].replace("-", "_")
        if spelt == "--allow_missing":
            allowed.append(value)
        elif spelt == "--replace_lycoris" and name == arguments[0]:
            given.add(spelt)
        else:
            break
        del arguments[0]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(fitted(__doc__ or ""), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else USER_ERROR
    try:
        script = launching.find_script(arguments[0])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    launching.run(script, arguments[1:], ROOT, allowed, replace_lycoris=bool(given))
    return 0
