"""Prompts: tokenizers, captions in files, and kernels that compare prompts."""
