"""Kernels of the distance d alone: RBF, Laplacian, Matérn, IMQ, RationalQuadratic, Energy.

`Radial` and `Scaled` are the base classes to write more.

References:
  Gretton et al. 2012 (RBF, the median heuristic), Rasmussen & Williams 2006, section 4.2 (Matérn), Gorham & Mackey 2017
  (IMQ), Székely & Rizzo 2013 and Sejdinovic et al. 2013 (Energy).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax._core.numerics import product, reciprocal, safe_sqrt
from mmdjax._points.blocks import block_beside, sum_over
from mmdjax._points.distances import about, centred_distance, distances_together, middle, read, squared_distance
from mmdjax._points.particles import Particles, flat
from mmdjax.kernels.bandwidths import Median, Neighbourhood
from mmdjax.kernels.contract import Kernel
from mmdjax.kernels.derivatives import by_weight
from mmdjax.tree import are_numbers, as_component, check_instance, is_concrete, pytree, replace, static


class Radial(Kernel):
    """A kernel of the distance alone: `profile(d²)` and `weight(d²)` = −2 ∂profile/∂d², elementwise.

    A subclass may leave out the weight; it is then the derivative, which is exact for a smooth function of d². Write it
    for a function of d = √d²: near 0 the derivative of the root loses digits, and at 0 it counts as 0. All derivatives
    of MMD² use the weight, so that they are finite at d = 0. A weight that is infinite there counts as 0: points that
    coincide do not move each other. A class with both methods, whose value JAX differentiates well at d = 0 too, may
    say so: `class RBF(Scaled, autodiff=True)`.
    """

    def __init_subclass__(cls, autodiff: bool = False, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if not autodiff:
            by_weight(cls)

    @property
    def has_mass(self):
        return True

    @property
    def is_radial(self):
        return type(self).gram is Radial.gram

    @property
    def from_distances(self) -> bool:
        """Whether all that the guidance asks follows from `distance2`: no other method is a subclass's own."""
        own = type(self)
        return self.is_radial and own.gradient is Radial.gradient and own.pair_weights is Radial.pair_weights

    def map_radial(self, change):
        return change(self)

    def profile(self, d2: Array) -> Array:
        """k as a function of the squared distance."""
        raise NotImplementedError(f"{type(self).__name__} has no profile(d2); write it, of the squared distance d2")

    def weight(self, d2: Array) -> Array:
        """w(d²) = −2 ∂k/∂d²."""
        return Radial.profile(self, d2)  # there is none, or this would be its derivative

    def components(self) -> "tuple[tuple[Any, Radial], ...]":
        """(weight, kernel) of each part that has a length."""
        return ((1.0, self),)

    def gram(self, a, b, *, same=False):
        return self.profile(self.distance2(a, b, same=same))

    def pair_weights(self, a, b, *, same=False):
        return self.weight(self.distance2(a, b, same=same))

    def distance2(self, a, b, *, same=False):
        return squared_distance(flat(a.x), b.x, same=same, accurate=True)

    def distances2(self, a: Particles, *sets: Particles) -> list[Array]:
        """`distance2` from a to each of several sets, each [n, m]; the first set begins with a's own points."""
        if type(self).distance2 is not Radial.distance2:
            return [self.distance2(a, b, same=b is sets[0]) for b in sets]
        x = flat(a.x)
        return distances_together(*((x, b.x, b is sets[0]) for b in sets))

    def drawn(self, a: Particles, b: Particles, pulls: Float[Array, "n m"]) -> Any:
        """Σ_j pulls_ij (b_j − a_i), shaped like a.x."""
        points, unflatten = jax.vjp(flat, a.x)
        centre = middle(b.x)  # a common offset costs no digits, nor does a point far from all others
        towards = product(pulls, flat(b.x) - centre) - pulls.sum(1)[:, None] * (points - centre)
        return unflatten(towards.astype(points.dtype))[0]

    def known_gradient(
        self, a: Particles, b: Particles, coef: Array, d2: Float[Array, "n m"], precondition: str
    ) -> tuple[Any, Array]:
        """`gradient`, where the squared distances are known."""
        weight = self.preconditioned_weight(a, d2, precondition)
        pulls = coef * weight
        mass = jnp.sum(jnp.abs(coef) * weight, axis=1) if precondition == "mass" else jnp.ones_like(pulls[:, 0])
        return self.drawn(a, b, pulls), mass

    def preconditioned_weight(self, a: Particles, d2: Float[Array, "n m"], precondition: str) -> Any:
        """w(d²) [n, m]; with "length" each component is multiplied by its ℓ²."""
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
            (y, given, index), c = read(b.x, columns), columns.weights(coef.T).T
            diagonal = columns.index == jnp.arange(a.n)[:, None] if same else None
            d2 = centred_distance(left, y - left.centre, given, index, diagonal=diagonal, accurate=True)
            weight = self.preconditioned_weight(a, d2, precondition)
            pulls = c * weight
            mass = jnp.sum(jnp.abs(c) * weight, axis=1) if precondition == "mass" else jnp.zeros_like(left.squares)
            return product(pulls, y - centre), pulls.sum(1), mass

        # Σ_j pull_ij (y_j − x_i), b read in blocks
        towards, total, mass = sum_over(pull, b.n, block_beside(a.n, b.x))
        gradient = towards - total[:, None] * x
        mass = mass if precondition == "mass" else jnp.ones_like(left.squares)
        return unflatten(gradient.astype(points.dtype))[0], mass


