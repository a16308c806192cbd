"""Released models, known well enough to be planned without their weights."""
