"""Checkpoints as people have them: their formats, layouts and spellings, and what changes a model, as a LoRA does."""

from mmdjax.sd.files.places import download, open_file, open_folder

__all__ = ["download", "open_file", "open_folder"]