@pytree
class _AtDistances(Radial, autodiff=True):
    """A kernel of the distance between two sets whose distances are known.

    Args:
      kernel: a kernel of the distance.
      d2: the squared distances [n, m].
    """

    kernel: Any
    d2: Any

    def profile(self, d2):
        """As of the kernel."""
        return self.kernel.profile(d2)

    def weight(self, d2):
        """As of the kernel."""
        return self.kernel.weight(d2)

    def distance2(self, a, b, *, same=False):
        return self.d2

    def gradient(self, a, b, coef, *, same=False, precondition="none"):
        return self.kernel.known_gradient(a, b, coef, self.d2, precondition)


def at_distances(kernel: Kernel, d2: Float[Array, "n m"]) -> Kernel:
    """A kernel that `is_radial`, between two sets whose squared distances are known."""
    return kernel.map_radial(lambda part: _AtDistances(part, d2))


def radial_parts(kernel: Kernel) -> list[Radial]:
    """The parts of a kernel that `map_radial` changes, if all that they need are distances; else none."""
    parts: list[Radial] = []
    kernel.map_radial(lambda part: parts.append(part) or part)
    return parts if kernel.is_radial and all(part.from_distances for part in parts) else []


def weights_and_distance2(kernel: Kernel, a: Particles, b: Particles, *, same: bool = False) -> tuple[Array, Array]:
    """`pair_weights` and `distance2`, from distances that are computed once, however many terms the kernel has."""
    d2 = kernel.distance2(a, b, same=same)
    known = at_distances(kernel, d2) if radial_parts(kernel) else kernel
    return known.pair_weights(a, b, same=same), d2


