"""Values that all calls along an axis of a `vmap` or `shard_map` have in common, such as the noise level of a batch.

`vmap` tells which values differ from call to call only when it maps an operation. So `in_lockstep` is an operation: it
returns what it is given, and raises where it is mapped over the axis. A `shard_map` that checks its values
(`check_vma=True`, JAX's default) tells at once.
"""

from typing import Any

import jax
from jax.extend import core
from jax.interpreters import batching, mlir

_in_lockstep = core.Primitive("mmdjax_in_lockstep")
_in_lockstep.def_impl(lambda x, axis: x)
_in_lockstep.def_abstract_eval(lambda x, axis: x)
mlir.register_lowering(_in_lockstep, lambda ctx, x, axis: [x])


def _raise(axis):
    raise ValueError(
        f'the calls along axis_name "{axis}" are at noise levels of their own, but samples that are guided together '
        "are at one. A solver that chooses its steps for each sample cannot be joined: take the same steps for all "
        "(diffrax.ConstantStepSize, diffrax.StepTo), or the whole batch as one state, as mmdjax.diffeq does"
    )


def _map(axis_data, values, dims, *, axis):
    if axis_data.name == axis and dims[0] is not None:
        _raise(axis)
    return _in_lockstep.bind(values[0], axis=axis), dims[0]


batching.fancy_primitive_batchers[_in_lockstep] = _map


def axes_here() -> tuple[str, ...]:
    """The names of the axes of the `vmap` and `shard_map` around this, those that have one; for messages."""
    names = getattr(core, "unsafe_get_axis_names_DO_NOT_USE", tuple)()  # a name that JAX may take away
    return tuple(name for name in names if isinstance(name, str))


def is_manual(axis: str) -> bool:
    """Whether an axis is that of a `shard_map` around this."""
    return axis in jax.sharding.get_abstract_mesh().manual_axes


def differs(x: Any, axis: str) -> bool:
    """Whether JAX knows that an array differs along an axis of a `shard_map`. It does not with `check_vma=False`."""
    aval = jax.typeof(x)
    kinds = aval if hasattr(aval, "vma") else getattr(aval, "manual_axis_type", None)  # since JAX 0.10
    return axis in getattr(kinds, "vma", getattr(kinds, "varying", ()))


def in_lockstep(axis: str, tree: Any) -> Any:
    """The tree of arrays, detached.

    Raises:
      ValueError: the values differ from call to call; raised when `vmap` maps this over the axis.

    Example:
      >>> jax.vmap(lambda x: x + in_lockstep("batch", 1.0), axis_name="batch")(jax.numpy.zeros(2)).tolist()
      [1.0, 1.0]
    """

    def checked(v):
        v = jax.lax.stop_gradient(jax.numpy.asarray(v))
        return _raise(axis) if differs(v, axis) else _in_lockstep.bind(v, axis=axis)

    return jax.tree.map(checked, tree)
