"""The commands of `kohya-networks`."""
