"""`python -m kohya_networks.cli`, and `python -m networks.cli` where the name is ours."""

from .commands import main

if __name__ == "__main__":
    raise SystemExit(main())
