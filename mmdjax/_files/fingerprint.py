"""What something is, by value: hashes of arrays, and descriptions that are the same in another process.

A description is what JSON can hold. It tells of

    arrays             type, shape and hash
    functions          name, code, parameters, defaults, attributes, and what they close over
    wrapped functions  the function, and each wrapper as a function of its own. `jax.jit` and `functools.lru_cache` do
                       not change what a function returns, and leave no mark
    objects            class and attributes, slots included
    the user's classes the methods and constants that they and their bases define
    what has no attributes that Python sees: what `pickle` would keep; where it refuses (a generator, an open file), the
                       type alone

It does not tell of what a function finds in its module's globals, nor of the methods of installed classes: change those
and the description stays.
"""

import ast
import copyreg
import dataclasses
import enum
import functools
import hashlib
import inspect
import re
import sys
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TRANSPARENT = (type(jax.jit(lambda: None)), type(functools.lru_cache(lambda: None)))  # return what the function does
OTHER_FLAGS = (
    inspect.CO_VARARGS
    | inspect.CO_VARKEYWORDS
    | inspect.CO_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ITERABLE_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
)
UNTOLD_METHODS = {  # they set attributes, which are told, or compare and print
    "__init__", "__new__", "__repr__", "__eq__", "__ne__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__",
    "__setattr__", "__delattr__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__replace__",
    "__init_subclass__", "__subclasshook__", "__annotate__", "__annotate_func__",
}  # fmt: skip
OWN_CLASS = re.compile(r"^mmdjax\.(?:[a-z_]\w*\.)+(?=[A-Z]|_[A-Z])")  # what stands before its name
HASHED = re.compile(r"(.*?) ?sha256 [0-9a-f]{64}")
FUNCTION = {"is", "code"}  # what the description of a function has


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


def tree_hash(tree: Any, *, used: bool = False) -> str:
    """A hash of a pytree of arrays: their places, types, shapes and values; with `used`, as `as_used` makes them."""
    return sha256(tree_bytes(tree, used=used))


def tree_bytes(tree: Any, *, used: bool = False) -> Iterable[Any]:
    """What `tree_hash` hashes."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return array_bytes(leaves, used=used)


def array_bytes(arrays: Mapping[str, Any], *, used: bool = False) -> Iterable[Any]:
    """Name, type and shape of each array, then its bytes; one at a time in host memory."""
    for key in sorted(arrays):
        array = np.ascontiguousarray(on_host(_as_used(arrays[key], np.asarray) if used else arrays[key]))
        yield f"{key} {array.dtype.name} {np.shape(arrays[key])}".encode()
        yield _native(array).reshape(-1).view(np.uint8).data


def on_host(x: Any) -> np.ndarray:
    """The whole of an array, also where its parts are on other hosts: then all of them must ask for it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental.multihost_utils import process_allgather

        return np.asarray(x.addressable_data(0) if x.is_fully_replicated else process_allgather(x, tiled=True))
    return np.asarray(x)


def as_used(tree: Any) -> Any:
    """A pytree whose numbers are as JAX will use them, on the host: without x64, float64 becomes float32.

    So what is the same to `guided_sample` is described alike: labels in int64 and int32, 0.1 and float32(0.1).

    Example:
      >>> as_used({"labels": np.array([1, 2]), "scale": np.float32(0.1)})
      {'labels': array([1, 2], dtype=int32), 'scale': 0.1}
    """
    return jax.tree.map(_as_used, tree)


def describe(value: Any) -> Any:
    """What JSON can hold of a value; equal for equal values, in other processes too.

    Example:
      >>> from mmdjax import DDIM
      >>> describe({"sampler": DDIM(eta=1.0), "times": (1.0, 0.0)})
      {'sampler': {'is': 'mmdjax.DDIM', 'eta': 1.0}, 'times': [1.0, 0.0]}
    """
    return _describe(value, ())


