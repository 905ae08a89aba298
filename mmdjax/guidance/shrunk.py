"""A rule for few references: "field" that moves particles only as far as the references' number supports.

A batch that matches few references exactly also matches their sampling error. With v_i the step of "field" before its
average, p_i and q_i the kernel masses of particle i from references and from the other particles (its push weakened),

    step_id = v_id max(0, 1 − c_i se²_id/v_id²),    c_i = evidence · b · near_i · min(p_i, q_i)/max(p_i, q_i),
    se²_id  = [var_id(references) Σ_j (v_j w_ij)² + var_id(particles) Σ_j (u_j w_ij)²]/max(p_i, q_i)².

var_id is the variance of coordinate d around particle i, weighted by the kernel's weight w. Both v and c se² are
averaged over neighbours before they are compared. c is 1 where a particle sits among references and the noise is too
small to carry it elsewhere, and 0 where it still has to travel: b and near_i are those of "field".

References:
  James & Stein 1961 (shrinkage, the positive part). Kish 1965 (the effective number of weighted samples).
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax._core.numerics import product, reciprocal, unit_of
from mmdjax._points.particles import flat
from mmdjax.guidance.field import LARGE, Field, surplus_share
from mmdjax.guidance.sides import Sides
from mmdjax.tree import check_number, is_concrete, pytree


@pytree
class Shrunk(Field):
    """precondition="shrunk": "field", less what could be chance.

    Args:
      evidence: multiplies the sampling variance; more moves less, 0 is "field" but for rounding.
    Raises:
      TypeError, ValueError: an evidence that is not a number, or below 0.
    """

    reads_points: ClassVar[bool] = True

    evidence: Any = 1.0

    def __post_init__(self):
        check_number("Shrunk.evidence", self.evidence)
        if is_concrete(self.evidence) and not np.all(np.asarray(self.evidence) >= 0):
            raise ValueError(f"Shrunk.evidence is {self.evidence}; give at least 0; 1 is usual")

    def prepare(self, sides, level, seen):
        """b, the average over neighbours [n, all], and evidence · b · near [n]."""
        balance, average = super().prepare(sides, level, seen)
        near = 1.0 if seen is None else self.in_reach(sides, seen)
        return balance, average, jnp.broadcast_to(self.evidence * balance * near, sides.rows.n)

    def direction(self, sides, plan):
        """The shrunk step."""
        balance, average, chance = plan
        centre = jax.lax.stop_gradient(flat(sides.everyone.x).mean(0))  # a common offset costs no digits
        unit = unit_of(sides.total(_finite(sides.pair_weights()).sum()))

        def of_refs(weights, refs, v):
            return _moments(unit * weights, v, flat(refs.x) - centre)

        z = flat(sides.rows.x) - centre
        (p, pulled, of_pull), (q, pushed, of_push) = (
            _shift(moments, z) for moments in (sides.over_refs(of_refs), self.of_particles(sides, centre, unit))
        )
        chance = chance * jnp.minimum(p, q) * reciprocal(jnp.maximum(p, q))
        weaker = (surplus_share(p, q) ** balance)[:, None]
        per_mass = reciprocal(jnp.maximum(p, weaker[:, 0] * q))[:, None]
        step = (pulled - weaker * pushed) * per_mass
        variance = chance[:, None] * (of_pull + weaker**2 * of_push) * per_mass**2
        step, variance = (sides.averaged(average, each) for each in (step, variance))
        clear = step**2 > variance
        step = jnp.where(clear, step - variance / jnp.where(clear, step, 1.0), 0.0)
        return -step.reshape(sides.rows.x.shape)

    def of_particles(self, sides: Sides, centre: Array, unit: Any) -> Float[Array, "n moments"]:
        """`_moments` of the batch and the memory, compared at each condition as in "field"."""
        own, of_memory = sides.shares
        moments = _moments(unit * sides.pair_weights(), own, flat(sides.everyone.x) - centre)
        if sides.memory is not None:
            moments += _moments(unit * sides.memory_weights(), of_memory, flat(sides.memory.x) - centre)
        ratio = sides.condition_ratio(own, of_memory)
        if ratio is None:
            return moments
        return jnp.concatenate([moments[:, :-1] * ratio[:, None], moments[:, -1:] * ratio[:, None] ** 2], axis=1)


def _finite(weight):
    return jnp.where(jnp.isfinite(weight), weight, 0.0)  # one that is infinite at distance 0 does not count there


def _moments(weight: Array, share: Array, y: Float[Array, "m d"]) -> Float[Array, "n moments"]:
    """Σ_j s_ij y_j, Σ_j s_ij y_j², Σ_j s_ij, Σ_j s_ij², s = share · weight."""
    s = share * jnp.clip(_finite(weight), 0.0, LARGE)
    return jnp.concatenate([product(s, y), product(s, y**2), s.sum(1)[:, None], (s**2).sum(1)[:, None]], axis=1)


def _shift(moments: Array, z: Float[Array, "n d"]) -> tuple[Array, Array, Array]:
    """The mass, Σ_j s_ij (y_j − z_i), and its sampling variance by coordinate."""
    d = z.shape[1]
    first, second, mass, squares = moments[:, :d], moments[:, d:-2], moments[:, -2:-1], moments[:, -1:]
    per_mass = reciprocal(mass)
    variance = jnp.maximum(second * per_mass - (first * per_mass) ** 2, 0.0)
    return mass[:, 0], first - mass * z, variance * squares
