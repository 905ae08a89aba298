"""Components as frozen pytrees: numbers are leaves, choices are static fields.

`jit` can close over a component or take it as an argument, `vmap` can map over its leaves (such as an array of scales),
and `grad` can differentiate them. Static fields are compared and hashed: another value compiles anew.
"""

import dataclasses
import dis
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """A dataclass field that is a choice, not a number: it is compared and hashed, and another value compiles anew."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def choice(**kwargs: Any) -> Any:
    """A dataclass field that is a choice if it is a string or None, and a child if it is a component."""
    return dataclasses.field(metadata={"choice": True}, **kwargs)


def _as_numbers(value: Any, name: str = "") -> Any:
    # 1 and 1.0 must be the same leaf, or jit would compile twice.
    if type(value) is int:
        return float(value)
    if type(value) is tuple:
        return tuple(_as_numbers(v) for v in value)
    return value


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def pytree(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass and a pytree.

    Fields made with `static` are part of the tree's structure; all others are children. Python ints in children become
    floats. Flattening and unflattening do not run `__init__`, so checks there never see what JAX puts into leaves.
    Printing shows arrays by type and shape.
    """
    return _component(cls, _as_numbers)


class Component:
    """A base whose subclasses become frozen dataclasses and pytrees by themselves; see `complete`."""

    def __new__(cls, *args: Any, **kwargs: Any):
        self = super().__new__(cls)
        if jax.tree_util.all_leaves([self]):  # not before: decorators come after the class's body
            complete(cls)
        return self


CHOICES = (int, bool, str, "int", "bool", "str")


def complete(cls: type) -> None:
    """`pytree` for a class without a decorator.

    Its fields are what the class and its undecorated bases annotate, or assign in their own `__init__`, after which
    `__post_init__` runs too. Fields annotated `int`, `bool` or `str`, there or in the signature, are choices. A class
    that is a dataclass already keeps its fields.
    """
    _component(cls, _as_found, undecorated=True)


def _component(cls: type[T], convert: Callable[[Any, str], Any], undecorated: bool = False) -> type[T]:
    by_hand = _init_by_hand(cls)
    if "__dataclass_fields__" not in vars(cls):
        fields: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            if "__dataclass_fields__" in vars(base):
                continue
            found = inspect.get_annotations(base)
            if base is not cls or undecorated:
                found = _assigned(base) | found
                for name, kind in found.items():
                    default = getattr(cls, name, dataclasses.MISSING)
                    if kind in CHOICES and not isinstance(default, dataclasses.Field):
                        setattr(cls, name, static(default=default))
            fields |= found
        cls.__annotations__ = fields
        cls = dataclasses.dataclass(frozen=True, repr=False, init=not by_hand)(cls)
    return _registered(cls, by_hand, convert)


def _assigned(cls: type) -> dict[str, Any]:
    """The fields that a class's own `__init__` assigns, with the annotations of arguments of the same name."""
    if not _writes_init(cls):
        return {}
    init = inspect.unwrap(vars(cls)["__init__"])
    kinds = inspect.get_annotations(init)
    return {i.argval: kinds.get(i.argval, Any) for i in dis.get_instructions(init) if i.opname == "STORE_ATTR"}


def _writes_init(cls: type) -> bool:
    return inspect.isfunction(vars(cls).get("__init__")) and "__dataclass_fields__" not in vars(cls)


def _init_by_hand(cls: type) -> bool:
    for base in cls.__mro__:
        if "__dataclass_fields__" in vars(base):
            return getattr(base.__init__, "by_hand", False)
        if _writes_init(base):
            return True
    return False


def _as_found(value: Any, name: str) -> Any:
    # nobody said which fields are choices: what `jit` cannot take as a number is told here
    if callable(value) and jax.tree_util.all_leaves([value]):
        return as_component(value)
    for leaf in jax.tree.leaves(value):
        if isinstance(leaf, bool) or not are_numbers(leaf):
            raise TypeError(
                f"{name} is {shown(leaf)}, a choice, not a number; declare it in the class's body, as "
                f"`{name}: {type(leaf).__name__}` or `{name}: Any = mmdjax.tree.static()`"
            )
    return _as_numbers(value, name)