def differences(old: Any, new: Any, name: str = "", *, told: bool = False) -> list[str]:
    """Where two descriptions differ, one line each: "guidance.scale was 1.0 and is 2.0".

    Args:
      old: what `describe` returned.
      new: what it returns now.
      name: of what is described.
      told: compare only what `old` tells; an earlier version, which told less, made it.

    Example:
      >>> differences({"a": {"b": 1}, "c": 0}, {"a": {"b": 2}, "c": 0})
      ['a.b was 1 and is 2']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        both = {key for key in old if key in new}
        same = all(old[key] == new[key] for key in ("is", "text", "code", "parameters") if key in both)
        if both >= FUNCTION and not same:
            names = "" if old["is"] == new["is"] else f": {old['is']}, now {new['is']}"
            return [f"{name} was another function{names}"]
        if not same:
            return [f"{name} was {_short(old)} and is {_short(new)}"]
        keys = [*old, *(key for key in new if key not in both and not told)]
        named = [(f"{name}.{key}" if name else str(key), old.get(key), new.get(key)) for key in keys]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and not _flat(old + new):
        named = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(old, new, strict=True))]
    else:
        return _difference(old, new, name, told)
    return [line for part, before, now in named for line in differences(before, now, part, told=told)]


def _difference(old: Any, new: Any, name: str, told: bool) -> list[str]:
    if old == new or (told and isinstance(new, Mapping) and str(old) in (new.get("is"), new.get("text"))):
        return []
    kind = _hashed(old)
    if kind is None or kind != _hashed(new):
        return [f"{name} was {_short(old)} and is {_short(new)}"]
    return [f"{name} was another {kind.removeprefix('a ')}" if kind else f"{name} differ"]


def _flat(values: list) -> bool:
    return not any(isinstance(value, list | Mapping) for value in values)


def _hashed(value: Any) -> str | None:
    """What a text says beside a hash; None if there is no hash in it."""
    found = HASHED.fullmatch(value) if isinstance(value, str) else None
    return None if found is None else found[1]


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "is" in value:
        return str(value.get("text", value["is"]))
    if isinstance(value, list) and not _flat(value):
        return ", ".join(map(_short, value))
    text = _hashed(value) or str(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


def _as_used(leaf: Any, number: Any = None) -> Any:
    """One leaf of `as_used`; `number` is what becomes of a scalar array, by default Python's number."""
    dtype = getattr(leaf, "dtype", None)
    if not isinstance(leaf, bool | int | float | complex) and not (
        isinstance(dtype, np.dtype) and dtype.kind not in "OUSMm"
    ):
        return leaf  # a key, a function, an object
    dtype = jnp.result_type(leaf)
    if np.ndim(leaf) == 0 and jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.result_type(float)
    with np.errstate(over="ignore"):
        array = on_host(leaf).astype(dtype, copy=False)
    if array.ndim or number is not None:
        return array
    if not jnp.issubdtype(dtype, jnp.floating):
        return array.item()
    return float(np.format_float_scientific(array.flat[0]))  # the fewest digits that tell: 0.1, not 0.10000000149


