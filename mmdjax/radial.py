"""The kernel's contract, and the kernels of the distance d alone: RBF, Laplacian, IMQ, RationalQuadratic, Energy.

A kernel is a callable (a: Particles, b: Particles) -> Gram [n, m]. `Kernel` adds

    fit(refs)                      what was left to the references (bandwidth None, an origin) filled in, detached
    gradient(a, b, coef, ...)      Σ_j coef_ij ∂k(a_i, b_j)/∂a_i and the kernel mass Σ_j |coef_ij| w(a_i, b_j)

with w = −2 ∂k/∂(d²), the weight of mean shift, for a kernel of the distance. `mmdjax.kernels` has the others.

A kernel of one's own is a subclass: of `Scaled` where it has a bandwidth, of `Radial` where it is of the distance, of
`Kernel` else. Nothing is to be registered or decorated, and no square root needs care at distance 0.

References:
  Gretton et al. 2012 (RBF, the median heuristic), Gorham & Mackey 2017 (IMQ), Székely & Rizzo 2013 and Sejdinovic et
  al. 2013 (Energy), Comaniciu & Meer 2002 (mean shift).
"""

import functools
from collections.abc import Callable
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax.bandwidths import Median, Neighbourhood
from mmdjax.blocks import block_beside, sum_over
from mmdjax.distances import about, centred_distance, middle, squared_distance
from mmdjax.modes import in_own_modes
from mmdjax.numerics import product, reciprocal, safe_sqrt
from mmdjax.particles import Particles, as_particles, flat, whole, wide_dtype
from mmdjax.schedules import Level
from mmdjax.tree import are_numbers, as_component, check_instance, complete, is_concrete, pytree, replace, static


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
class Kernel:
    """What the guidance asks of a kernel; a subclass writes `gram`.

    One with mass also has a `gradient` that gives it, `pair_weights`, `distance2` and `reach`.

    A subclass is a frozen dataclass and a pytree without being told (see `mmdjax.tree.complete`): annotate its fields,
    numbers as `Any`, choices as `int`, `bool` or `str`; or assign them in an `__init__`.
    """

    def __new__(cls, *args: Any, **kwargs: Any):
        self = super().__new__(cls)
        if jax.tree_util.all_leaves([self]):  # not before: decorators come after the class's body
            complete(cls)
        return self

    @in_own_modes
    def __call__(self, a: Particles, b: Particles) -> Float[Array, "n m"]:
        """The Gram matrix k(a_i, b_j)."""
        same = a is b
        a, b = (whole(as_particles(points, name)) for points, name in ((a, "a"), (b, "b")))
        return self.gram(a, b, same=same)

    @property
    def has_mass(self) -> bool:
        """Whether precondition="mass" works: the kernel is one of the distance between the samples."""
        return False

    @property
    def has_length(self) -> bool:
        """Whether precondition="length" works."""
        return type(self).length2 is not Kernel.length2

    @property
    def uses_cond(self) -> bool:
        """Whether the kernel compares conditions and cannot do without."""
        return False

    @property
    def sees_cond(self) -> bool:
        """Whether the kernel is given conditions where there are some."""
        return self.uses_cond

    def gram(self, a: Particles, b: Particles, *, same: bool = False) -> Array:
        """The Gram matrix; `same` says that row i of a and row i of b are one point, at distance exactly 0."""
        raise NotImplementedError

    def fit(self, refs: Particles) -> "Kernel":
        """The kernel with everything that it takes from references filled in."""
        return self

    def fit_factor(self, refs: Particles) -> "Kernel":
        """`fit` for a factor of a product, which must be positive definite on its own."""
        return self.fit(refs)

    def at_level(self, level: Level) -> "Kernel":
        """The kernel to compare points at a noise level with, where this one compares clean ones."""
        return self

    def reach(self) -> Any:
        """The distance at which the kernel fades, a scalar; 0 where it has none."""
        return 0.0

    def pair_weights(self, a: Particles, b: Particles, *, same: bool = False) -> Float[Array, "n m"]:
        """w(a_i, b_j), for a kernel with mass."""
        raise ValueError(self.without("mass"))

    def distance2(self, a: Particles, b: Particles, *, same: bool = False) -> Float[Array, "n m"]:
        """|a_i − b_j|², for a kernel with mass."""
        raise ValueError(self.without("mass"))

    def length2(self, a: Particles) -> Any:
        """ℓ², scalar or [n]: what makes ℓ² ∂MMD²/∂x a length."""
        raise ValueError(self.without("length"))

    def called(self) -> str:
        """What messages call it."""
        return type(self).__name__

    def without(self, precondition: str) -> str:
        """What to say where the kernel cannot serve a precondition."""
        name = self.called()
        if precondition == "length":
            return f'{name} has no length; use precondition="none"'
        works = 'precondition="length" or "none"' if self.has_length else 'precondition="none"'
        return f'precondition="{precondition}" needs a kernel of the distance and {name} is none; use {works}'

    def gradient(
        self, a: Particles, b: Particles, coef: Array, *, same: bool = False, precondition: str = "none"
    ) -> tuple[Any, Array]:
        """Σ_j coef_ij ∂k(a_i, b_j)/∂a_i, shaped like a.x, and the mass [n] that "mass" divides it by (else 1).

        Args:
          a: n points, differentiated.
          b: m points, held fixed (also where they are the same points).
          coef: [m] or [n, m].
          same: a and b are the same points in the same order.
          precondition: with "length" the gradient comes multiplied by `length2`, by component in a sum.
        """
        if precondition == "mass":
            raise ValueError(self.without("mass"))
        scale = jnp.reshape(self.length2(a), (-1, 1)) if precondition == "length" else 1.0
        coef = jnp.broadcast_to(coef, (b.n,)) if jnp.ndim(coef) == 0 else coef

        def pull(columns):
            part = columns.of(b)
            gram, pull_back = jax.vjp(lambda x: self.gram(replace(a, x=x), part, same=same and part.n == b.n), a.x)
            c = jnp.broadcast_to(scale * columns.weights(coef.T).T, gram.shape)
            (gradient,) = pull_back(c.astype(gram.dtype))
            return jax.tree.map(lambda g: g.astype(gram.dtype), gradient)

        gradient = sum_over(pull, b.n, block_beside(a.n, b.x))
        gradient = jax.tree.map(lambda g, x: g.astype(jnp.result_type(x)), gradient, a.x)
        return gradient, jnp.ones(a.n, wide_dtype(a.x))


