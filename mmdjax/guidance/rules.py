"""Rules: which way a particle moves, and how far, given the push of the others and the pull of the references.

A rule returns P_i ∂MMD²/∂z_i / u_i; the shift is −scale times it. `precondition="mass"` names one of these, and
`precondition=Mass()` is the same; the default, "field", is in `mmdjax.guidance.field`.

A rule of one's own is a subclass of `Rule` with a `direction(sides, plan)`; numbers among its fields may be swept and
differentiated. What it may ask is in `mmdjax.guidance.sides.Sides`.

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
    """What the guidance asks of a rule; a subclass writes `direction`.

    `needs` says what the kernel must have: "mass" (it is one of the distance), "length", or "" for nothing.
    """

    needs: ClassVar[str] = ""

    @property
    def looks(self) -> bool:
        """Whether the rule takes anything from the references once a run."""
        return type(self).from_refs is not Rule.from_refs

    def check(self, kernel: Kernel, name: str) -> None:
        """Raise ValueError where the kernel lacks what the rule needs; `name` is what the user called the rule."""
        if self.needs and not (kernel.has_length if self.needs == "length" else kernel.has_mass):
            raise ValueError(kernel.without(name))

    def from_refs(self, refs: Particles, distances: Callable) -> Any:
        """What the rule takes from clean references, once a run.

        Args:
          refs: some of them, at most 2,000; detached.
          distances: (function, y) -> function(y, y), [m, m], shared out over the devices of a mesh.
        """
        return None

    def prepare(self, sides: Sides, level: Level | None, seen: Any) -> Any:
        """The plan: what is worked out once a network call, of the particles as they come.

        Args:
          level: of the points that the network saw ("denoised") or that are moved; None if it is not known.
          seen: what `from_refs` returned; None among noisy references.
        """
        return None

    def direction(self, sides: Sides, plan: Any) -> Float[Array, "n ..."]:
        """P_i ∂MMD²/∂z_i / u_i for the particles of this device, at each inner step."""
        raise NotImplementedError(f"{type(self).__name__} has no direction(sides, plan); write it")


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


@pytree
class Length(Rule):
    """precondition="length": P = ℓ², the kernel's length squared, by component in a sum."""

    needs: ClassVar[str] = "length"

    def direction(self, sides, plan):
        return 2 * (sides.push("length")[0] - sides.pull("length")[0])


@pytree
class Mass(Rule):
    """precondition="mass": P is one over twice the larger of the kernel masses, from references and from particles.

    For a kernel of the distance the mean-shift step to the references less the one to the other particles: a
    majorise-minimise step, bounded, with no scale to tune.
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