def _describe(value: Any, within: tuple[int, ...]) -> Any:
    """`describe`, of something found in objects of the ids `within`, the outermost first."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if id(value) in within:  # a closure may hold the function that it is of
        levels = len(within) - within.index(id(value))
        return "itself" if levels <= 2 else {"is": "itself", "levels": levels}
    inner = functools.partial(_describe, within=(*within, id(value)))
    if isinstance(value, type):
        methods = _describe_class(value, within)
        return {"is": _name(value)} | methods if methods else _name(value)
    if isinstance(value, np.ma.MaskedArray):
        return {"is": _name(type(value)), "data": inner(value.filled(0)), "mask": inner(np.ma.getmaskarray(value))}
    is_array = hasattr(value, "__array__") and not callable(value)  # what is called has more to it than an array
    if isinstance(value, float | complex | np.generic) or is_array:
        return _describe_numbers(value, inner)
    if isinstance(value, bytes):
        return f"bytes {hashlib.sha256(value).hexdigest()}"
    if isinstance(value, types.CodeType):
        return {"is": "builtins.code"} | _code_hashes(value)
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, set | frozenset):
        return sorted(_text_in_set(item, inner) for item in value)
    said: dict[str, Any] = {"is": _name(type(value))}
    methods = _describe_class(type(value), within)
    if isinstance(value, Mapping):
        more = _attributes(value) if isinstance(value, dict) else {}
        return _describe_items(value, inner) | ({"attributes": inner(more)} if more else {}) | methods
    if isinstance(value, tuple) and (names := getattr(value, "_fields", None)) is not None:
        return said | {name: inner(item) for name, item in zip(names, value, strict=True)} | methods
    if isinstance(value, list | tuple):
        items, more = [inner(item) for item in value], _attributes(value)
        return said | {"items": items} | inner(more) | methods if more or methods else items
    if inspect.ismethod(value):
        return {"is": "method", "of": inner(value.__self__), "function": inner(value.__func__)}
    if isinstance(value, functools.partial):
        more = {"attributes": inner(vars(value))} if vars(value) else {}
        return (
            said | {"function": inner(value.func), "args": inner(value.args), "keywords": inner(value.keywords)} | more
        )
    if callable(value) and not dataclasses.is_dataclass(value):
        function = _describe_wrapped(value, within)
        if function is not None:
            return function
    if dataclasses.is_dataclass(value):
        return said | {name: inner(item) for name, item in _fields(value).items()} | methods
    if not jax.tree_util.all_leaves([value]):
        children, structure = jax.tree_util.default_registry.flatten_one_level(value)
        more = {} if structure is None else {"structure": inner(structure), "children": inner(list(children))}
        return said | {"leaves": [inner(leaf) for leaf in jax.tree.leaves(value)]} | more | methods
    if hasattr(value, "__dict__"):
        return said | inner(_attributes(value)) | _describe_pickled(value, inner) | methods
    text = {"text": repr(value).partition(" at 0x")[0]}
    if isinstance(value, memoryview):
        text["bytes"] = inner(value.tobytes())
    if type(value).__reduce__ is object.__reduce__:  # or the class says itself what is state, and what is a cache
        text |= inner(_attributes(value))
    return said | text | _describe_pickled(value, inner) | methods


def _name(kind: type) -> str:
    return _public_name(f"{kind.__module__}.{kind.__qualname__}")


def _public_name(name: str) -> str:
    """A class of this package by its own name alone, so that it may move to another module."""
    return OWN_CLASS.sub("mmdjax.", name)


def with_public_names(description: Any) -> Any:
    """A description of an earlier version, which named classes of this package by their modules, in today's names.

    Example:
      >>> with_public_names({"sampler": {"is": "mmdjax.samplers.DDIM", "eta": 1.0}})
      {'sampler': {'is': 'mmdjax.DDIM', 'eta': 1.0}}
    """
    match description:
        case str():
            return _public_name(description)
        case list():
            return list(map(with_public_names, description))
        case dict():
            return {key: with_public_names(item) for key, item in description.items()}
    return description


# --- functions ---


def _describe_wrapped(value: Any, within: tuple[int, ...]) -> dict[str, Any] | None:
    """A function, in wrappers or not; None for any other callable."""
    chain, function = [], value
    while hasattr(function, "__wrapped__") and all(function is not wrapper for wrapper in chain):
        chain.append(function)
        function = function.__wrapped__
    ids = [id(part) for part in (*chain, function)]
    wrappers = [
        _describe_wrapper(wrapper, (*within, *ids[i + 1 :], id(wrapper)))
        for i, wrapper in enumerate(chain)
        if not isinstance(wrapper, TRANSPARENT)
    ]
    if isinstance(function, types.FunctionType):
        return _describe_function(function, (*within, *ids)) | ({"wrappers": wrappers} if wrappers else {})
    if isinstance(value, types.FunctionType):  # around an object, a method, a partial
        attributes = _describe(vars(value), (*within, id(value)))
        return {"is": _name(type(value))} | attributes | {"wrappers": wrappers[:1]}
    return None


def _describe_wrapper(wrapper: Any, within: tuple[int, ...]) -> dict[str, Any]:
    """A wrapper without what it wraps, whose id is in `within`."""
    if isinstance(wrapper, types.FunctionType):
        return _describe_function(wrapper, within, wrapper.__wrapped__)
    attributes = {name: item for name, item in _attributes(wrapper).items() if name != "__wrapped__"}
    return {"is": _name(type(wrapper))} | _describe(attributes, within) | _describe_class(type(wrapper), within)


def _describe_function(function: Any, within: tuple[int, ...], wrapped: Any = None) -> dict[str, Any]:
    code, inner = function.__code__, functools.partial(_describe, within=within)
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    closed = {name: cell.cell_contents for name, cell in cells if _filled(cell)}
    closed = {
        name: "what it wraps" if wrapped is not None and item is wrapped else item for name, item in closed.items()
    }
    attributes = {name: item for name, item in vars(function).items() if not _is_special(name)}
    return {
        "is": f"{function.__module__}.{function.__qualname__}",
        **_code_hashes(code),
        "closure": inner(closed),
        "defaults": inner((function.__defaults__, function.__kwdefaults__)),
    } | ({"attributes": inner(attributes)} if attributes else {})


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _code_hashes(code: types.CodeType) -> dict[str, str]:
    parts = {"code": _describe_code(code), "parameters": _describe_parameters(code)}
    return {name: hashlib.sha256(repr(part).encode()).hexdigest() for name, part in parts.items()}


def _describe_code(code: types.CodeType) -> list[Any]:
    # neither file nor lines: moving a function changes nothing
    constants = [_describe_constant(constant) for constant in code.co_consts]
    return [code.co_code.hex(), constants, code.co_names, code.co_varnames]


def _describe_constant(constant: Any) -> Any:
    if isinstance(constant, types.CodeType):
        return _describe_code(constant)
    return sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)  # its order is of the day


def _describe_parameters(code: types.CodeType) -> list[Any]:
    """How arguments reach the code, `(p, x)` or `(p, *x)`, what it shares with functions in it, what it catches."""
    counts = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & OTHER_FLAGS]
    nested = [_describe_parameters(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [*counts, code.co_freevars, code.co_cellvars, code.co_exceptiontable.hex(), nested]


# --- objects and classes ---


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds, in its dictionary and in slots; without what a `cached_property` remembers."""
    kinds = [vars(base) for base in type(value).__mro__]
    held = dict(getattr(value, "__dict__", {}))
    for slots in (kind for kind in kinds if "__slots__" in kind):
        for name, slot in slots.items():
            if isinstance(slot, types.MemberDescriptorType) and hasattr(value, name):
                held.setdefault(name, getattr(value, name))
    cached = {name for kind in kinds for name, item in kind.items() if isinstance(item, functools.cached_property)}
    return {name: item for name, item in held.items() if name not in cached}