def _registered(cls: type[T], by_hand: bool, convert: Callable[[Any, str], Any]) -> type[T]:
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    choices = [f.name for f in fields if f.metadata.get("choice")]
    metas = [f.name for f in fields if f.metadata.get("static") or f.metadata.get("choice")]
    children = [f.name for f in fields if not f.metadata.get("static")]
    written_init = cls.__init__

    def __init__(self, *args, **kwargs):
        if "_open" in vars(self):  # called by the __init__ of a subclass, which ends what is below
            return written_init(self, *args, **kwargs)
        if by_hand:
            _write(self, written_init, *args, **kwargs)
        else:
            written_init(self, *args, **kwargs)
        for name in children:
            object.__setattr__(self, name, convert(getattr(self, name), name))

    __init__.__wrapped__ = written_init  # type: ignore[attr-defined]  # keeps the signature for help()
    __init__.by_hand = by_hand  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[method-assign]
    if by_hand:
        cls.__setattr__ = _set  # type: ignore[method-assign]
    if cls.__repr__ is object.__repr__:
        cls.__repr__ = short_repr  # type: ignore[method-assign]

    def child(self, name):
        value = getattr(self, name)
        return None if name in choices and isinstance(value, str) else value

    def meta(self, name):
        value = getattr(self, name)
        return None if name in choices and not isinstance(value, str) else value

    def flatten_with_keys(self):
        keyed = [(jax.tree_util.GetAttrKey(n), child(self, n)) for n in children]
        return keyed, tuple(meta(self, n) for n in metas)

    def flatten(self):
        return [child(self, n) for n in children], tuple(meta(self, n) for n in metas)

    def unflatten(meta, values):
        self = object.__new__(cls)
        for name, value in zip(metas, meta, strict=True):
            object.__setattr__(self, name, value)
        for name, value in zip(children, values, strict=True):
            if name not in choices or getattr(self, name) is None:
                object.__setattr__(self, name, value)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def _write(self: Any, init: Callable, *args: Any, **kwargs: Any) -> None:
    """Run a class's own `__init__`, which may assign fields, and then the checks."""
    vars(self)["_open"] = True
    try:
        init(self, *args, **kwargs)
        missing = [f.name for f in dataclasses.fields(self) if not hasattr(self, f.name)]
        if missing:
            raise TypeError(f"{type(self).__name__}.__init__ did not assign {missing[0]}; assign it in every case")
        if hasattr(self, "__post_init__"):
            self.__post_init__()
    finally:
        del vars(self)["_open"]


def _set(self: Any, name: str, value: Any) -> None:
    if "_open" not in vars(self):
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
    if name not in {f.name for f in dataclasses.fields(self)}:
        raise AttributeError(f"{type(self).__name__} has no field {name}; declare it in the class, `{name}: Any`")
    object.__setattr__(self, name, value)


def short_repr(self: Any) -> str:
    """A dataclass in one line; fields whose default is None and that are None are left out, except the first."""
    fields = [
        f"{f.name}={shown(getattr(self, f.name))}"
        for i, f in enumerate(dataclasses.fields(self))
        if f.repr and (i == 0 or f.default is not None or getattr(self, f.name) is not None)
    ]
    return f"{type(self).__name__}({', '.join(fields)})"


MOST_SHOWN, LONGEST_SHOWN = 6, 80  # items of a container, characters of an object with a text of its own


def shown(value: Any) -> str:
    """A value in one line: arrays by type and shape, functions by name.

    Example:
      >>> shown({"x": jnp.zeros((2, 3)), "scale": jnp.float32(0.5), "apply": shown})
      "{'x': float32[2, 3], 'scale': 0.5, 'apply': shown}"
    """
    if isinstance(value, Tracer) or (hasattr(value, "dtype") and hasattr(value, "shape")):
        number = jnp.issubdtype(value.dtype, jnp.number) or value.dtype == bool
        if np.ndim(value) == 0 and number and isinstance(value, jax.Array | np.generic | np.ndarray):
            return f"{np.asarray(value).item():.6g}" if is_concrete(value) else f"{value.dtype}[]"
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, Mapping):
        items = [(k, f"{{{len(v)} keys}}" if isinstance(v, Mapping) else shown(v)) for k, v in _first(value.items())]
        return "{" + _listed([f"{key!r}: {text}" for key, text in items], len(value)) + "}"
    names = getattr(value, "_fields", None)
    if isinstance(value, tuple) and names is not None:
        items = [f"{name}={shown(item)}" for name, item in zip(names, value, strict=True)]
        return f"{type(value).__name__}({', '.join(items)})"
    if type(value) in (tuple, list):
        items = _listed([shown(item) for item in _first(value)], len(value))
        return f"[{items}]" if isinstance(value, list) else f"({items},)" if len(value) == 1 else f"({items})"
    if type(value).__repr__ is short_repr:
        return repr(value)
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    text = repr(value)
    if len(text) > LONGEST_SHOWN or "\n" in text or " at 0x" in text:
        return f"{text[: LONGEST_SHOWN - 1]}…" if isinstance(value, str) else f"<{type(value).__name__}>"
    return text


def _first(items: Any) -> list:
    return [item for _, item in zip(range(MOST_SHOWN), items, strict=False)]


def _listed(texts: list[str], count: int) -> str:
    return ", ".join(texts) + (f", … {count} in all" if count > len(texts) else "")


def replace(component: T, **changes: Any) -> T:
    """A copy of a component with some fields changed, without running its checks (the values may be traced)."""
    new = object.__new__(type(component))
    for f in dataclasses.fields(component):  # pyright: ignore[reportArgumentType]
        object.__setattr__(new, f.name, changes.pop(f.name, getattr(component, f.name)))
    if changes:
        raise TypeError(f"{type(component).__name__} has no field {', '.join(changes)}")
    return new