def finite_at_zero(function: Callable) -> Callable:
    """f(d², …), elementwise in d², with 0 for values and derivatives that would not be finite at d² = 0."""

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
    """f(d², …), elementwise in d², its derivative in d² being `slope(d², …)`; in the rest it is automatic."""

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


def _by_weight(cls: type) -> None:
    """Let the derivatives in d² of what a class writes be those that its weights give."""
    for name, of_weight in (("profile", "weight"), ("value", "value_weight")):
        value, weight = vars(cls).get(name), vars(cls).get(of_weight)
        written = weight
        if value is not None and weight is None:
            weight, written = _weight_from(value), value
        elif cls.__module__.split(".")[0] == __package__:  # autodiff of these is exact, at 0 too
            continue
        if weight is not None:
            setattr(cls, of_weight, _method(weight, finite_at_zero(_of_d2(weight)), written))
        if value is not None:
            setattr(cls, name, _method(value, with_slope(_of_d2(value), _half(of_weight)), value))


def _of_d2(method):
    return lambda d2, kernel, *h: method(kernel, d2, *h)


def _method(like, f, written):
    """f as a method, what the class has written being looked at first."""

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


class Radial(Kernel):
    """A kernel of the distance alone: `profile(d²)` and `weight(d²)` = −2 ∂profile/∂d², elementwise.

    A subclass may leave the weight out: it is then the derivative, exact for a smooth function of d². A function of
    d = √d² should give it, as near 0 the derivative of the root loses digits, and at 0 it is taken as 0. All
    derivatives of MMD² come from the weight, so that they are finite at d = 0; a weight that is infinite there counts
    as 0: a coincident pair neither pulls nor weighs.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        _by_weight(cls)

    @property
    def has_mass(self):
        return True

    def profile(self, d2: Array) -> Array:
        """k as a function of the squared distance."""
        raise NotImplementedError(f"{type(self).__name__} has no profile(d2); write it, of the squared distance d2")

    def weight(self, d2: Array) -> Array:
        """w(d²) = −2 ∂k/∂d²."""
        return Radial.profile(self, d2)  # there is none, or this would be its derivative

    def components(self) -> "tuple[tuple[Any, Radial], ...]":
        """(weight, kernel) of each part with a length of its own."""
        return ((1.0, self),)

    def gram(self, a, b, *, same=False):
        return self.profile(self.distance2(a, b, same=same))

    def pair_weights(self, a, b, *, same=False):
        return self.weight(self.distance2(a, b, same=same))

    def distance2(self, a, b, *, same=False):
        return squared_distance(flat(a.x), b.x, same=same, accurate=True)

    def preconditioned_weight(self, a: Particles, d2: Float[Array, "n m"], precondition: str) -> Any:
        """w(d²) [n, m]; with "length" each component's times its ℓ²."""
        if precondition != "length":
            return self.weight(d2)
        return sum(jnp.reshape(s * k.length2(a), (-1, 1)) * k.weight(d2) for s, k in self.components())

    def gradient(self, a, b, coef, *, same=False, precondition="none"):
        points, unflatten = jax.vjp(flat, a.x)
        coef = coef if jnp.ndim(coef) else jnp.broadcast_to(coef, (b.n,))
        centre = middle(b.x)  # a common offset costs no digits, nor does a point far from all others
        left = about(points, centre)
        x = points - centre

        def pull(columns):
            y, c = flat(columns.of(b.x)), columns.weights(coef.T).T
            diagonal = columns.index == jnp.arange(a.n)[:, None] if same else None
            d2 = centred_distance(left, y - left.centre, b.x, columns.index, diagonal=diagonal, accurate=True)
            weight = self.preconditioned_weight(a, d2, precondition)
            pulls = c * weight
            mass = jnp.sum(jnp.abs(c) * weight, axis=1) if precondition == "mass" else jnp.zeros_like(left.squares)
            return product(pulls, y - centre), pulls.sum(1), mass

        # Σ_j pull_ij (y_j − x_i), b read in blocks
        towards, total, mass = sum_over(pull, b.n, block_beside(a.n, b.x))
        gradient = towards - total[:, None] * x
        mass = mass if precondition == "mass" else jnp.ones_like(left.squares)
        return unflatten(gradient.astype(points.dtype))[0], mass