def _fields(value: Any) -> dict[str, Any]:
    """What a dataclass holds, its fields first; none that are marked as derived from others."""
    names = [field.name for field in dataclasses.fields(value)]
    held = {name: getattr(value, name) for name in names if hasattr(value, name)}
    if _is_linen(type(value)):  # a module's place among others, and its bookkeeping
        return {name: item for name, item in held.items() if name not in ("parent", "name")}
    derived = {field.name for field in dataclasses.fields(value) if field.metadata.get("derived")}
    return {name: item for name, item in (held | _attributes(value)).items() if name not in derived}


def _describe_class(kind: type, within: tuple[int, ...]) -> dict[str, Any]:
    """{"class": methods and constants} of a class and its bases as far as they are the user's own; {} if none is."""
    if id(kind) in within:  # a method closes over its class for `super()`
        return {}
    inner = functools.partial(_describe, within=(*within, id(kind)))
    fields, told = getattr(kind, "__dataclass_fields__", {}), {}
    for base in kind.__mro__:
        if _is_installed(base.__module__):
            continue
        for name, item in vars(base).items():
            item = _function_of(item)
            slot = isinstance(item, types.MemberDescriptorType | types.GetSetDescriptorType)
            special = _is_special(name) or (_is_linen(base) and (name.startswith("_") or name == "scope"))
            special |= issubclass(base, enum.Enum) and (name[0] == name[-1] == "_" or isinstance(item, base))
            if not (slot or name in fields or name in UNTOLD_METHODS or (special and not callable(item))):
                told[f"{base.__qualname__}.{name}"] = inner(item)
    return {"class": told} if told else {}