@pytree
class Method:
    """A bound method that is compared by value: the `apply` of two equal modules is one function to `jit`."""

    function: Callable = static()
    owner: Any = static()

    def __call__(self, *args, **kwargs):
        return self.function(self.owner, *args, **kwargs)

    def __repr__(self):
        return f"{type(self.owner).__name__}.{shown(self.function)}"


@pytree
class Function:
    """A plain function as a pytree without leaves, for fields of a component that may hold a pytree."""

    function: Callable = static()

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    def __repr__(self):
        return shown(self.function)


def by_value(function: Callable) -> Callable:
    """Unwrap a bound method of a hashable owner (a Linen module) into a `Method`; other callables pass through."""
    if inspect.ismethod(function):
        try:
            hash(function.__self__)
        except TypeError:
            return function
        return Method(function.__func__, function.__self__)
    return function


def check_instance(name: str, value: Any) -> None:
    """Raise TypeError for a class that is given in place of an instance."""
    if isinstance(value, type):
        raise TypeError(f"{name} is the class {value.__name__}; give an instance of it, {value.__name__}(…)")


def check_number(name: str, value: Any) -> None:
    """Raise TypeError unless the value is a number or an array of numbers."""
    if not (jax.tree_util.all_leaves([value]) and are_numbers(value)):
        raise TypeError(f"{name} is {value!r}; give a number")


def check_function(name: str, value: Any, form: str) -> None:
    """Raise TypeError unless the value can be called with the arguments of `form`, like "(params, x, level, cond)"."""
    check_instance(name, value)
    if not callable(value):
        raise TypeError(f"{name} must be callable, not {type(value).__name__}: it is called as {name}{form}")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(*form.split(","))
    except TypeError:
        raise TypeError(f"{name} is called as {name}{form}, but its arguments are {signature}") from None


def as_component(function: Any) -> Any:
    """`function` itself if it is a pytree, else wrapped in `Function`."""
    return function if not jax.tree_util.all_leaves([function]) else Function(by_value(function))


def strong(tree: T) -> T:
    """A pytree with Python numbers and weakly typed arrays cast to the default type of their kind.

    So 1.0, np.float32(1) and jnp.array(1.0) are the same to `jit`.
    """

    def leaf(x):
        dtype = jnp.result_type(x)
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            return x
        if jnp.ndim(x) == 0 and jnp.issubdtype(dtype, jnp.floating):
            dtype = jnp.result_type(float)
        return jax.lax.convert_element_type(x, jax.dtypes.canonicalize_dtype(dtype))

    return jax.tree.map(leaf, tree)


def are_numbers(tree: Any) -> bool:
    """Whether every leaf is a number or an array of numbers that `jit` takes."""
    return all(
        isinstance(x, bool | int | float | complex)
        or (isinstance(x, jax.Array | np.ndarray | np.generic) and getattr(x.dtype, "kind", "") not in tuple("OSUMm"))
        for x in jax.tree.leaves(tree)
    )


def as_arrays(name: str, tree: Any) -> Any:
    """A pytree with lists of numbers, and other objects that numpy reads, as arrays.

    Raises:
      TypeError: a leaf that does not hold numbers, such as text, a path or a picture.
    """

    def listed(node):
        leaves = jax.tree.leaves(node) if type(node) in (list, tuple) else []
        return bool(leaves) and all(isinstance(leaf, int | float | complex | np.generic) for leaf in leaves)

    def convert(leaf):
        if isinstance(leaf, str | bytes) or not (listed(leaf) or hasattr(leaf, "__array__")):
            if are_numbers(leaf):
                return leaf
            text = " (prompts: pipeline.encode_prompts(params, prompts))" if isinstance(leaf, str) else ""
            raise TypeError(f"{name} holds a {_kind(leaf)}; give numbers, as arrays: jnp.asarray(…){text}")
        if isinstance(leaf, jax.Array | np.ndarray):
            array = leaf
        else:
            try:
                array = np.asarray(leaf)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"{name} is a {_kind(leaf)} that numpy does not read ({error})") from error
        if not are_numbers(array):
            raise TypeError(f"{name} is a {_kind(leaf)} of dtype {array.dtype}; give numbers, as an array")
        return array

    return jax.tree.map(convert, tree, is_leaf=listed)


def _kind(value: Any) -> str:
    return f"{type(value).__module__.split('.')[0]}.{type(value).__name__}".removeprefix("builtins.")


def is_traced(tree: Any) -> bool:
    """Whether a leaf has no value, as inside `jit`, `vmap` or `grad`."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def is_concrete(tree: Any) -> bool:
    """Whether every leaf has a value: it is not traced, and this process's devices hold all of it."""
    return not is_traced(tree) and all(
        not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(tree)
    )
