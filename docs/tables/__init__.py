"""The tables and plots of README.md and docs, by subject; `docs/generate.py` says which stands where."""
