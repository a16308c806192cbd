"""From a plan to a network: the layers at work, their optimizer groups, loading, merging, and the watch over them."""
