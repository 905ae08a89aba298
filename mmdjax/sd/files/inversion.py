"""Textual inversion: new tokens with learnt embeddings.

A file holds k vectors of the width of one of CLIP's text encoders. They become rows of its table of embeddings, and
their names, "<cat>", "<cat>_1", …, tokens of its tokenizer, where "<cat>" in a prompt stands for all k.

    emb_params                  [k, d]   A1111's safetensors; also string_to_param.* in a .pt
    "<cat>" or another name     [d] or [k, d], alone in the file: diffusers
    clip_l, clip_g              [k, d] each, for the two encoders of SDXL

References:
  Gal et al. 2023 (textual inversion).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mmdjax.checkpoint import Checkpoint, CheckpointError, Entry
from mmdjax.sd.files import convert
from mmdjax.sd.files.places import open_file
from mmdjax.sd.networks.clip import CLIPText

ALONE = ("emb_params", "string_to_param.*", "*")
ENCODERS = {
    "clip_l": "text_encoder",
    "text_encoders_0": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_1": "text_encoder_2",
}
TABLE = "text_model.embeddings.token_embedding.weight"


class NewRows(NamedTuple):
    """Rows of a text encoder's table of embeddings.

    Args:
      first: the id of the first; the others follow.
      rows: their values.
      end: the id of the token that ends a prompt.
    """

    first: int
    rows: Float[np.ndarray, "k d"]
    end: int

    def config(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The encoder's config.json with them."""
        size = raw.get("vocab_size", 49408)
        if self.first > size:
            raise CheckpointError(
                f"the vocabulary has {self.first} tokens, the text encoder {size}; add no tokens to parts of two models"
            )
        # 2 means that the largest id ends a prompt, which it no longer is
        ends = {"eos_token_id": self.end} if raw.get("eos_token_id") == 2 else {}
        return {**raw, "vocab_size": max(size, self.first + len(self.rows)), **ends}

    def checkpoint(self, plain: Checkpoint) -> Checkpoint:
        """The encoder's tensors, in diffusers' naming, with them."""
        table, last = plain.stored[TABLE], self.first + len(self.rows)

        def read():
            old = table.read()
            return np.concatenate([old[: self.first], self.rows.astype(old.dtype), old[last:]])

        shape = (max(table.shape[0], last), table.shape[1])
        return Checkpoint({**plain.stored, TABLE: Entry(shape, table.dtype, read)}, plain.source, plain.metadata)


def add_tokens(
    textual_inversion: Mapping[Any, Any], tokenizers: Mapping[str, Any], components: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, NewRows]]:
    """The tokenizers with new tokens, and the rows that their encoders need.

    Args:
      textual_inversion: the file of each token.
      tokenizers: by text encoder.
      components: `Component` by name.
    Raises:
      TypeError, ValueError: not a mapping, or a name that cannot be a token.
      FileNotFoundError: no such file.
      CheckpointError: the file holds something else, or vectors of another width than the encoders'.

    Example:
      >>> add_tokens({}, {}, {})
      ({}, {})
    """
    if not isinstance(textual_inversion, Mapping):
        raise TypeError(f"textual_inversion is {textual_inversion!r}; give the file of each token: {{'<cat>': file}}")
    tokenizers, new = dict(tokenizers), {}
    encoders = {name: module for name, (module, *_) in components.items() if isinstance(module, CLIPText)}
    widths = {name: module.config.hidden_size for name, module in encoders.items() if name in tokenizers}
    for token, path in textual_inversion.items():
        for name, rows in _read(path, widths).items():
            before = tokenizers[name]
            names = [token, *(f"{token}_{i}" for i in range(1, len(rows)))]
            tokenizers[name] = before.with_tokens(names)
            first = tokenizers[name].encoding.token_to_id(token)
            old = new.get(name)
            new[name] = NewRows(first, rows, before.end) if old is None else _joined(old, rows)
    return tokenizers, new


def _joined(old: NewRows, rows: np.ndarray) -> NewRows:
    return old._replace(rows=np.concatenate([old.rows, rows]))


def _read(path: Any, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """A file's vectors by text encoder."""
    file = open_file(path)
    entries = {ENCODERS[key]: entry for key, entry in file.stored.items() if key in ENCODERS}
    if len(entries) != len(file):
        alone = [key for key in ALONE if key in file] or list(file)
        if len(alone) > 1 or entries:
            convert.refuse_foreign(file)
            raise CheckpointError(
                f"{file.source} is no textual inversion: it holds {len(file)} tensors, the first {next(iter(file))}; "
                f"one holds {' or '.join(ALONE[:2])}, a single tensor, or clip_l and clip_g"
            )
        width = file.shape(alone[0])[-1:]
        fitting = [name for name, wanted in widths.items() if width == (wanted,)]
        entries = {(fitting or [next(iter(widths), "text_encoder")])[0]: file.stored[alone[0]]}
    return {name: _vectors(file.source, name, entry, widths) for name, entry in entries.items()}


def _vectors(source: str, name: str, entry: Any, widths: Mapping[str, int]) -> np.ndarray:
    there = ", ".join(f"{name} {width}" for name, width in widths.items()) or "none with a vocabulary"
    if name not in widths:
        raise CheckpointError(f"{source} has vectors for {name}; the model's text encoders and their widths: {there}")
    shape = entry.shape
    if len(shape) not in (1, 2) or shape[-1] != widths[name] or 0 in shape:
        raise CheckpointError(
            f"{source} has vectors of shape {list(shape)}; the model's text encoders and their widths: {there}"
        )
    rows = entry.read().astype(np.float32).reshape(-1, shape[-1])
    if not np.isfinite(rows).all():
        raise CheckpointError(f"{source} holds values that are not finite")
    return rows
