"""The version, in a module of its own.

In some editable installs the package `networks` is the trainer's folder, and our `__init__` never runs.
"""

__version__ = "0.1.0"
