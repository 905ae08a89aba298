"""Rules: which way a particle moves, and how far, given the push of the others and the pull of the references.

A rule returns P_i ∂MMD²/∂z_i / u_i; the shift is −scale times it. `precondition="mass"` names one of these, and
`precondition=Mass()` is the same. The default, "shrunk", is in `mmdjax.guidance.shrunk`.

Your own rule is a subclass of `Rule` with a `direction(sides, plan)`; the numbers in its fields may be swept and
differentiated, where they are not of its `part`. `mmdjax.guidance.sides.Sides` lists what it can use.

References:
  Gretton et al. 2012, eq. 3 and 5. Cheng 1995 (mean shift as majorise-minimise).
"""

from collections.abc import Callable
from typing import Any, ClassVar, dataclass_transform

import jax.numpy as jnp
from jaxtyping import Array, Float

from mmdjax._core.numerics import unit_of
from mmdjax._points.particles import Particles, per_sample
from mmdjax.guidance.sides import Sides
from mmdjax.kernels import Kernel
from mmdjax.schedules import Level
from mmdjax.tree import Component, pytree, static


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
class Rule(Component):
    """Which way a particle moves, and how far: base class for `MMDGuidance(precondition=...)`.

    A subclass writes `direction`. For what need not be computed at each inner step it overrides `prepare` (once for
    each network call) or `from_refs` (once for all calls).

    Class attributes:
      needs: what the kernel must have: "mass" (it is a kernel of the distance), "length" (it has a `length2`), or "".
      reads_points: True: `direction` reads `sides.rows.x` as points, never as coefficients of known points. This may be
        slower in many dimensions.

    Example:
      >>> class Half(Rule):  # P = 1/2
      ...     def direction(self, sides, plan):
      ...         return sides.push()[0] - sides.pull()[0]
      >>> from mmdjax import MMDGuidance
      >>> MMDGuidance(precondition=Half(), scale=2.0).rule
      Half()
    """

    needs: ClassVar[str] = ""
    reads_points: ClassVar[bool] = False

    @property
    def looks(self) -> bool:
        """Whether the subclass overrides `from_refs`."""
        return type(self).from_refs is not Rule.from_refs

    @property
    def weighs(self) -> bool:
        """Whether the subclass overrides `part`."""
        return type(self).part is not Rule.part

    def check(self, kernel: Kernel, name: str) -> None:
        """Raise ValueError if the kernel lacks what the rule needs; `name` is the rule's name in the message."""
        if self.needs and not (kernel.has_length if self.needs == "length" else kernel.has_mass):
            raise ValueError(kernel.without(name))

    def from_refs(self, refs: Particles, distances: Callable) -> Any:
        """Computed once from clean references, and given to `prepare` as `seen`.

        Args:
          refs: at most 2,000 of the references; detached.
          distances: (function, y) -> function(y, y), [m, m], computed on all devices of a mesh together.
        """
        return None

    def prepare(self, sides: Sides, level: Level | None, seen: Any) -> Any:
        """Computed once for each network call, from the particles before they move, and given to `direction` as `plan`.

        Args:
          sides: as in `direction`.
          level: the noise level of the network's input (where x̂0 is moved) or of x_s; None if it is not known.
          seen: the result of `from_refs`; None if the references are noisy.
        """
        return None

    def doubts(self, refs: Particles) -> bool:
        """Whether only a part of each shift may be made with these references; asked where the subclass has `part`."""
        return True

    def part(
        self, x: Float[Array, "n ..."], x0: Float[Array, "n ..."], level: Level, seen: Any, count: Any, before: Any
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """How much of a network call's whole shift is made, from 0 to 1, and a number for the next call.

        Only for placements that move x̂0 to clean references, where no samples are avoided and the kernel compares no
        conditions. Detached: for gradients through sampling the part is a constant.

        Args:
          x, x0: the network's input and its estimate x̂0, of the whole batch.
          level: of the input.
          seen: the result of `from_refs`.
          count: the effective number of all references, (Σ w)²/Σ w² of their weights.
          before: the number of the call before; 0 at the first, and at each call of what keeps no state
            (`guide_denoiser`, adaptive solvers).
        """
        raise NotImplementedError(f"{type(self).__name__} has no part(x, x0, level, seen, count, before); write it")

    def direction(self, sides: Sides, plan: Any) -> Float[Array, "n ..."]:
        """P_i ∂MMD²/∂z_i / u_i at each inner step, shaped like `sides.rows.x` [n, ...]; the shift is −scale times it.

        Args:
          sides: the particles of this device, and what they are compared with.
          plan: the result of `prepare`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no direction(sides, plan); write it")

    def away(self, negatives: Any) -> Float[Array, "n ..."]:
        """What `Avoid` of strength 1 adds to the direction; see `mmdjax.guidance.avoid`.

        Args:
          negatives: the particles and what they avoid; `negatives.pull` is like `Sides.pull`, and
            `negatives.bounded` a step that is 0 far from all.
        """
        if self.needs != "mass":
            return 2 * negatives.pull(self.needs or "none")[0]
        return negatives.bounded()


@pytree
class Plain(Rule):
    """precondition="none": P = 1, the gradient over the particle's weight."""

    def direction(self, sides, plan):
        return 2 * (sides.push()[0] - sides.pull()[0])


@pytree
class Raw(Rule):
    """precondition="raw": P_i = u_i, the gradient itself; the published rule has it."""

    def direction(self, sides, plan):
        pushed = sides.push()[0]
        return per_sample(2 * sides.weights[: sides.rows.n], pushed) * (pushed - sides.pull()[0])

    def away(self, negatives):
        pulled, _ = negatives.pull()
        return per_sample(2 * negatives.sides.weights[: negatives.sides.rows.n], pulled) * pulled


@pytree
class Length(Rule):
    """precondition="length": P = ℓ², the kernel's length squared; in a sum, that of each term."""

    needs: ClassVar[str] = "length"

    def direction(self, sides, plan):
        return 2 * (sides.push("length")[0] - sides.pull("length")[0])


@pytree
class Mass(Rule):
    """precondition="mass": P is one over twice the larger of two kernel masses: of the references, of the particles.

    This is the mean-shift step to the references minus the one to the other particles. It is a majorise-minimise step,
    bounded, with no scale to tune.
    """

    needs: ClassVar[str] = "mass"

    def direction(self, sides, plan):
        return over_larger_mass(*sides.push("mass"), *sides.pull("mass"))


def over_larger_mass(pushed: Array, mass_push: Array, pulled: Array, mass_pull: Array) -> Float[Array, "n ..."]:
    """(push − pull)/max(mass of the push, mass of the pull); 0 where both have vanished."""
    mass = jnp.maximum(mass_pull, mass_push)
    unit = unit_of(mass)
    step = per_sample(unit, pushed) * (pushed - pulled)
    return step / per_sample(jnp.where(unit > 0, mass * unit, 1.0), step)
