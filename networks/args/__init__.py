"""Every argument of a network, as data; text to values; errors and documentation. Standard library only."""
