"""Shapes and small pure tensor functions. Knows nothing of algorithms, architectures or trainers."""
