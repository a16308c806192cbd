"""From typed arguments and a model to a plan: which layers are trained, and with which dim, alpha and rate."""