class Scaled(Radial):
    """A radial kernel with a bandwidth: a number, a tuple (the mean of its kernels), a rule like `Median`, or None.

    A subclass writes `value(d2, h)` and, unless it is smooth in d² (see `Radial`), `value_weight(d2, h)`.

    Example:
      >>> class Cauchy(Scaled):
      ...     def value(self, d2, h):
      ...         return 1 / (1 + d2 / h**2)
      >>> p = Particles(jnp.array([[0.0], [1.0]]))
      >>> Cauchy(1.0)(p, p).tolist(), Cauchy(1.0).pair_weights(p, p).tolist()
      ([[1.0, 0.5], [0.5, 1.0]], [[2.0, 0.5], [0.5, 2.0]])
    """

    bandwidth: Any = None

    def __post_init__(self):
        if isinstance(self.bandwidth, tuple) and not self.bandwidth:
            raise ValueError("bandwidth is (); give at least one length")
        bandwidth = tuple(self.bandwidth) if isinstance(self.bandwidth, list) else self.bandwidth
        for h in jax.tree.leaves(bandwidth):
            check_instance("bandwidth", h)
        rules = jax.tree.map(lambda h: as_component(h) if callable(h) else h, bandwidth)
        object.__setattr__(self, "bandwidth", rules)
        for h in jax.tree.leaves(rules):
            if not are_numbers(h):
                raise TypeError(f"bandwidth is {h!r}; give a length, None or a rule such as mmdjax.kernels.Median()")
            if is_concrete(h) and not (np.asarray(h) > 0).all():
                raise ValueError(
                    f"bandwidth is {h}; a length above 0 is needed ({type(self).__name__}(None) takes it from refs)"
                )
            limits = jnp.finfo(jnp.result_type(float))
            if is_concrete(h) and not all(
                float(limits.tiny) <= v * v <= float(limits.max) for v in np.ravel(h).astype(float).tolist()
            ):
                raise ValueError(
                    f"bandwidth is {h}, whose square is no {limits.dtype} number; scale the data, so that their "
                    "distances are nearer 1, and the bandwidth with them"
                )

    def default_rule(self) -> "Callable[[Particles], Array]":
        """Where bandwidth None comes from."""
        return Median()

    def value(self, d2, h):
        """k for one bandwidth."""
        name = type(self).__name__
        raise NotImplementedError(f"{name} has no value(d2, h); write it, of the squared distance d2 and a bandwidth h")

    def value_weight(self, d2, h):
        """w for one bandwidth."""
        return Scaled.value(self, d2, h)  # there is none, or this would be its derivative

    def _bandwidths(self) -> tuple:
        hs = self.bandwidth if isinstance(self.bandwidth, tuple) else (self.bandwidth,)
        if any(h is None or callable(h) for h in hs):
            raise ValueError(
                f"{type(self).__name__}({self.bandwidth}) takes its bandwidth from references; call "
                "kernel.fit(refs) first, or give a number such as median_bandwidth(refs)"
            )
        for h in hs:
            if jnp.ndim(h) > 0:  # would broadcast over the Gram's columns
                raise ValueError(
                    f"bandwidth has shape {jnp.shape(h)}; give a tuple for a mixture, or vmap over an array"
                )
        return hs

    def _with_each_bandwidth(self, change: Callable) -> "Kernel":
        h = self.bandwidth
        return replace(self, bandwidth=tuple(map(change, h)) if isinstance(h, tuple) else change(h))

    def profile(self, d2):
        hs = self._bandwidths()
        return sum(self.value(d2, h) for h in hs) / len(hs)

    def weight(self, d2):
        hs = self._bandwidths()
        return sum(self.value_weight(d2, h) for h in hs) / len(hs)

    def components(self):
        hs = self._bandwidths()
        return tuple((1.0 / len(hs), replace(self, bandwidth=h)) for h in hs)

    def reach(self):
        hs = self._bandwidths()
        return sum(jnp.asarray(h) for h in hs) / len(hs)

    def length2(self, a):
        (h,) = self._bandwidths()
        return jnp.asarray(h) ** 2

    def fit(self, refs):
        def from_refs(h):
            rule = self.default_rule() if h is None else h
            return rule(refs) if callable(rule) else rule

        return self._with_each_bandwidth(from_refs)

    def at_level(self, level):
        return self._with_each_bandwidth(lambda h: level.alpha * h)


