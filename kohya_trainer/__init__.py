"""The reference trainer and generator: they call a network module exactly as sd-scripts does."""
