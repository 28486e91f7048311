"""Ours beside transformers, and both beside what the machine can do: `python -m bench`."""
