"""Derivatives of functions of d² that stay finite at d = 0, where roots have none.

References:
  Comaniciu & Meer 2002 (mean shift: w = −2 ∂k/∂d²).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def finite_at_zero(function: Callable) -> Callable:
    """f(d², …), elementwise in d², with 0 in place of values and derivatives that are not finite at d² = 0."""

    def value(d2, *rest):
        zero = jnp.zeros((), d2.dtype)
        finite = jnp.isfinite(function(zero, *jax.lax.stop_gradient(rest)))
        held = jax.tree.map(lambda v: jnp.where(finite, v, jax.lax.stop_gradient(v)), rest)
        there = jnp.where(finite, function(zero, *held), 0.0)
        return jnp.where(d2 == 0, there, function(jnp.where(d2 == 0, 1.0, d2), *rest))

    return with_slope(value, lambda *args: finite_at_zero(functools.partial(_slope, function))(*args))


def _slope(function, d2, *rest):
    return jax.jvp(lambda v: function(v, *rest), (d2,), (jnp.ones_like(d2),))[1]


def with_slope(function: Callable, slope: Callable) -> Callable:
    """f(d², …), elementwise in d², with the derivative `slope(d², …)` in d², automatic ones in other arguments."""

    def call(d2, *rest):
        leaves, structure = jax.tree.flatten(rest)
        of_leaves = (lambda d2, *v, f=f: f(d2, *jax.tree.unflatten(structure, v)) for f in (function, slope))
        return _with_slope(*of_leaves)(d2, *leaves)

    return call


def _with_slope(function, slope):
    f = jax.custom_jvp(function)

    def jvp(primals, tangents):
        (d2, *rest), (d2_dot, *rest_dot) = primals, tangents
        value = f(d2, *rest)
        change = jnp.zeros_like(value) if _is_zero(d2_dot) else slope(d2, *rest) * d2_dot
        moving = [i for i, dot in enumerate(rest_dot) if not _is_zero(dot)]
        numbers = [i for i in moving if jnp.ndim(rest[i]) == 0]
        for i in numbers:  # the derivative in it has one in d² too, that of the slope; apart from the tangent, as
            # reverse mode keeps no custom derivative of what is linear in one
            of_value, of_slope = (functools.partial(_along, g, i) for g in (function, slope))
            change += _with_slope(of_value, of_slope)(d2, *rest) * rest_dot[i]
        arrays = [i for i in moving if i not in numbers]
        if arrays:

            def of_arrays(*values):
                given = dict(zip(arrays, values, strict=True))
                return function(d2, *[given.get(i, v) for i, v in enumerate(rest)])

            change += jax.jvp(of_arrays, tuple(rest[i] for i in arrays), tuple(rest_dot[i] for i in arrays))[1]
        return value, change

    f.defjvp(jvp, symbolic_zeros=True)
    return f


def _along(function, i, d2, *rest):
    """The derivative of function(d2, *rest) in rest[i], a number."""
    number = jnp.asarray(rest[i])
    return jax.jvp(lambda v: function(d2, *rest[:i], v, *rest[i + 1 :]), (number,), (jnp.ones_like(number),))[1]


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def by_weight(cls: type) -> None:
    """Make the weights of a class of `Radial` the derivatives in d² of its values."""
    for name, of_weight in (("profile", "weight"), ("value", "value_weight")):
        value, weight = vars(cls).get(name), vars(cls).get(of_weight)
        written = weight
        if value is not None and weight is None:
            weight, written = _weight_from(value), value
        if weight is not None:
            setattr(cls, of_weight, _method(weight, finite_at_zero(_of_d2(weight)), written))
        if value is not None:
            setattr(cls, name, _method(value, with_slope(_of_d2(value), _half(of_weight)), value))


def _of_d2(method):
    return lambda d2, kernel, *h: method(kernel, d2, *h)


def _method(like, f, written):
    """f as a method, after a check of the method that the class has written."""

    @functools.wraps(like)
    def method(self, d2, *h):
        d2 = jnp.asarray(d2, float)
        shape = jnp.shape(jax.eval_shape(lambda d2: jnp.asarray(written(self, d2, *h)), d2))
        if shape != d2.shape:
            raise ValueError(
                f"{type(self).__name__}.{written.__name__} returned shape {shape} for d2 of shape {d2.shape}; it must "
                "be elementwise in d2"
            )
        return f(d2, self, *h)

    return method


def _half(name):
    return lambda d2, kernel, *h: -0.5 * getattr(kernel, name)(d2, *h)


def _weight_from(value):
    def weight(self, d2, *h):
        """−2 ∂value/∂d²."""
        return -2 * _slope(_of_d2(value), d2, self, *h)

    return weight
