"""Pages of docs/ that are made from records and tables, one module each; scripts/docs.py writes them."""
