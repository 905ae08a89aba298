"""Reading checkpoint files: safetensors and PyTorch's zip archives as mappings from names to arrays on disk.

An array is read only when it is used: it is a view of the memory map. Files are not trusted. A safetensors header is
checked against the file's size before anything is allocated. A `.ckpt` or `.bin` is a pickle, which can name any
function to be called. Here it may name only constructors of tensors and a few harmless types; nothing is imported, and
any other name is an error.

References:
  the safetensors format (github.com/huggingface/safetensors, "Format"); PyTorch's serialization notes (zip of data.pkl
  and one file a storage).
"""

import dataclasses
import itertools
import json
import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mmdjax._files.atomic import written_whole

MAX_HEADER = 100_000_000  # bytes: the safetensors format's own limit
MAX_JSON = 5 * 2**18  # bytes: parsed it may take 25 times as many. CLIP's vocabulary has 1.06 million
MAX_AXES = 32
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
POINTER = b"version https://git-lfs.github.com/spec/"


class CheckpointError(ValueError):
    """A file that is not the checkpoint it should be. The message names the file and what to do."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one tensor is in a file: shape, dtype, strides in elements (None: C order) and first byte."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Any
    offset: int
    strides: tuple[int, ...] | None = None

    def read(self) -> np.ndarray:
        """The array, a view of the memory map. Read-only."""
        strides = None if self.strides is None else tuple(s * self.dtype.itemsize for s in self.strides)
        return np.ndarray(self.shape, self.dtype, self.file, self.offset, strides)


class Entry(NamedTuple):
    """An array to be written: its shape and dtype for the header, and a function that returns it."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], np.ndarray]


class Checkpoint(Mapping[str, np.ndarray]):
    """Names to arrays, each read from disk when it is used.

    Args:
      stored: where each tensor is, `Stored`, or how to make it from others, `Entry`.
      source: its name in error messages.
      metadata: the strings of a safetensors header's `__metadata__`.
    """

    def __init__(self, stored: Mapping[str, Any], source: str, metadata: Mapping[str, str] | None = None):
        self.stored, self.source, self.metadata = dict(stored), source, dict(metadata or {})

    def __getitem__(self, key: str) -> np.ndarray:
        return self.stored[key].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __contains__(self, key: object) -> bool:
        return key in self.stored

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {len(self)} tensors)"

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return self.stored[key].shape

    def part(self, prefix: str) -> "Checkpoint":
        """The tensors whose names start with a prefix, under the rest of their names."""
        found = {key.removeprefix(prefix): value for key, value in self.stored.items() if key.startswith(prefix)}
        return Checkpoint(found, self.source, self.metadata)


def open_safetensors(path: str | Path) -> Checkpoint:
    """A safetensors file.

    Raises:
      FileNotFoundError: no such file.
      CheckpointError: it is cut off, or its header is unsound.
    """
    path = Path(path)

    def bad(reason):
        return CheckpointError(f"{path.name} is not a sound safetensors file: {reason}")

    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise bad(f"it has {size} bytes; a header alone takes more")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, MAX_HEADER):
            raise bad(f"its header claims {length:,} bytes of a file of {size:,}; the download may have been cut off")
        if length > header_limit(size):
            raise bad(f"its header takes {length:,} of {size:,} bytes, which is more than a model's does")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            raise bad("its header is not JSON") from error
        mapped = map_file(file)
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise bad("its __metadata__ are not strings")
    stored, data, ends = {}, size - 8 - length, []
    for key, entry in header.items():
        try:
            name, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = all(type(n) is int and n >= 0 for n in (*shape, first, last))
            sound = sound and len(shape) <= MAX_AXES and isinstance(name, str)
        except (KeyError, TypeError, ValueError):
            name, shape, first, last, sound = "", (), 0, 0, False
        if not sound:
            raise bad(f"the entry of {key!r} lacks a dtype, a shape or offsets")
        if name not in DTYPES:
            raise bad(f"{key!r} is of dtype {name}; known: {', '.join(DTYPES)}")
        dtype = np.dtype(DTYPES[name])
        needed = dtype.itemsize * math.prod(shape)
        if last - first != needed:
            claim = f"its entry says {last - first:,}"
            raise bad(f"{key!r} of shape {list(shape)} and dtype {name} takes {needed:,} bytes, {claim}")
        if last > data:
            raise bad(f"{key!r} ends at byte {last:,} of {data:,}: the file is cut off")
        stored[key] = Stored(shape, dtype, mapped, 8 + length + first)
        ends.append((first, last, key))
    for (_, end, key), (start, _, other) in itertools.pairwise(sorted(ends)):
        if start < end:
            raise bad(f"{key!r} and {other!r} overlap")
    return Checkpoint(stored, path.name, metadata)


def write_safetensors(
    path: str | Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays one at a time, in the same bytes as the safetensors library.

    The file appears under its name once it is whole.
    """
    order = sorted(entries, key=lambda key: (-np.dtype(entries[key].dtype).itemsize, key))
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key in order:
        entry, start = entries[key], end
        end = start + np.dtype(entry.dtype).itemsize * math.prod(entry.shape)
        header[key] = {"dtype": names[np.dtype(entry.dtype)], "shape": list(entry.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    with written_whole(path) as partial, partial.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for key in order:
            file.write(np.ascontiguousarray(entries[key].read()).reshape(-1).view(np.uint8).data)


def load_weights(path: str | Path) -> dict:
    """A Linen parameter tree from a file of `save_weights`; what it keeps in half precision becomes float32."""
    from flax.traverse_util import unflatten_dict
    from safetensors.numpy import load_file

    arrays = {name: value.astype(np.float32) for name, value in load_file(path).items()}
    joined_by = "/" if any("/" in name for name in arrays) else "."  # older files; no module's name has a dot there
    return unflatten_dict(arrays, sep=joined_by)


def save_weights(path: str | Path, params: Any, metadata: dict[str, str], *, dtype: Any = None) -> None:
    """Write a Linen parameter tree as safetensors, under its paths joined by slashes.

    Args:
      path: the file; it appears under its name once it is whole.
      params: nested dictionaries of arrays.
      metadata: where the weights came from.
      dtype: to write in, such as float16; by default each array's own.
    """
    from flax.traverse_util import flatten_dict
    from safetensors.numpy import save_file

    flat = flatten_dict(params, sep="/")
    with written_whole(path) as partial:
        save_file({name: np.ascontiguousarray(value, dtype) for name, value in flat.items()}, partial, metadata)


def header_limit(size: int) -> int:
    """The largest header accepted in a file of this size.

    Parsed it may take thirty times as much, which stays within 32 MiB and twice the file's size.
    """
    return 2**20 + size // 16


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError if a file is what Git leaves in place of a large file that it did not fetch."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise CheckpointError(
                f"{path.parent.name}/{path.name} is a Git LFS pointer, a note in place of the file: it was cloned "
                "without Git LFS. Run `git lfs pull` in its folder, or download the file"
            )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError if it holds none."""
    name = f"{path.parent.name}/{path.name}"
    refuse_pointer(path)
    if path.stat().st_size > MAX_JSON:
        raise CheckpointError(f"{name} has {path.stat().st_size:,} bytes, more than a configuration or index has")
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{name} is not a JSON object")
    return raw


def map_file(file) -> mmap.mmap:
    """An open file mapped into memory, read when it is used."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