def _function_of(item: Any) -> Any:
    """What a class's own name for a method or property stands for."""
    if isinstance(item, staticmethod | classmethod):
        return item.__func__
    if isinstance(item, functools.cached_property):
        return item.func
    return item.fget if isinstance(item, property) else item


def _is_installed(module: str) -> bool:
    """Whether a module is of Python, of this package, or of an installed one: told by its version, if at all."""
    root = module.partition(".")[0]
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return (
        root == "mmdjax"
        or root in sys.stdlib_module_names
        or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
    )


def _is_linen(kind: type) -> bool:
    linen = sys.modules.get("flax.linen")
    return linen is not None and issubclass(kind, linen.Module)


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _describe_pickled(value: Any, inner: Any) -> dict[str, Any]:
    """{"state": what `pickle` keeps of an object beside its attributes}; {} if there is none, or it refuses."""
    if isinstance(value, TRANSPARENT):
        return {}
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        reduced: Any = value.__reduce_ex__(2) if reduce is None else reduce(value)
    except Exception:  # each class raises its own
        return {}
    if isinstance(reduced, str):  # the name of something that a module holds
        return {}
    make, args = reduced[:2]
    state, items, pairs = (*reduced[2:], None, None, None)[:3]
    if make is getattr(copyreg, "__newobj__"):  # noqa: B009  # an ordinary object: made of its class, then attributes
        made = [*args[1:]]
        state = None if hasattr(value, "__dict__") or _attributes(value) else state
    else:
        made = [make, *args]
    kept = [made, state, [*(items or ())], [*(pairs or ())]]
    return {"state": inner(kept)} if any(part not in ([], None) for part in kept) else {}


# --- collections and numbers ---


def _describe_items(items: Mapping[Any, Any], inner: Any) -> dict[str, Any]:
    told = {str(key): inner(item) for key, item in items.items() if isinstance(key, str)}
    others = [(_text(key), _name(type(key)), item) for key, item in items.items() if not isinstance(key, str)]
    kinds = {}
    for text, kind, item in sorted(others, key=lambda other: other[:2]):
        while text in told:  # 1 beside "1"
            text += "'"
        told[text], kinds[text] = inner(item), kind
    return told | ({"keys that are not text": kinds} if kinds else {})


def _text(value: Any) -> str:
    return str(value).partition(" at 0x")[0]


def _text_in_set(item: Any, inner: Any) -> str:
    if not isinstance(item, str):
        return str(inner(item))
    try:  # "1" is not 1
        return repr(item) if ast.literal_eval(item) is not item else item
    except (ValueError, SyntaxError):
        return item


def _describe_numbers(value: Any, inner: Any) -> Any:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"{jax.random.key_impl(value)} {on_host(jax.random.key_data(value)).tolist()}"
    host = on_host(value)
    if host.dtype == object:
        return {"is": _name(type(value)), "shape": list(host.shape), "items": [inner(item) for item in host.flat]}
    if host.ndim:
        return (
            f"{host.dtype if host.dtype.names else host.dtype.name}{list(host.shape)} sha256 {arrays_hash({'': host})}"
        )
    number = host.item()  # 1, 1.0 and float32(1) are one number, as they are to `guided_sample`
    if isinstance(number, float):
        return {"is": "float", "text": repr(number)} if repr(number) in ("nan", "-0.0") else float(number)
    if isinstance(number, complex):
        return {"is": "complex", "text": repr(number)}
    return number if isinstance(number, int) else {"is": host.dtype.name, "text": repr(number)}


def _native(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
