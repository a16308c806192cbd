"""Adapter files: live tensors <-> saved keys, reading, atomic writing, merging. Knows no trainer."""
