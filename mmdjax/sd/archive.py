"""Reading files of `torch.save` without torch and without running what is in them.

Such a file is a zip of a pickle and an entry for each storage. A pickle can name any function to be called. Here it may
name only the constructors of tensors, which record where the tensor is, and a few harmless types. Nothing is imported;
any other name is an error.

References:
  PyTorch's notes on serialization; Python's `pickle`, "Restricting globals".
"""

import collections
import dataclasses
import io
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mmdjax.checkpoint import MAX_HEADER, Checkpoint, CheckpointError, Stored, header_limit, map_file

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# What the training scripts' checkpoints carry beside tensors. Read as inert objects: neither imported nor called.
INERT = {
    ("argparse", "Namespace"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
}
GROUPS = ("state_dict", "ema", "model")  # where the tensors of a training's checkpoint lie; the average before the last
COMPRESSED = "the archive is compressed; torch.save writes it plain. Unpack and repack it"


def open_archive(path: str | Path) -> Checkpoint:
    """A file of `torch.save`, read without torch. See `open_file`.

    The tensors lie at the top or in one of `GROUPS`, whose name is then the metadata's "group".
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in entries if name.split("/")[-1] == "data.pkl"]
            if len(pickles) != 1:
                raise CheckpointError(f"{path.name} is a zip archive without data.pkl: not a file of torch.save")
            info, limit = entries[pickles[0]], min(MAX_HEADER, header_limit(path.stat().st_size))
            if info.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path.name}: {COMPRESSED}")
            if info.file_size > limit:
                raise CheckpointError(f"{path.name} holds a pickle of more than {limit:,} bytes")
            program = archive.read(pickles[0])
    except CheckpointError:
        raise
    except Exception as error:  # zipfile's own, struct's, zlib's: a broken archive can fail in any way
        reason = f"{error}; the download may have been cut off"
        raise CheckpointError(f"{path.name} is not a whole zip archive: {reason}") from error
    try:
        tree = _Unpickler(path.name, program).load()
    except CheckpointError:
        raise
    except Exception as error:  # a pickle is a program: it can fail in any way
        raise CheckpointError(f"{path.name} holds a pickle that cannot be read: {error}") from error
    tree = tree if isinstance(tree, dict) else {}
    group = next((name for name in GROUPS if isinstance(tree.get(name), dict)), None)
    tree = tree if group is None else tree[group]
    tensors = {key: value for key, value in tree.items() if isinstance(value, _Tensor)}
    if not tensors:
        where = ", ".join(f'"{name}"' for name in GROUPS)
        raise CheckpointError(f"{path.name} holds no tensors, neither at the top nor under {where}")
    prefix = pickles[0].removesuffix("data.pkl")
    with path.open("rb") as file:
        mapped = map_file(file)
    order = entries.get(f"{prefix}byteorder")
    start = 0 if order is None else _start(mapped, order)
    if order is not None and mapped[start : start + 3] == b"big":
        raise CheckpointError(f"{path.name} was written on a big-endian machine, which is not supported")
    stored = {key: _locate(path.name, key, value, prefix, entries, mapped) for key, value in tensors.items()}
    return Checkpoint(stored, path.name, None if group is None else {"group": group})


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle._Unpickler):
    """Reads tensors as places in the archive. What it hands out is made anew each time, so that a file can alter
    nothing. The one in Python: the one in C takes memory for as many memos as a single number in the file says.
    """

    def __init__(self, source: str, data: bytes):
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.source = source

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, tuple(shape), tuple(strides))
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda tensor, *_: tensor
        if (module, name) in INERT:
            return type(
                name, (), {"__new__": lambda cls, *_: object.__new__(cls), "__setstate__": lambda self, state: None}
            )
        raise CheckpointError(
            f"{self.source} asks for {module}.{name}, which is not a tensor; it was refused and nothing in it was run. "
            "Files with code in them can harm you: use a safetensors version of this checkpoint"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
            raise CheckpointError(
                f"{self.source} refers to {kind!r} outside the pickle; only tensors' storage is known"
            )
        return _Storage(dtype, key)


def _locate(source, key, tensor, prefix, entries, mapped) -> Stored:
    """A tensor's place in the archive, checked against the size of its storage."""
    storage = tensor.storage
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    sound = len(tensor.shape) == len(tensor.strides) and all(type(n) is int and n >= 0 for n in numbers)
    if not isinstance(storage, _Storage) or not sound:
        raise CheckpointError(f"{source}: {key!r} is not a tensor that torch.save wrote")
    info = entries.get(f"{prefix}data/{storage.key}")
    if info is None:
        raise CheckpointError(f"{source}: the data of {key!r} are missing from the archive")
    if info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{source}: {COMPRESSED}")
    reach = 0
    if math.prod(tensor.shape):
        reach = tensor.offset + 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if reach * storage.dtype.itemsize > info.file_size:
        raise CheckpointError(f"{source}: {key!r} of shape {list(tensor.shape)} reaches beyond its storage")
    start = _start(mapped, info)
    if start + info.file_size > len(mapped):
        raise CheckpointError(f"{source}: the data of {key!r} are cut off")
    return Stored(tensor.shape, storage.dtype, mapped, start + tensor.offset * storage.dtype.itemsize, tensor.strides)


def _start(mapped, info) -> int:
    # the local header repeats the name and has extra bytes of its own (torch pads with them)
    if info.header_offset + 30 > len(mapped):
        raise CheckpointError(f"{info.filename} lies beyond the end of the archive")
    name, extra = struct.unpack_from("<HH", mapped, info.header_offset + 26)
    return info.header_offset + 30 + name + extra
