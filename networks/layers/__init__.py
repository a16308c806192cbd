"""An adapter on a layer: scale, multiplier, dropouts, merge. Knows no architecture and no trainer."""
