"""Diffusion transformers: one file for each family, all of the blocks in `blocks.py`."""
