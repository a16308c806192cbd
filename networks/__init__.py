"""Network modules (LoRA, LoHa, LoKr, ...) for kohya's trainers: one core under every entry.

The folder is a regular package that extends its `__path__`: trainers keep a folder of the same name, and modules of
theirs which we do not offer must stay importable beside ours.
"""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
__version__ = "0.1.0"
