"""Tiny models of Stable Diffusion's kinds, of random weights and without torch."""

import json
from pathlib import Path

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
SIGNS = [chr(b) for b in PRINTABLE] + [chr(256 + i) for i in range(256 - len(PRINTABLE))]
MERGES = ["c a", "ca t</w>", "d o", "do g</w>"]


def write_tokenizer(folder, *, length=77, pad="<|endoftext|>"):
    """A vocabulary of 518: bytes, the same at the end of a word, "ca", "cat", "do", "dog", start, end."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = SIGNS + [sign + "</w>" for sign in SIGNS] + [merge.replace(" ", "") for merge in MERGES]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8")
    config = {"model_max_length": length, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
