"""`Kernel`, the base class of kernels, and any function (a, b) -> Gram as a kernel.

A kernel is a callable (a: Particles, b: Particles) -> Gram [n, m]. `Kernel` adds

    fit(refs)                      the kernel with bandwidths of None, and the like, taken from the references; detached
    at_level(level)                the kernel for points at a noise level; this one is for clean points
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
from mmdjax._points.particles import Particles, as_particles, on_device, whole, wide_dtype
from mmdjax.schedules import Level
from mmdjax.tree import Component, as_component, check_instance, is_concrete, pytree, replace, static

if TYPE_CHECKING:
    from mmdjax.kernels.radial import Radial


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
class Kernel(Component):
    """What makes two samples alike: base class of kernels k(x, y). A kernel is called as kernel(a, b) -> Gram [n, m].

    A kernel of the distance is a subclass of `mmdjax.kernels.Scaled` (with a bandwidth) or `Radial` and writes only its
    value; all that the guidance asks follows from it. For any other kernel write `gram`; the rest has defaults, and
    MMD² and the guidance with precondition="none" work. With `length2`, precondition="length" works too. With
    `has_mass`, a `gradient` that returns the mass, `pair_weights`, `distance2` and `reach`, "mass", "field" and
    "shrunk" do.

    A subclass becomes a frozen dataclass and a pytree by itself (see `mmdjax.tree.complete`). Annotate its fields:
    numbers as `Any`, choices as `int`, `bool` or `str`. Or assign them in an `__init__`.

    In the methods a is n points and b is m points, `Particles` whose `x` is [n, ...] and [m, ...].

    Example:
      >>> class MeanValue(Kernel):  # compares images by their mean brightness
      ...     power: int = 1
      ...     def gram(self, a, b, *, same=False):
      ...         u, v = (jnp.mean(p.x, axis=range(1, p.x.ndim)) for p in (a, b))
      ...         return (u[:, None] * v) ** self.power
      >>> dark, bright = jnp.zeros((1, 8, 8, 1)), jnp.ones((2, 8, 8, 1))
      >>> MeanValue()(bright, dark).tolist()
      [[0.0], [0.0]]
    """

    @in_own_modes
    def __call__(self, a: Particles, b: Particles) -> Float[Array, "n m"]:
        """The Gram matrix k(a_i, b_j)."""
        same = a is b
        a, b = (whole(as_particles(points, name)) for points, name in ((a, "a"), (b, "b")))
        return self.gram(a, b, same=same)

    @property
    def has_mass(self) -> bool:
        """Whether "mass", "field" and "shrunk" work: the kernel is a function of the samples' distance."""
        return False

    @property
    def has_length(self) -> bool:
        """Whether precondition="length" works."""
        return type(self).length2 is not Kernel.length2

    @property
    def uses_cond(self) -> bool:
        """Whether the kernel needs conditions."""
        return False

    @property
    def sees_cond(self) -> bool:
        """Whether the kernel is given conditions if there are any."""
        return self.uses_cond

    @property
    def is_radial(self) -> bool:
        """Whether the kernel reads only the samples' distances, so that `map_radial` changes all of it."""
        return False

    def gram(self, a: Particles, b: Particles, *, same: bool = False) -> Array:
        """The Gram matrix k(a_i, b_j), [n, m]; with `same`, row i of a and row i of b are one point."""
        raise NotImplementedError

    def fit(self, refs: Particles) -> "Kernel":
        """The kernel with all that is taken from references, such as a bandwidth of None, filled in."""
        return self

    def fit_factor(self, refs: Particles) -> "Kernel":
        """`fit` for a factor of a `Product`, which must be positive definite by itself."""
        return self.fit(refs)

    def at_level(self, level: Level) -> "Kernel":
        """The kernel for points at a noise level, as at="sample" compares them; this one is for clean points."""
        return self

    def map_radial(self, change: "Callable[[Radial], Kernel]") -> "Kernel":
        """The kernel with `change(part)` in place of each part that is a `Radial` kernel of the samples."""
        return self

    def widened(self, factor: Any) -> "Kernel":
        """The kernel with its bandwidths multiplied by a factor, except those of a kernel on conditions."""
        return self

    def diffused(self, level: Level, size: int) -> "tuple[Kernel, Kernel]":
        """For at="diffused": the kernel among points at a level, and its average over the noise of the second point.

        The second kernel is between points at the level and α · clean points.

        Args:
          size: how many numbers a sample has.
        """
        self.check_diffused()
        raise NotImplementedError

    def check_diffused(self) -> None:
        """Raise ValueError if there is no closed form for `diffused`."""
        raise ValueError(
            f'at="diffused" integrates the noise in closed form, which exists for RBF only, not {self.called()}; '
            'use RBF, or at="sample"'
        )

    @property
    def splits_cond(self) -> bool:
        """Whether the kernel is a product of one on samples and one on conditions, which `cond_gram` is."""
        return False

    def cond_gram(self, a: Particles, b: Particles) -> Any:
        """k_c(c_i, c_j) [n, m], the factor of a `Product` on conditions; None for any other kernel."""
        return None

    def log_gram(self, a: Particles, b: Particles) -> Array:
        """log k(a_i, b_j), −∞ where k is 0. Override it if k underflows and log k does not."""
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
        """The distance at which the kernel fades, such as its bandwidth; 0 if there is none. Read by "field"."""
        return 0.0

    def pair_weights(self, a: Particles, b: Particles, *, same: bool = False) -> Float[Array, "n m"]:
        """w(a_i, b_j) = −2 ∂k/∂d², [n, m], for a kernel with mass."""
        raise ValueError(self.without("mass"))

    def distance2(self, a: Particles, b: Particles, *, same: bool = False) -> Float[Array, "n m"]:
        """|a_i − b_j|², [n, m], for a kernel with mass."""
        raise ValueError(self.without("mass"))

    def length2(self, a: Particles) -> Any:
        """ℓ², a scalar or [n], such that ℓ² ∂MMD²/∂x is a length. For precondition="length"."""
        raise ValueError(self.without("length"))

    def called(self) -> str:
        """The kernel's name in error messages."""
        return type(self).__name__

    def without(self, precondition: str) -> str:
        """The error message if the kernel cannot be used with a precondition."""
        name = self.called()
        if precondition == "length":
            return f'{name} has no length; use precondition="none"'
        works = 'precondition="length" or "none"' if self.has_length else 'precondition="none"'
        return f'precondition="{precondition}" needs a kernel of the distance and {name} is none; use {works}'

    def gradient(
        self, a: Particles, b: Particles, coef: Array, *, same: bool = False, precondition: str = "none"
    ) -> tuple[Any, Array]:
        """Σ_j coef_ij ∂k(a_i, b_j)/∂a_i, shaped like a.x; and [n], with "mass" Σ_j |coef_ij| w(a_i, b_j), else 1.

        Args:
          a: n points, differentiated.
          b: m points, held fixed, even if they are the same points.
          coef: [m] or [n, m].
          same: a and b are the same points in the same order.
          precondition: "none"; "mass"; or "length", which multiplies the gradient by `length2` (of each term of a sum).
        """
        if precondition == "mass":
            raise ValueError(self.without("mass"))
        scale = jnp.reshape(self.length2(a), (-1, 1)) if precondition == "length" else 1.0
        coef = jnp.broadcast_to(coef, (b.n,)) if jnp.ndim(coef) == 0 else coef

        def pull(columns):
            part = on_device(columns.of(b))
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
            error.add_note("A kernel function (a, b) -> Gram gets Particles: the points are a.x and b.x.")
            raise
        if jnp.shape(gram) != (a.n, b.n):
            raise ValueError(f"the kernel returned shape {jnp.shape(gram)} for {a.n} and {b.n} samples, not [n, m]")
        return gram


def check_fitted(kernel: Kernel, points: str = "references") -> None:
    """Raise ValueError if a bandwidth came out as 0 (NaN), as all points are equal; never inside `jit`.

    Args:
      points: what the kernel was fitted to, for the message.
    """
    for leaf in jax.tree.leaves(kernel):
        if is_concrete(leaf) and not all_finite(leaf):
            raise ValueError(
                f"the {points} give {type(kernel).__name__} a bandwidth of 0: they are all equal, or so many are "
                "repeated that most pairs are equal, or they are so far apart that their squared distances overflow; "
                f"give the bandwidth as a number, such as IMQ(1.0), or {points} that "
                "differ"
            )


def as_kernel(kernel: Any) -> Kernel:
    """A kernel unchanged; any other callable (a, b) -> Gram as a kernel.

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
