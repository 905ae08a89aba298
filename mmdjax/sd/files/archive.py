"""Reading files of `torch.save` without torch and without running what is in them.

Such a file is a zip of a pickle and an entry for each storage. A pickle can name any function to be called. Here it may
name only the constructors of tensors, which record where the tensor is, and a few harmless types. Nothing is imported;
any other name is an error.

References:
  PyTorch's notes on serialization; Python's `pickle`, "Restricting globals".
"""

import collections
import io
import math
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

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
    "UntypedStorage": np.uint8,
}
NEW_DTYPES = {  # of tensors whose storage does not say it
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
}
# What checkpoints carry beside tensors, and torch's own restricted loader reads; and what training scripts leave there.
# Read as inert objects: neither imported nor called.
INERT = re.compile(
    r"torch\.(Size|device|Tensor|nn\.parameter\.Parameter|serialization\._get_layout"
    r"|(b?float|complex|u?int|quint|qint|bits)\d+\w*|bool|strided|per_(tensor|channel)_\w+|\w+_format)"
    r"|torch\._utils\._rebuild_(qtensor|sparse_tensor|nested_tensor|meta_tensor_no_storage)"
    r"|collections\.Counter|(builtins|__builtin__)\.(set|frozenset|complex|bytearray)|argparse\.Namespace|_codecs\.encode"
    r"|numpy\.(dtype|ndarray|_?core\.multiarray\.(scalar|_reconstruct))|pathlib\.(Posix|Windows)Path"
    r"|pytorch_lightning\.callbacks\.model_checkpoint\.ModelCheckpoint"
)
# where tensors lie, if not on top; an average before the last step's
NESTED = ("state_dict", "ema", "model", "module", "params_ema", "params", "generator")
# Groups whose name says what the tensors are: A1111's textual inversions, IP-Adapters. It stays in the tensors' names.
NAMED = ("string_to_param", "image_proj", "ip_adapter")
COMPRESSED = "the archive is compressed; torch.save writes it plain. Unpack and repack it"


def open_archive(path: str | Path) -> Checkpoint:
    """A file of `torch.save`, read without torch. See `open_file`.

    The tensors lie at the top or under one of `NESTED`, whose name is then the metadata's "group".
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
    group, tensors = _tensors(tree, path.name)
    prefix = pickles[0].removesuffix("data.pkl")
    with path.open("rb") as file:
        mapped = map_file(file)
    order = entries.get(f"{prefix}byteorder")
    start = 0 if order is None else _start(mapped, order)
    if order is not None and mapped[start : start + 3] == b"big":
        raise CheckpointError(f"{path.name} was written on a big-endian machine, which is not supported")
    stored = {key: _locate(path.name, key, value, prefix, entries, mapped) for key, value in tensors.items()}
    return Checkpoint(stored, path.name, None if group is None else {"group": group})


# Tuples, which a pickle cannot alter once they are made.


class _Kind(NamedTuple):
    """The name of a class of storages or of a dtype."""

    name: str


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensors(tree: Any, source: str) -> tuple[str | None, dict[str, _Tensor]]:
    """The tensors at the top of what a pickle holds, else those of the first of NESTED that has any, and its name."""
    tree = tree if isinstance(tree, dict) else {}
    places = {"state_dict": tree.get("state_dict"), None: tree} | {name: tree.get(name) for name in NESTED}
    for group, inner in places.items():
        found = inner if isinstance(inner, dict) else {}
        if isinstance(found.get("state_dict"), dict):
            found = found["state_dict"]
        tensors = {key: value for key, value in found.items() if isinstance(value, _Tensor)}
        if tensors:
            return group, tensors
    named = {name: tree[name] for name in NAMED if isinstance(tree.get(name), dict)}
    tensors = {f"{name}.{k}": v for name, inner in named.items() for k, v in inner.items() if isinstance(v, _Tensor)}
    if tensors:
        return None, tensors
    there = [repr(key) for key in tree]
    beside = f"; there are {', '.join(there[:10])}" if there else ""
    raise CheckpointError(
        f'{source} holds no tensors, neither at the top nor under "state_dict" or {", ".join(NESTED[1:])}{beside}'
    )


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
        if (module in ("torch", "torch.storage") and name in STORAGES) or (module == "torch" and name in NEW_DTYPES):
            return _Kind(name)
        match module, name:
            case "torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2":
                return lambda storage, offset, shape, strides, *_: _Tensor(
                    storage, offset, tuple(shape), tuple(strides)
                )
            case "torch._utils", "_rebuild_tensor_v3":
                return _rebuild_v3
            case "torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state":
                return lambda tensor, *_: tensor
            case "torch._utils", "_rebuild_device_tensor_from_cpu_tensor":
                return lambda tensor, *_: tensor
            case "torch._tensor", "_rebuild_from_type_v2":
                return lambda function, cls, args, state: function(*args)
        if INERT.fullmatch(f"{module}.{name}"):
            return type(name, (), dict.fromkeys(_METHODS, _nothing) | {"__new__": _made})
        raise CheckpointError(
            f"{self.source} asks for {module}.{name}, which is not a tensor; it was refused and nothing in it was run. "
            "Files with code in them can harm you: use a safetensors version of this checkpoint"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, of, key, *_ = pid
        if kind != "storage" or not isinstance(of, _Kind) or of.name not in STORAGES or not isinstance(key, str):
            raise CheckpointError(
                f"{self.source} refers to {kind!r} outside the pickle; only tensors' storage is known"
            )
        return _Storage(np.dtype(STORAGES[of.name]), key)


_METHODS = ("__setstate__", "__setitem__", "append", "extend", "add", "update")  # that the opcodes of a pickle call


def _nothing(self: Any, *_: Any) -> None:
    """Any method of an inert object."""


def _made(cls: Any, *_: Any, **__: Any) -> Any:
    return object.__new__(cls)


def _rebuild_v3(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any) -> Any:
    # a storage of bytes, and the dtype said beside it
    kind = NEW_DTYPES[dtype.name] if isinstance(dtype, _Kind) and dtype.name in NEW_DTYPES else None
    if kind is None or not isinstance(storage, _Storage):
        return None  # of a dtype that no checkpoint's weights have: reported as missing
    return _Tensor(_Storage(np.dtype(kind), storage.key), offset, tuple(shape), tuple(strides))


def _locate(source, key, tensor, prefix, entries, mapped) -> Stored:
    """A tensor's place in the archive, checked against the size of its storage."""
    storage = tensor.storage
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    sound = (
        isinstance(key, str)
        and len(tensor.shape) == len(tensor.strides)
        and all(type(n) is int and n >= 0 for n in numbers)
    )
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
