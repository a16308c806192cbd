"""The reference generator from this checkout, whatever is installed; see kohya_trainer/generate.py."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.append(str(HERE / "emoji"))  # the autoencoder of the embedded model

from kohya_trainer.generate import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
