"""JAX's strict modes, which a test suite switches on for its own code, do not reach into this library."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax

F = TypeVar("F", bound=Callable)


def in_own_modes(function: F) -> F:
    """The function under JAX's default rules for ranks, types and transfers, whatever rules the caller has set.

    What it calls of the caller's, such as a network, runs under the default rules too. The backward pass of `jax.grad`
    outside of `jit` does not: it is the caller's.

    Example:
      >>> add = in_own_modes(lambda: jax.numpy.ones((2, 3)) + jax.numpy.ones(3))
      >>> with jax.numpy_rank_promotion("raise"):
      ...     add().shape
      (2, 3)
    """

    @functools.wraps(function)
    def inner(*args, **kwargs):
        with (
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
            jax.transfer_guard("allow"),
        ):
            return function(*args, **kwargs)

    return inner  # pyright: ignore[reportReturnType]