class Scaled(Radial, autodiff=True):
    """A kernel of the distance d with a bandwidth h. A subclass writes `value(d2, h)`, of the squared distance and h.

    The bandwidth is a length in the data's units; a tuple of lengths, for the mean of their kernels; a rule
    (refs: Particles) -> length, such as `mmdjax.kernels.Median()`; or None, for the class's `default_rule()`. Rules are
    applied when the kernel is fitted to references. If the value is not smooth in d² (see `Radial`), write
    `value_weight(d2, h)` = −2 ∂value/∂d² too. At a noise level the bandwidth is α h; override `at_level` if not.

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
                    f"bandwidth is {h}, whose square overflows or underflows in {limits.dtype}; scale the data so that "
                    "their distances are nearer 1, and the bandwidth with them"
                )

    def default_rule(self) -> "Callable[[Particles], Array]":
        """The rule for a bandwidth of None."""
        return Median()

    def value(self, d2, h):
        """k for one bandwidth."""
        name = type(self).__name__
        raise NotImplementedError(f"{name} has no value(d2, h); write it, of the squared distance d2 and a bandwidth h")

    def value_weight(self, d2, h):
        """w for one bandwidth."""
        return Scaled.value(self, d2, h)  # there is none, or this would be its derivative

    def log_value(self, d2, h):
        """log k for one bandwidth; write it if k underflows far away, for `mmdjax.mmd.attribution`."""
        k = self.value(d2, h)
        return jnp.where(k > 0, jnp.log(jnp.where(k > 0, k, 1.0)), -jnp.inf)

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

    def log_gram(self, a, b):
        d2, hs = self.distance2(a, b), self._bandwidths()
        logs = [self.log_value(d2, h) for h in hs]
        return logs[0] if len(hs) == 1 else jax.nn.logsumexp(jnp.stack(logs), axis=0) - jnp.log(len(hs))

    def widened(self, factor):
        def wider(h):
            h = self.default_rule() if h is None else h
            if callable(h):
                return replace(h, factor=factor * h.factor) if hasattr(h, "factor") else h
            return factor * h

        return self._with_each_bandwidth(wider)

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
class RBF(Scaled, autodiff=True):
    """exp(−d²/2h²): alike within the bandwidth h, with little pull beyond 3 h.

    A tuple of bandwidths is the mean of their kernels; None is the median distance of the references. At a noise level
    the bandwidth is √(α²h² + σ²), so that noisy points are not all too far from each other.

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

    def log_value(self, d2, h):
        return -d2 / (2 * h**2)

    def spectral_width(self, key, num, dtype):
        return jnp.ones(num, dtype)

    def check_diffused(self):
        if type(self) is not RBF:  # a subclass may have another value
            super().check_diffused()

    def diffused(self, level, size):
        self.check_diffused()
        among: Any = self.at_level(level)
        return among, DiffusedRBF(among.bandwidth, level.sigma, size)

    def at_level(self, level):
        return self._with_each_bandwidth(lambda h: jnp.sqrt((level.alpha * h) ** 2 + level.sigma**2))


@pytree
class DiffusedRBF(Scaled, autodiff=True):
    """E_ε exp(−|x − y − σε|²/2h²) = (h²/(h² + σ²))^{D/2} exp(−|x − y|²/2(h² + σ²)), ε standard normal of size D."""

    sigma: Any = 0.0
    size: int = static(default=1)

    def value(self, d2, h):
        s2 = self.sigma**2  # the power is taken in the exponent, where it does not underflow alone
        return jnp.exp(-d2 / (2 * (h**2 + s2)) - 0.5 * self.size * jnp.log1p(s2 / h**2))

    def value_weight(self, d2, h):
        return self.value(d2, h) / (h**2 + self.sigma**2)


@pytree
class Laplacian(Scaled, autodiff=True):
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

    def log_value(self, d2, h):
        return -safe_sqrt(d2) / h

    def spectral_width(self, key, num, dtype):
        """The spectrum is Cauchy's in d dimensions: normal over |normal|."""
        return 1 / jnp.abs(jax.random.normal(key, (num,), dtype))

    at_level = RBF.at_level


@pytree
class Matern32(Scaled):
    """(1 + r) e^{−r}, r = √3 d/h: once differentiable, between `Laplacian` and `RBF`.

    Example:
      >>> Matern32(3.0**0.5)(Particles(jnp.zeros((1, 1))), Particles(jnp.array([[1.0]]))).tolist()
      [[0.735...]]

    Source: Rasmussen & Williams 2006, eq. 4.17.
    """

    bandwidth: Any = None

    def value(self, d2, h):
        r = safe_sqrt(3 * d2) / h
        return (1 + r) * jnp.exp(-r)

    def value_weight(self, d2, h):
        return 3 / h**2 * jnp.exp(-safe_sqrt(3 * d2) / h)

    def log_value(self, d2, h):
        r = safe_sqrt(3 * d2) / h
        return jnp.log1p(r) - r

    def spectral_width(self, key, num, dtype):
        """The spectrum is Student's with 3 degrees of freedom."""
        return jax.lax.rsqrt(jax.random.gamma(key, 1.5, (num,), dtype) / 1.5)

    at_level = RBF.at_level