@pytree
class RBF(Scaled):
    """exp(−d²/2h²). A tuple of bandwidths is the mean of their kernels; None is the median distance of the references.

    At a noise level the width is √(α²h² + σ²): a fixed one would see nothing at high noise.

    Example:
      >>> p = Particles(jnp.array([[0.0], [1.0]]))
      >>> RBF(1.0)(p, p).tolist()
      [[1.0, 0.606...], [0.606..., 1.0]]
    """

    bandwidth: Any = None

    def value(self, d2, h):
        return jnp.exp(-d2 / (2 * h**2))

    def value_weight(self, d2, h):
        return jnp.exp(-d2 / (2 * h**2)) / h**2

    def at_level(self, level):
        return self._with_each_bandwidth(lambda h: jnp.sqrt((level.alpha * h) ** 2 + level.sigma**2))


@pytree
class Laplacian(Scaled):
    """exp(−d/h), d the Euclidean distance.

    Example:
      >>> Laplacian(1.0)(Particles(jnp.zeros((1, 2))), Particles(jnp.array([[3.0, 4.0]]))).tolist()
      [[0.0067...]]
    """

    bandwidth: Any = None

    def value(self, d2, h):
        return jnp.exp(-safe_sqrt(d2) / h)

    def value_weight(self, d2, h):
        return self.value(d2, h) * reciprocal(h * safe_sqrt(d2))

    at_level = RBF.at_level


