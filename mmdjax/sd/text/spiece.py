"""`spiece.model`, SentencePiece's file of a vocabulary, as an encoding of the package `tokenizers`.

The file is a protocol buffer: fields, each a number with a wire type, and a value. What is needed of it are the pieces
with their log probabilities, the table that text is normalised by, and the id of what is unknown. A prompt is split at
spaces, "▁" is put before each word, and the pieces are those with the largest sum of log probabilities.

The ids are those of transformers 5, which converts the file to `tokenizers` too. SentencePiece itself normalises
some rare texts otherwise, such as letters with two combining marks.

References:
  Kudo 2018 (unigram language model), Kudo & Richardson 2018 (SentencePiece); its sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mmdjax._core.extras import optional
from mmdjax.checkpoint import CheckpointError

LARGEST = 2**26  # bytes; T5's has 800 kB, that of 250,000 pieces 4 MB
NORMAL, CONTROL, USER = 1, 3, 4  # kinds of pieces
UNIGRAM = 1  # of the kinds of models


class Pieces(NamedTuple):
    """What a spiece.model holds.

    Args:
      pieces: (text, log probability, kind), by id.
      unknown: the id of what no piece has.
      table: SentencePiece's rules of normalisation, compiled.
    """

    pieces: tuple[tuple[str, float, int], ...]
    unknown: int
    table: bytes


def read_spiece(path: Path) -> Pieces:
    """The vocabulary in a file.

    Raises:
      CheckpointError: the file is damaged, or is not a unigram model with SentencePiece's usual spaces.
    """
    name = f"{path.parent.name}/{path.name}"
    if path.stat().st_size > LARGEST:
        raise CheckpointError(f"{name} has {path.stat().st_size:,} bytes, more than a vocabulary has")
    try:
        pieces, trainer, normalizer = [], {}, {}
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                pieces.append((str(piece[1], "utf-8"), float(piece.get(2, 0.0)), int(piece.get(3, NORMAL))))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
        table, unknown = bytes(memoryview(normalizer.get(2, b""))), int(trainer.get(40, 0))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{name} is not a SentencePiece model: {error}") from error
    if unknown >= len(pieces):
        raise CheckpointError(
            f"{name} is not a SentencePiece model: {len(pieces)} pieces, the unknown one is {unknown}"
        )
    settings = {
        "model_type": (trainer.get(3, UNIGRAM), UNIGRAM),
        "byte_fallback": (trainer.get(35, 0), 0),
        "add_dummy_prefix": (normalizer.get(3, 1), 1),
        "remove_extra_whitespaces": (normalizer.get(4, 1), 1),
        "escape_whitespaces": (normalizer.get(5, 1), 1),
    }
    other = [f"{key} = {found!r} (implemented: {ours})" for key, (found, ours) in settings.items() if found != ours]
    if other:
        raise CheckpointError(f"{name} has settings that T5's vocabulary does not: {'; '.join(other)}")
    return Pieces(tuple(pieces), unknown, table)


def unigram(path: Path, extra: int) -> Any:
    """The encoding of a file's vocabulary, followed by T5's sentinels <extra_id_…>, the last of which has number 0.

    Args:
      extra: how many sentinels.
    """
    library = optional("tokenizers", "sd", "to read prompts")
    found = read_spiece(path)
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(extra))]
    scores = [(text, score) for text, score, _ in found.pieces] + [(text, 0.0) for text in sentinels]
    try:
        encoding = library.Tokenizer(library.models.Unigram(scores, found.unknown, False))
        if found.table:
            encoding.normalizer = library.normalizers.Precompiled(found.table)
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{path.parent.name}/{path.name} is not a SentencePiece model: {error}") from error
    split = library.pre_tokenizers
    encoding.pre_tokenizer = split.Sequence(
        [split.WhitespaceSplit(), split.Metaspace(replacement="▁", prepend_scheme="always", split=True)]
    )
    special = sentinels + [text for text, _, kind in found.pieces if kind == CONTROL]
    encoding.add_special_tokens([library.AddedToken(text, normalized=False, special=True) for text in special])
    own = [text for text, _, kind in found.pieces if kind == USER]
    encoding.add_tokens([library.AddedToken(text, normalized=False) for text in own])
    return encoding


def _fields(data: Any) -> Iterator[tuple[int, Any]]:
    # (number, value) of a message: whole numbers, floats, or bytes
    data, place = memoryview(data), 0

    def varint():
        nonlocal place
        value = shift = 0
        while True:
            if place >= len(data) or shift > 63:
                raise ValueError("it ends within a number")
            byte, place = data[place], place + 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire)
        size = varint() if wire == 2 else size
        if size is None or place + size > len(data):
            raise ValueError(f"field {number} is of no known type" if size is None else f"field {number} is cut off")
        value, place = data[place : place + size], place + size
        yield number, struct.unpack("<f", value)[0] if wire == 5 else value
