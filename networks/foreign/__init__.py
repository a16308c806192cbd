"""What others have written, text and regular expressions: taken within bounds, shown without its effects.

Standard library only.
"""
