"""Components as frozen pytrees: numbers are leaves, choices are static fields.

A component that is a pytree can be closed over, passed through `jit`, mapped over with `vmap` (a leaf may be an array
of candidates) and differentiated. Static fields take part in equality and hashing, so they decide what is compiled.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax.core import Tracer

T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """A dataclass field that is a choice, not a number: it is compared, hashed and compiled for."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def _as_numbers(value: Any) -> Any:
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
    floats. Flattening and unflattening run no `__init__`: checks there see only what a person wrote, never tracers.
    """
    cls = dataclasses.dataclass(frozen=True, repr=True)(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    metas = [f.name for f in dataclasses.fields(cls) if f.metadata.get("static")]  # pyright: ignore[reportArgumentType]
    children = [n for n in names if n not in metas]
    written_init = cls.__init__

    def __init__(self, *args, **kwargs):
        written_init(self, *args, **kwargs)
        for name in children:
            object.__setattr__(self, name, _as_numbers(getattr(self, name)))

    __init__.__wrapped__ = written_init  # type: ignore[attr-defined]  # keeps the signature for help()
    cls.__init__ = __init__  # type: ignore[method-assign]

    def flatten_with_keys(self):
        keyed = [(jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in children]
        return keyed, tuple(getattr(self, n) for n in metas)

    def flatten(self):
        return [getattr(self, n) for n in children], tuple(getattr(self, n) for n in metas)

    def unflatten(meta, values):
        self = object.__new__(cls)
        for name, value in zip(metas, meta, strict=True):
            object.__setattr__(self, name, value)
        for name, value in zip(children, values, strict=True):
            object.__setattr__(self, name, value)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


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
    """A bound method that compares by value: two equal modules' `apply` are one function to `jit`."""

    function: Callable = static()
    owner: Any = static()

    def __call__(self, *args, **kwargs):
        return self.function(self.owner, *args, **kwargs)


@pytree
class Function:
    """A plain function as a pytree without leaves, so that a component may hold it where it could hold a pytree."""

    function: Callable = static()

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def by_value(function: Callable) -> Callable:
    """Unwrap a bound method of a hashable owner (a Linen module) into a `Method`; other callables pass through."""
    if inspect.ismethod(function):
        try:
            hash(function.__self__)
        except TypeError:
            return function
        return Method(function.__func__, function.__self__)
    return function


def as_component(function: Any) -> Any:
    """`function` itself where it is a pytree already, else wrapped in `Function`."""
    return function if not jax.tree_util.all_leaves([function]) else Function(by_value(function))


def strong(tree: T) -> T:
    """Python and weakly typed numbers in a pytree as arrays of the default type of their kind.

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


def is_traced(tree: Any) -> bool:
    """Whether a leaf has no value, being inside `jit`, `vmap` or `grad`."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def is_concrete(tree: Any) -> bool:
    """Whether every leaf has a value now: nothing is traced, and this process's devices hold all of it."""
    return not is_traced(tree) and all(
        not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(tree)
    )
