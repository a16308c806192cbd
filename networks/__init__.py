"""Network modules (LoRA, LoHa, LoKr, ...) for kohya's trainers: one core under every entry.

The folder is a regular package that extends its `__path__`: trainers keep a folder of the same name, and modules of
theirs which we do not offer must stay importable beside ours.
"""

from ._version import __version__ as __version__
from .hosts.beside import watch

__path__ = watch(__name__, __path__)