@pytree
class IMQ(Scaled):
    """The inverse multiquadric (1 + d²/h²)^(−1/2) = h (d² + h²)^(−1/2).

    None is `Neighbourhood()`: the distance at which a reference has some √m of the m as neighbours.

    Example:
      >>> IMQ(3.0)(Particles(jnp.zeros((1, 1))), Particles(jnp.array([[4.0]]))).tolist()
      [[0.6...]]
    """

    bandwidth: Any = None

    def default_rule(self):
        return Neighbourhood()

    def value(self, d2, h):
        return jax.lax.rsqrt(1 + d2 / h**2)

    def value_weight(self, d2, h):
        return self.value(d2, h) ** 3 / h**2


@pytree
class RationalQuadratic(Scaled):
    """(1 + d²/(2 shape h²))^(−shape): a scale mixture of RBFs; the tail thins as `shape` grows."""

    bandwidth: Any = None
    shape: Any = 1.0

    def value(self, d2, h):
        return (1 + d2 / (2 * self.shape * h**2)) ** (-self.shape)

    def value_weight(self, d2, h):
        return (1 + d2 / (2 * self.shape * h**2)) ** (-self.shape - 1) / h**2


@pytree
class Energy(Radial):
    """−d; MMD² with it is the energy distance 2E|x − y| − E|x − x'| − E|y − y'|.

    Conditionally positive definite. As a factor of `Product` it becomes |x − o| + |y − o| − |x − y| with o the
    reference mean, which is positive definite and gives the same MMD² on its own.

    Args:
      origin: o, one sample; None for −d.
      length: the references' median distance, for precondition="length"; `fit` fills it in.

    Example:
      >>> Energy()(Particles(jnp.zeros((1, 2))), Particles(jnp.array([[3.0, 4.0]]))).tolist()
      [[-5.0]]
    """

    origin: Any = None
    length: Any = None

    def profile(self, d2):
        return -safe_sqrt(d2)

    def weight(self, d2):
        return reciprocal(safe_sqrt(d2))

    def gram(self, a, b, *, same=False):
        gram = super().gram(a, b, same=same)
        if self.origin is None:
            return gram
        return gram + self._from_origin(a)[:, None] + self._from_origin(b)[None, :]

    def gradient(self, a, b, coef, *, same=False, precondition="none"):
        gradient, mass = super().gradient(a, b, coef, same=same, precondition=precondition)
        if self.origin is None:
            return gradient, mass
        # the origin pushes with what all of b pulls with: −Σ_j coef_ij (o − a_i)/|a_i − o|
        total = jnp.broadcast_to(coef, (a.n, b.n)).sum(1, keepdims=True)
        origin = Particles(jax.tree.map(lambda o: jnp.asarray(o)[None], self.origin))
        plain = replace(self, origin=None)
        pushed, from_origin = plain.gradient(a, origin, -total, precondition=precondition)
        return jax.tree.map(jnp.add, gradient, pushed), mass + (from_origin if precondition == "mass" else 0)

    def fit(self, refs):
        if self.length is not None or refs.n < 2:  # one reference has no length, and only precondition="length" asks
            return self
        return replace(self, length=jnp.nan_to_num(Median()(refs)))  # equal references: 0, a length that moves nothing

    def fit_factor(self, refs):
        fitted = self.fit(refs)
        if self.origin is not None:
            return fitted
        p = refs.probabilities()
        mean = jax.tree.map(lambda x: jnp.tensordot(p, jnp.asarray(x, p.dtype), 1), refs.x)
        return replace(fitted, origin=jax.lax.stop_gradient(mean))

    def at_level(self, level):
        return jax.tree.map(lambda leaf: level.alpha * leaf, self)

    def reach(self):
        return 0.0 if self.length is None else self.length

    def length2(self, a):
        if self.length is None:
            raise ValueError(
                'Energy() takes its length from references; call kernel.fit(refs) first, or precondition="none"'
            )
        return self.length

    def _from_origin(self, points):
        origin = Particles(jax.tree.map(lambda o: jnp.asarray(o)[None], self.origin))
        return -super().gram(points, origin)[:, 0]
