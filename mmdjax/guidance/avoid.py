"""References to avoid: `Avoid`, and what the guidance adds for them.

With references Q, samples to avoid A and a strength λ, particles z_i of weight u_i move down the gradient of MMD² to
the signed measure Q − λA, which is

    MMD²(P, Q − λA) = E k(z, z') − 2 E k(z, y) + 2λ E k(z, a) + constant.

Its last term is new. To P_i ∂MMD²/∂z_i / u_i it adds 2λ P_i Σ_j a_j ∂k(z_i, a_j)/∂z_i, with the rule's own P_i: so
"none", "raw" and "length" follow the gradient. "mass" and "field" need a step that is bounded, and 0 far from all of A.
With w = −2 ∂k/∂d² and the kernel's reach h they move z_i by

    λ s Σ_j a_j w(z_i, a_j) (z_i − a_j) / max(Σ_j a_j w(z_i, a_j), Σ_{j≠i} u_j w(z_i, z_j), w(h)):

a part s of the step away from the mean of A around z_i, reduced where A is thinner there than the batch is, or farther
than the reach. It has the gradient's direction. Where x̂0 is moved, h is widened to √(h² + e²), e² the mean squared
error of x̂0 (`widened`): at high noise all of A may still be near, at the end only what is alike within h.

With `nearest` it is each sample of A that counts, not their share: a_j is 1, and the batch's mass is left out. With a
radius r the kernel is ½ (r − d)₊², so that w (z − a) leads from a to the surface of its ball and is 0 outside. The step
is along the sum of these over all balls, and as long as the depth in the deepest, λ (r − min_j d_ij)₊.

References:
  Safety-Guided Flow, arXiv 2603.13300 (the cross term of MMD², in the early steps). SPELL, arXiv 2410.06025 (the step
  out of a ball). Particle Guidance, arXiv 2310.13102 (samples that avoid each other).
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax._core.numerics import reciprocal, safe_sqrt
from mmdjax._points.blocks import Rows, block_beside, num_blocks, rows, sum_over
from mmdjax._points.particles import Particles, as_particles, check_points, flat, per_sample, wide_dtype
from mmdjax._points.streaming import HostReferences
from mmdjax.guidance import MMDGuidance, check_cond
from mmdjax.guidance.rules import over_larger_mass
from mmdjax.guidance.sides import Sides
from mmdjax.kernels import Kernel, Radial, as_kernel
from mmdjax.schedules import Level
from mmdjax.tree import are_numbers, check_number, is_concrete, pytree, replace, static

STEP = 0.05  # s; the eight inner steps for each network call make a half
EARLY, ALL = (0.0, 0.5), (0.0, 1.0)
TIES = 1 + 1e-5  # of squared distances that two programs compute


@pytree
class Avoid:
    """Samples to keep away from: unwanted attributes or modes, protected pictures, a training set.

    `guided_sample(..., avoid=...)` takes an array or `Particles` too, with the defaults here. There are two ways to
    avoid a set. As a distribution, the default: samples have less of what is more frequent in the set than in the
    batch, such as an attribute that 30 pictures show. One by one, with `radius` or `nearest`: no sample comes near any
    picture of the set. Without x the samples avoid each other, for diversity; give a kernel then.

    Args:
      x: the samples to avoid, [m, *model.shape], scaled as the model's training data was; or `HostReferences`, which
        the device reads in blocks. None: the other samples of the batch and of the memory.
      cond: their conditions, a pytree of [m, ...], where the kernel compares these: a sample then avoids those of a
        condition like its own.
      weight: [m], not negative; only ratios matter. 0 leaves one out.
      strength: λ, at least 0; 0 is no effect. Raise it by steps of 2 and look at samples: too much drives them off the
        data. References that show what is to be avoided pull to it; leave these out first. Under "none", "raw" and
        "length" λ = 1 weighs the samples to avoid as the references.
      window: (start, end): acts while start <= steps done / all steps < end. None: (0, 0.5), the early steps, which
        decide what a sample shows; (0, 1) with a radius. The guidance's own window does not matter.
      nearest: compare each sample with its so many nearest ones of the set only, each of which counts fully.
      radius: no sample comes closer to one of the set, in the data's units (L2 norm), except into a gap between balls
        that overlap. With at="denoised" or "clean".
      kernel: what makes two samples alike. None: the guidance's own; without references its bandwidth is taken from x.
        At high noise, when x̂0 does not tell yet what a sample will be, the bandwidth is widened.
    Raises:
      TypeError: x is not floats; strength or radius is not a number.
      ValueError: shapes that differ; NaN; a strength below 0; nearest below 1; a radius and a kernel.

    Example:
      >>> from mmdjax import guided_sample
      >>> from mmdjax.mixtures import mixture, mixture_model
      >>> left_and_right, model = mixture([[-4.0, 0.0], [4.0, 0.0]], 0.5), mixture_model(2)
      >>> few = jnp.array([[4.0, 0.0], [4.2, 0.3], [3.9, -0.4]])
      >>> how = {"model": model, "num_samples": 50, "num_steps": 10}
      >>> def on_the_right(avoid):
      ...     x = guided_sample(left_and_right, jax.random.key(0), None, avoid=avoid, **how).x
      ...     return int((x[:, 0] > 0).sum())
      >>> on_the_right(None) > 20, on_the_right(Avoid(few, strength=4.0)) < 15
      (True, True)
      >>> on_the_right(Avoid(few, radius=5.0)) < 15
      True

    Source: arXiv 2603.13300, 2410.06025, 2310.13102.
    """

    x: Any = None
    cond: Any = None
    weight: Any = None
    strength: Any = 1.0
    window: Any = None
    nearest: int | None = static(default=None)
    radius: Any = None
    kernel: Any = None

    def __post_init__(self):
        if self.x is not None:
            points = as_particles(Particles(self.x, self.cond, self.weight), "avoid")
            for name in ("x", "cond", "weight"):
                object.__setattr__(self, name, getattr(points, name))
        elif self.kernel is None:
            raise ValueError(
                "Avoid() without x keeps samples apart from each other and needs a kernel with a bandwidth, such as "
                "Avoid(kernel=IMQ(1.0)); or give the samples to avoid"
            )
        elif self.radius is not None or self.nearest is not None or self.cond is not None or self.weight is not None:
            raise ValueError("radius, nearest, cond and weight are of samples to avoid; give x, or leave them out")
        check_number("avoid.strength", self.strength)
        if is_concrete(self.strength) and not (np.isfinite(self.strength).all() and np.all(self.strength >= 0)):
            raise ValueError(f"avoid.strength is {self.strength}; give a finite number of at least 0 (0: no effect)")
        if self.radius is not None:
            check_number("avoid.radius", self.radius)
            if is_concrete(self.radius) and not (np.isfinite(self.radius).all() and np.all(self.radius > 0)):
                raise ValueError(f"avoid.radius is {self.radius}; give a length above 0")
            if self.kernel is not None:
                raise ValueError("avoid has a radius and a kernel; a radius is a kernel by itself, so give one of them")
        if self.nearest is not None and (
            not isinstance(self.nearest, int) or isinstance(self.nearest, bool) or self.nearest < 1
        ):
            raise ValueError(f"avoid.nearest is {self.nearest!r}; give a number of samples, at least 1, or None")
        if self.kernel is not None:
            object.__setattr__(self, "kernel", as_kernel(self.kernel))
        self._check_window()

    def _check_window(self):
        if self.window is None:
            return
        if isinstance(self.window, list):
            object.__setattr__(self, "window", tuple(self.window))
        if not isinstance(self.window, tuple) or len(self.window) != 2 or not are_numbers(self.window):
            raise ValueError(f"avoid.window is {self.window}; give (start, end), fractions of the steps")
        if is_concrete(self.window) and not 0 <= self.window[0] < self.window[1] <= 1:
            raise ValueError(f"avoid.window is {self.window}; it needs 0 <= start < end <= 1, fractions of the steps")

    @property
    def points(self) -> Particles | None:
        """The samples to avoid; None: each other."""
        return None if self.x is None else Particles(self.x, self.cond, self.weight)

    @property
    def one_by_one(self) -> bool:
        """Whether each sample to avoid counts fully, however many there are."""
        return self.nearest is not None or self.radius is not None

    @property
    def span(self) -> tuple[Any, Any]:
        """The window; its default where it is None."""
        return self.window or (EARLY if self.radius is None else ALL)

    def active(self, fraction: Any) -> Any:
        """Whether a fraction of the steps lies in the window."""
        start, end = self.span
        return (fraction >= start) & (fraction < end)

    def kernel_for(self, guidance: MMDGuidance) -> Kernel:
        """The kernel, not fitted yet."""
        own = guidance.base_kernel if self.kernel is None else self.kernel
        if self.radius is None:
            return own
        shield = Shield(self.radius)
        return own.map_radial(lambda _: shield) if own.is_radial and self.cond is not None else shield

    def effective(self) -> bool:
        """False if the strength is known to be 0."""
        return not (is_concrete(self.strength) and np.all(np.asarray(self.strength) == 0))


def as_avoid(avoid: Any) -> Avoid | None:
    """None and `Avoid` unchanged; an array or Particles as an `Avoid` with the defaults.

    Raises:
      TypeError: it is not an array.
    """
    if avoid is None or isinstance(avoid, Avoid):
        return avoid
    if isinstance(avoid, type):
        raise TypeError(f"avoid is the class {avoid.__name__}; give an instance of it, {avoid.__name__}(…)")
    points = as_particles(avoid, "avoid")
    return Avoid(points.x, points.cond, points.weight)


def check_avoid(avoid: Avoid, guidance: MMDGuidance, cond: Any, shape: tuple[int, ...] | None, refs: Any) -> None:
    """Raise for samples to avoid that the guidance cannot use.

    Args:
      cond: the conditions of the samples.
      shape: of one sample; None: not known.
      refs: the references; None: there are none.
    Raises:
      TypeError: samples to avoid that are not floats.
      ValueError: see `check_points`; another shape; a kernel that the guidance's rule or placement cannot use, or whose
        conditions are missing; a radius where points are noisy; `MMDGuidance.paper` without references.
    """
    if guidance.published and refs is None:
        raise ValueError(
            "MMDGuidance.paper() moves each sample by the same share of its norm, however far it is from what it "
            "avoids; give refs too, or another guidance"
        )
    own = avoid.kernel_for(guidance)
    guidance.rule.check(own, f'avoid, under "{_name_of(guidance)}"')
    guidance.placement.check(own)
    if avoid.radius is not None and not guidance.placement.clean:
        raise ValueError(
            f'{guidance.where} compares noisy points, and avoid.radius is a distance of clean ones; use at="denoised"'
        )
    if avoid.nearest is not None and not own.has_mass:
        raise ValueError(f"avoid.nearest needs a kernel of the distance, and {own.called()} is none; leave it out")
    points = avoid.points
    if points is None:
        own.reach()  # raises for a bandwidth that is taken from references
        if own.uses_cond and cond is None:
            raise ValueError("the kernel compares conditions but cond is None; give cond, a row for each sample")
        return
    check_points("avoid", points, floats=True)
    if not hasattr(points.x, "shape"):
        raise TypeError(f"avoid is a {type(points.x).__name__}; give one array [m, ...], Particles or Avoid")
    if isinstance(points.x, HostReferences) and not guidance.placement.clean:
        raise ValueError(f'{guidance.where} adds noise to avoid.x; HostReferences need at="denoised" or "clean"')
    if shape is not None and np.shape(points.x) == tuple(shape):
        raise ValueError(f"avoid has the shape of one sample, {tuple(shape)}; give it a first axis, avoid[None]")
    if shape is not None and np.shape(points.x)[1:] != tuple(shape):
        raise ValueError(
            f"avoid has shape {np.shape(points.x)} but samples have shape {tuple(shape)}; "
            f"give [m, {', '.join(map(str, shape))}]"
        )
    if own.uses_cond:
        check_cond("avoid", points.cond, cond)


def _name_of(guidance: MMDGuidance) -> str:
    named = guidance.precondition or guidance.placement.rule
    return named if isinstance(named, str) else type(named).__name__


class Shield(Radial):
    """½ (r − d)₊²: the kernel of `Avoid(radius=r)`, 0 outside a ball of that radius.  arXiv 2410.06025.

    It is not positive definite in many dimensions, so it is not for MMD².
    """

    radius: Any

    def profile(self, d2):
        return 0.5 * jnp.maximum(self.radius - safe_sqrt(d2), 0.0) ** 2

    def weight(self, d2):
        return jnp.maximum(self.radius * reciprocal(safe_sqrt(d2)) - 1, 0.0)

    def reach(self):
        return 0.5 * self.radius  # where the weight is 1

    def length2(self, a):
        return jnp.ones(())  # the gradient is a length already


@dataclasses.dataclass(frozen=True)
class Negatives:
    """The particles of one device and what they avoid: what `Rule.away` is given.

    Args:
      sides: the particles, the samples to avoid in the place of references (None: each other), and the kernel.
      avoid: strength, `nearest` and the like.
      floor: w(h), the kernel's weight at its reach.
    """

    sides: Sides
    avoid: Avoid
    floor: Any

    def pull(self, precondition: str = "none") -> tuple[Float[Array, "n ..."], Float[Array, " n"]]:
        """Σ_j a_j ∂k(z_i, a_j)/∂z_i over the samples to avoid, and their kernel mass; as `Sides.pull`."""
        if self.sides.refs is None:
            return self.sides.push(precondition)
        if self.avoid.nearest is None or self._count_here() <= self.avoid.nearest:
            return self.sides.pull(precondition)
        return self._pull_of_nearest(precondition, self.avoid.nearest)

    def bounded(self) -> Float[Array, "n ..."]:
        """The bounded step, from the particles to the samples to avoid; the guidance goes the other way."""
        pulled, mass = self.pull("mass")
        if self.avoid.radius is not None:
            depth = jnp.maximum(self.avoid.radius - safe_sqrt(self._limit(1)), 0.0)
            length = safe_sqrt(jnp.sum(flat(pulled) ** 2, axis=1))
            return per_sample(depth * reciprocal(length), pulled) * pulled
        least = self.floor
        if self.avoid.nearest is not None:
            count = self.sides.shards.sum_over_refs((self.sides.refs.probabilities() > 0).sum()).astype(mass.dtype)
            pulled, mass = count * pulled, count * mass
        elif self.sides.refs is not None:
            least = jnp.maximum(self.sides.push("mass")[1], least)
        return -STEP * over_larger_mass(jnp.zeros_like(pulled), jnp.broadcast_to(least, mass.shape), pulled, mass)

    def _count_here(self) -> int:
        return sys.maxsize if self.sides.shards.refs else self.sides.refs.n

    def _pull_of_nearest(self, precondition, k):
        sides = self.sides
        limit = TIES * jax.lax.stop_gradient(self._limit(k))
        v = sides.shards.probabilities(sides.refs).astype(sides.weights.dtype)
        # the limits ride along as weights, as particles go where the samples to avoid lie
        z = replace(sides.rows, weight=limit)
        everyone = replace(sides.everyone, weight=sides.shards.everyone(limit))

        def by_refs(z):
            moving = replace(z, weight=None)

            def of_block(block):
                others = block.of(sides.refs)
                near = sides.fixed.distance2(moving, others) <= z.weight[:, None]
                coef = jnp.where(near, block.weights(v)[None], 0.0)
                return sides.fixed.gradient(moving, others, coef, precondition=precondition)

            return sum_over(of_block, sides.refs.n, block_beside(z.n, sides.refs.x))

        return sides.shards.pull(by_refs, z, everyone)

    def _limit(self, k: int) -> Float[Array, " n"]:
        """The squared distance of each particle to its k-th nearest sample to avoid, of a condition like its own."""
        sides = self.sides
        refs, m = sides.refs, sides.refs.n
        present = refs.probabilities() > 0

        def smallest(z):
            size = block_beside(z.n, refs.x)

            def add(least, block: Rows):
                others = block.of(refs)
                counts = (block.of(present) & block.fresh)[None]
                alike = sides.fixed.cond_gram(z, others)
                counts = counts if alike is None else counts & (alike > 0)
                d2 = jnp.where(counts, sides.fixed.distance2(z, others), jnp.inf)
                return -jax.lax.top_k(-jnp.concatenate([least, d2], axis=1), k)[0]

            least, count = jnp.full((z.n, k), jnp.inf, wide_dtype(z.x)), num_blocks(m, size)
            if count == 1:
                return add(least, rows(m, 0, size))
            return jax.lax.scan(lambda c, i: (add(c, rows(m, i, size)), None), least, jnp.arange(count))[0]

        found = sides.shards.found(smallest, sides.rows, sides.everyone)
        found = jnp.moveaxis(found, 0, 1).reshape(found.shape[1], -1)
        return -jax.lax.top_k(-found, k)[0][:, -1]


def weight_at_reach(kernel: Any, points: Particles) -> Array:
    """w at the kernel's reach, between two points of the first one's condition; at 0 without a reach."""
    kernel = kernel[1] if isinstance(kernel, tuple) else kernel
    origin = jnp.zeros((1, *points.x.shape[1:]), points.x.dtype)
    there = origin.at[(0,) * origin.ndim].set(jnp.asarray(kernel.reach(), origin.dtype))
    cond = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:1], points.cond)
    return kernel.pair_weights(Particles(origin, cond), Particles(there, cond))[0, 0]


def widened(kernel: Kernel, square: Any, level: Level, size: int) -> Kernel:
    """The kernel for x̂0 of a noise level: its reach h widened to √(h² + e²), e² = E|x_0 − x̂0|² as for Gaussian data.

    e² = S r/(S + r), r = D σ²/α², with S the mean squared distance between x̂0 and what is avoided.

    Args:
      square: S.
      size: D, how many numbers a sample has.
    """
    reach2, alpha2 = jnp.asarray(kernel.reach()) ** 2, jnp.asarray(level.alpha) ** 2
    noise2 = size * jnp.asarray(level.sigma) ** 2
    error2 = square * noise2 / jnp.maximum(alpha2 * square + noise2, jnp.finfo(square.dtype).tiny)
    wider = jnp.sqrt((reach2 + error2) / jnp.where(reach2 > 0, reach2, 1.0))
    return kernel.widened(wider)
