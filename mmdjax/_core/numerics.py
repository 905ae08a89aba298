"""Elementary functions with the derivative that the mathematics wants where the usual one is NaN or imprecise."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

inline_jit = functools.partial(jax.jit, inline=True)
"""One program where it is called outside `jit`, in place of one an operation; inside, nothing."""


def product(x: Array, y: Array) -> Array:
    """Matrix product in full precision on every device."""
    return jnp.matmul(x, y, precision="highest")


@inline_jit
def safe_sqrt(x: Array) -> Array:
    """√x with derivative 0 at 0; 0 below."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


@inline_jit
def reciprocal(x: Array) -> Array:
    """1/x; 0 with derivative 0 at 0 and below: a coincident pair neither pulls nor weighs."""
    return jnp.where(x > 0, 1.0 / jnp.where(x > 0, x, 1.0), 0.0)


def least_mass(dtype: Any) -> Any:
    """The smallest sum of kernel weights that counts: below it, weights that underflowed are missing from it."""
    return jnp.finfo(dtype).tiny / jnp.finfo(dtype).eps


def unit_of(mass: Array) -> Array:
    """1/mass, detached, to divide by before anything else; 0 for a mass below `least_mass`.

    A quotient of masses has a derivative of the size of 1/mass², which overflows where a kernel has nearly faded. In
    units of their own values, numerator and denominator are numbers near 1.
    """
    mass = jax.lax.stop_gradient(mass)
    return reciprocal(jnp.where(mass >= least_mass(mass.dtype), mass, 0.0))


def all_finite(x: Any) -> bool:
    """Whether a concrete array has neither NaN nor infinity; also where a function being traced closes over it."""
    with jax.ensure_compile_time_eval():
        x, xp = readable(x)
        return bool(xp.isfinite(x).all())


def readable(x: Any) -> tuple[Any, Any]:
    """A concrete array, and the module to read its values with.

    NumPy, which compiles nothing, for an array in host memory; otherwise `jax.numpy`.
    """
    at_hand = not isinstance(x, jax.Array) or all(device.platform == "cpu" for device in x.devices())
    return (np.asarray(x), np) if at_hand and getattr(x, "is_fully_addressable", True) else (x, jnp)
