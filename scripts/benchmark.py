"""What our adapters cost beside those of others, in one run: Markdown tables, and a chart.

    python scripts/benchmark.py                        all tables, some ten minutes
    python scripts/benchmark.py --quick                a small part of each
    python scripts/benchmark.py --sd_scripts PATH --musubi PATH
                                                       with the trainers' own modules, and whole steps of their models
    python scripts/benchmark.py --device cuda --docs docs/cost-gpu.md
                                                       on a GPU; the page and its chart into the documentation

lycoris-lora and peft are compared where they are installed; what is not there is a line in the output. Counts are exact
and the same on every machine. Times are those of one thread of a CPU (of the process, not of the clock on the wall), or
between events on a GPU; all candidates take turns, and of each the lower quartile counts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parent))

from bench.main import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main(__doc__))