@pytree
class Matern52(Scaled):
    """(1 + r + r²/3) e^{−r}, r = √5 d/h: twice differentiable.

    Example:
      >>> Matern52(5.0**0.5)(Particles(jnp.zeros((1, 1))), Particles(jnp.array([[1.0]]))).tolist()
      [[0.858...]]

    Source: Rasmussen & Williams 2006, eq. 4.17.
    """

    bandwidth: Any = None

    def value(self, d2, h):
        r = safe_sqrt(5 * d2) / h
        return (1 + r + r**2 / 3) * jnp.exp(-r)

    def value_weight(self, d2, h):
        r = safe_sqrt(5 * d2) / h
        return 5 / (3 * h**2) * (1 + r) * jnp.exp(-r)

    def log_value(self, d2, h):
        r = safe_sqrt(5 * d2) / h
        return jnp.log1p(r + r**2 / 3) - r

    def spectral_width(self, key, num, dtype):
        """The spectrum is Student's with 5 degrees of freedom."""
        return jax.lax.rsqrt(jax.random.gamma(key, 2.5, (num,), dtype) / 2.5)

    at_level = RBF.at_level


@pytree
class IMQ(Scaled, autodiff=True):
    """The inverse multiquadric (1 + d²/h²)^(−1/2) = h (d² + h²)^(−1/2): references far away still pull.

    A bandwidth of None is `Neighbourhood()`: about the distance within which a reference has √m of the m as neighbours.

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

    def log_value(self, d2, h):
        return jnp.log(h) - 0.5 * jnp.log(h**2 + d2)

    def spectral_width(self, key, num, dtype):
        """(1 + r)^(−1/2) = E exp(−sr), s ~ Gamma(1/2)."""
        return jnp.sqrt(2 * jax.random.gamma(key, 0.5, (num,), dtype))


@pytree
class RationalQuadratic(Scaled, autodiff=True):
    """(1 + d²/(2 shape h²))^(−shape), a mean of RBFs of many bandwidths; the larger `shape`, the nearer to one RBF."""

    bandwidth: Any = None
    shape: Any = 1.0

    def value(self, d2, h):
        return (1 + d2 / (2 * self.shape * h**2)) ** (-self.shape)

    def value_weight(self, d2, h):
        return (1 + d2 / (2 * self.shape * h**2)) ** (-self.shape - 1) / h**2

    def log_value(self, d2, h):
        width = 2 * self.shape * h**2
        return self.shape * (jnp.log(width) - jnp.log(width + d2))

    def spectral_width(self, key, num, dtype):
        return jnp.sqrt(jax.random.gamma(key, self.shape, (num,), dtype) / self.shape)


@pytree
class Energy(Radial, autodiff=True):
    """−d, which has no bandwidth; its MMD² is the energy distance 2E|x − y| − E|x − x'| − E|y − y'|.

    It is only conditionally positive definite. As a factor of `Product` it becomes |x − o| + |y − o| − |x − y| with o
    the mean of the references, which is positive definite and gives the same MMD² by itself.

    Args:
      origin: o, one sample; None for −d.
      length: the references' median distance, for precondition="length"; `fit` fills it in.

    Example:
      >>> Energy()(Particles(jnp.zeros((1, 2))), Particles(jnp.array([[3.0, 4.0]]))).tolist()
      [[-5.0]]
    """

    origin: Any = None
    length: Any = None

    @property
    def is_radial(self):
        return self.origin is None

    @property
    def from_distances(self):
        return self.is_radial and type(self).gradient is Energy.gradient

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
