"""Experiments, one file each; names.py lists them."""
