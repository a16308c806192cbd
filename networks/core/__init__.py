"""From typed arguments and a model to a plan, and from a plan to a network. Knows no trainer."""
