"""The kernel's contract: what the guidance asks of a kernel, and any function (a, b) -> Gram as one.

A kernel is a callable (a: Particles, b: Particles) -> Gram [n, m]. `Kernel` adds

    fit(refs)                      what was left to the references (bandwidth None, an origin) filled in, detached
    at_level(level)                the kernel for points at a noise level, where this one compares clean ones
    gradient(a, b, coef, ...)      Σ_j coef_ij ∂k(a_i, b_j)/∂a_i and the kernel mass Σ_j |coef_ij| w(a_i, b_j)

with w = −2 ∂k/∂(d²), the weight of mean shift, for a kernel of the distance.

References:
  Comaniciu & Meer 2002 (mean shift).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmdjax._core.modes import in_own_modes
from mmdjax._core.numerics import all_finite
from mmdjax._points.blocks import block_beside, sum_over
from mmdjax._points.particles import Particles, as_particles, whole, wide_dtype
from mmdjax.schedules import Level
from mmdjax.tree import Component, as_component, check_instance, is_concrete, pytree, replace, static

if TYPE_CHECKING:
    from mmdjax.kernels.radial import Radial


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
class Kernel(Component):
    """What the guidance asks of a kernel; a subclass writes `gram`.

    One with mass also has a `gradient` that gives it, `pair_weights`, `distance2` and `reach`.

    A subclass is a frozen dataclass and a pytree without being told (see `mmdjax.tree.complete`): annotate its fields,
    numbers as `Any`, choices as `int`, `bool` or `str`; or assign them in an `__init__`.
    """

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

    @property
    def is_radial(self) -> bool:
        """Whether samples are seen by their distances alone, so that `map_radial` reaches all of the kernel."""
        return False

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

    def map_radial(self, change: "Callable[[Radial], Kernel]") -> "Kernel":
        """The kernel with `change(part)` for each part that is of the distance between samples."""
        return self

    def widened(self, factor: Any) -> "Kernel":
        """The kernel with its bandwidths on samples multiplied, those between conditions left."""
        return self

    def diffused(self, level: Level, size: int) -> "tuple[Kernel, Kernel]":
        """The kernel among points at a level, and that between them and α · clean points, the noise integrated out.

        Args:
          size: numbers in a sample.
        """
        self.check_diffused()
        raise NotImplementedError

    def check_diffused(self) -> None:
        """Raise ValueError if `diffused` has no closed form."""
        raise ValueError(
            f'at="diffused" integrates the noise in closed form, which exists for RBF only, not {self.called()}; '
            'use RBF, or at="sample"'
        )

    def cond_gram(self, a: Particles, b: Particles) -> Any:
        """k_c(c_i, c_j) [n, m] of a product with a kernel on conditions; None for any other kernel."""
        return None

    def log_gram(self, a: Particles, b: Particles) -> Array:
        """log k(a_i, b_j), −∞ where k is 0; right also where k underflows, if the kernel knows how."""
        gram = self.gram(a, b)
        return jnp.where(gram > 0, jnp.log(jnp.where(gram > 0, gram, 1.0)), -jnp.inf)

    def spectral_width(self, key: Any, num: int, dtype: Any) -> Array:
        """Draws of s [num] with k(x, y) = E exp(i s zᵀ(x − y)/h), z standard normal and h the bandwidth.

        Raises:
          TypeError: the kernel has no known spectrum.
        """
        raise TypeError(
            f"{self.called()} has no known spectrum; use RBF, Laplacian, Matern32, Matern52, IMQ or RationalQuadratic, "
            "or `nystroem`"
        )

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


@pytree
class Custom(Kernel):
    """A function (a, b) -> Gram as a kernel."""

    function: Any

    @property
    def sees_cond(self):
        return True

    def called(self):
        return "a function (a, b) -> Gram"

    def without(self, precondition):
        return super().without(precondition) + (
            ", or write in its place a subclass of mmdjax.kernels.Scaled with value(d2, h), "
            "of the squared distance and a bandwidth, which serves every precondition"
        )

    def gram(self, a, b, *, same=False):
        try:
            gram = self.function(a, b)
        except (AttributeError, TypeError) as error:
            error.add_note("A kernel function (a, b) -> Gram is given Particles: the points are a.x and b.x.")
            raise
        if jnp.shape(gram) != (a.n, b.n):
            raise ValueError(f"the kernel returned shape {jnp.shape(gram)} for {a.n} and {b.n} samples, not [n, m]")
        return gram


def check_fitted(kernel: Kernel) -> None:
    """Raise ValueError if a bandwidth came out as 0 (NaN), the references being all equal; unseen inside `jit`."""
    for leaf in jax.tree.leaves(kernel):
        if is_concrete(leaf) and not all_finite(leaf):
            raise ValueError(
                f"the references give {type(kernel).__name__} a bandwidth of 0: they are all equal, or so far apart "
                "that their squared distances overflow; give the bandwidth as a number, such as IMQ(1.0), or "
                "references that differ"
            )


def as_kernel(kernel: Any) -> Kernel:
    """A kernel unchanged; any other callable (a, b) -> Gram as one.

    Raises:
      TypeError: not callable, or a class.
    """
    if isinstance(kernel, Kernel):
        return kernel
    check_instance("kernel", kernel)
    if not callable(kernel):
        raise TypeError(
            f"a kernel is a callable (a, b) -> Gram [n, m], such as RBF(1.0); this is {type(kernel).__name__}"
        )
    return Custom(as_component(kernel))
