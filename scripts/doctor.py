"""`kohya-networks doctor` of this checkout, whatever is installed; --help explains it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from networks.cli.doctor import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
