"""What something is, by value: hashes of arrays, and descriptions that are the same in another process.

A description is what JSON can hold. Arrays are described by type, shape and hash, dataclasses by class and fields,
functions by name, code and what they close over. What a function finds in its module's globals and the methods of a
class are not looked into: change those and the description stays.
"""

import dataclasses
import functools
import hashlib
import inspect
import types
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def sha256(pieces: Iterable[Any]) -> str:
    """Of pieces of bytes, each with its length: no two lists of pieces run into the same bytes."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()


def arrays_hash(arrays: Mapping[str, Any], *said: str) -> str:
    """A hash of named arrays, in whatever order, and of strings said about them.

    Example:
      >>> arrays_hash({"a": np.zeros(2)}) == arrays_hash({"a": np.zeros((2, 1))})
      False
    """
    return sha256([*(text.encode() for text in said), *array_bytes(arrays)])


def tree_hash(tree: Any) -> str:
    """A hash of a pytree of arrays: their places, types, shapes and values."""
    return sha256(tree_bytes(tree))


def tree_bytes(tree: Any) -> Iterable[Any]:
    """What `tree_hash` hashes."""
    return array_bytes({jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)})


def array_bytes(arrays: Mapping[str, Any]) -> Iterable[Any]:
    """Name, type and shape of each array, then its bytes; one at a time in host memory."""
    for key in sorted(arrays):
        array = np.ascontiguousarray(on_host(arrays[key]))
        yield f"{key} {array.dtype.name} {np.shape(arrays[key])}".encode()
        yield array.reshape(-1).view(np.uint8).data


def on_host(x: Any) -> np.ndarray:
    """The whole of an array, also where its parts are on other hosts: then all of them must ask for it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental.multihost_utils import process_allgather

        return np.asarray(x.addressable_data(0) if x.is_fully_replicated else process_allgather(x, tiled=True))
    return np.asarray(x)


def describe(value: Any) -> Any:
    """What JSON can hold of a value; equal for equal values, in other processes too.

    Example:
      >>> from mmdjax import DDIM
      >>> describe({"sampler": DDIM(eta=1.0), "times": (1.0, 0.0)})
      {'sampler': {'is': 'mmdjax.samplers.DDIM', 'eta': 1.0}, 'times': [1.0, 0.0]}
    """
    return _describe(value, ())


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two descriptions differ, one line each: "guidance.scale was 1.0 and is 2.0".

    Example:
      >>> differences({"a": {"b": 1}, "c": 0}, {"a": {"b": 2}, "c": 0})
      ['a.b was 1 and is 2']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
        ]
    if old == new:
        return []
    if "code" in name.rpartition(".")[2]:
        return [f"{name.rpartition('.')[0]} was another function"]
    return [f"{name} was {_short(old)} and is {_short(new)}"]


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "is" in value:
        return value["is"]
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


def _describe(value: Any, within: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float | complex | np.generic) or hasattr(value, "__array__"):
        return _describe_numbers(value)
    if isinstance(value, bytes):
        return f"bytes {hashlib.sha256(value).hexdigest()}"
    if id(value) in within:  # a closure may hold the function that it is of
        return "itself"
    inner = functools.partial(_describe, within=(*within, id(value)))
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, types.CodeType):
        return _describe_code(value)
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, Mapping):
        return {str(key): inner(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, map(inner, value)))
    said: dict[str, Any] = {"is": _describe(type(value), ())}
    if hasattr(value, "_fields"):
        return said | {name: inner(item) for name, item in zip(value._fields, value, strict=True)}
    if isinstance(value, list | tuple):
        return [inner(item) for item in value]
    if inspect.ismethod(value):
        return {"is": "method", "of": inner(value.__self__), "function": inner(value.__func__)}
    if isinstance(value, functools.partial):
        return said | {"function": inner(value.func), "args": inner(value.args), "keywords": inner(value.keywords)}
    if callable(value) and not dataclasses.is_dataclass(value):
        function = inspect.unwrap(value)
        if isinstance(function, types.FunctionType):
            closed = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
            return {
                "is": f"{function.__module__}.{function.__qualname__}",
                "code": hashlib.sha256(repr(_describe_code(function.__code__)).encode()).hexdigest(),
                "closure": inner(dict(zip(function.__code__.co_freevars, closed, strict=False))),
                "defaults": inner((function.__defaults__, function.__kwdefaults__)),
            }
    if dataclasses.is_dataclass(value):
        left_out = [field.name for field in dataclasses.fields(value) if field.metadata.get("derived")]
        names = [f.name for f in dataclasses.fields(value) if f.name not in ("parent", "name", *left_out)]
        return said | {name: inner(getattr(value, name)) for name in names if hasattr(value, name)}
    if not jax.tree_util.all_leaves([value]):
        return said | {"leaves": [inner(leaf) for leaf in jax.tree.leaves(value)]}
    if hasattr(value, "__dict__"):
        return said | inner(vars(value))
    return said | {"text": repr(value).partition(" at 0x")[0]}


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _describe_code(code: types.CodeType) -> list[Any]:
    # neither file nor lines: moving a function changes nothing
    constants = [_describe_constant(constant) for constant in code.co_consts]
    return [code.co_code.hex(), constants, code.co_names, code.co_varnames]


def _describe_constant(constant: Any) -> Any:
    if isinstance(constant, types.CodeType):
        return _describe_code(constant)
    return sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)  # its order is of the day


def _describe_numbers(value: Any) -> Any:
    if jnp.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.prng_key):
        return f"{jax.random.key_impl(value)} {np.asarray(jax.random.key_data(value)).tolist()}"
    host = on_host(value)
    if host.ndim == 0:  # 1, 1.0 and float32(1) are one number, as they are to `guided_sample`
        number = host.item()
        return float(number) if isinstance(number, float) else number
    return f"{host.dtype.name}{list(host.shape)} sha256 {arrays_hash({'': host})}"
