"""Whether diffusers draws the same pictures with an adapter as this package does: prints the largest difference of a
channel of a pixel, of 255.

    python scripts/emoji/read_back.py MODEL FILE [--steps N] [--seed N] CAPTION [CAPTION ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "emoji")]

import torch  # noqa: E402
from pixel_autoencoder import load_pipeline  # noqa: E402

from networks import api  # noqa: E402


def drawn(pipe: Any, captions: list[str], steps: int, seed: int) -> Any:
    """Pictures [N, height, width, 3] of 0 to 1, each from noise of its own."""
    noise = [torch.Generator().manual_seed(seed + number) for number in range(len(captions))]
    pipe.set_progress_bar_config(disable=True)
    return pipe(captions, num_inference_steps=steps, guidance_scale=3.0, generator=noise, output_type="np").images


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the embedded model")
    parser.add_argument("file", type=Path, help="the adapter")
    parser.add_argument("--steps", type=int, default=24, help="of drawing one picture; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the first picture's noise; default: %(default)s")
    parser.add_argument("captions", nargs="+", metavar="CAPTION")
    args = parser.parse_args()
    ours, theirs = load_pipeline(args.model), load_pipeline(args.model)
    api.load(ours, args.file)
    theirs.load_lora_weights(str(args.file.parent), weight_name=args.file.name)
    pictures = [drawn(pipe, args.captions, args.steps, args.seed) for pipe in (ours, theirs)]
    print(float(abs(pictures[0] - pictures[1]).max() * 255))
    return 0


if __name__ == "__main__":
    sys.exit(main())
