"""Mean shift, its push weakened at low noise, averaged over neighbours: the default with enough references.

"field" differs from "mass" in four things. p_i and q_i are a particle's kernel masses of the references and of the
other particles.

1. With a product kernel the push is multiplied by the density of the particle's condition among the references, divided
   by that among the particles. So samples are compared at each condition, even if conditions have other shares among
   the references than among the samples.
2. The push is weakened by min(1, (p_i/q_i)^b), b = (2h)²/((2h)² + (σ/α)²), h the kernel's reach. Where the noise can no
   longer carry a particle from one mode to another, a mode with too many particles would push them to where there is no
   data.
3. Steps are averaged over neighbours in the batch, shift_i ← Σ_j w(z_i, z_j) shift_j / Σ_j w(z_i, z_j), so that the
   batch moves as a smooth field. What is peculiar to single references is noise of a small sample, and pulls particles
   apart from their neighbours; what belongs to the target pulls neighbours together. Details below h stay the model's.
4. Two kinds of particle are excluded from the average, because it would keep them with their neighbours: one with a
   surplus around it, where q_i exceeds p_i by more than a fraction of the spread of the references' weights there; and,
   where references are clean, a stray, which is farther from all of them than they are from each other.

References:
  Cheng 1995 (mean shift as majorise-minimise). Liu & Wang 2016 (a velocity smoothed by a kernel).
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmdjax._core.numerics import least_mass, product, reciprocal, safe_sqrt, unit_of
from mmdjax._points.distances import spread2
from mmdjax._points.particles import flat, per_sample, wide_dtype
from mmdjax.guidance.rules import Rule, over_larger_mass
from mmdjax.guidance.sides import Sides
from mmdjax.schedules import Level
from mmdjax.tree import pytree

LARGE, FAINT = 1e15, 1e-12  # kernel weights that count, in units of their mean: their squares are float32 numbers


@pytree
class Field(Rule):
    """precondition="field": mean shift; the push weakened at low noise; averaged over neighbours.

    Args:
      surplus: how soon a particle is excluded from the average where the batch outweighs the references; larger is
        sooner.
      far: the squared distance to the nearest reference beyond which a particle is a stray, as a multiple of the
        references' squared spread.
    """

    needs: ClassVar[str] = "mass"

    surplus: Any = 5.0
    far: Any = 0.7

    def from_refs(self, refs, distances):
        """`spread2` of the references."""
        return spread2(flat(refs.x), refs.probabilities(), distances)

    def prepare(self, sides, level, seen):
        """b, and the average over neighbours [n, all]."""
        return balance_at(sides.reach, level, wide_dtype(sides.rows.x)), self.average(sides, seen)

    def direction(self, sides, plan):
        """The averaged step."""
        balance, average = plan
        return sides.averaged(average, self.step(sides, balance))

    def step(self, sides: Sides, balance: Any) -> Float[Array, "n ..."]:
        """The mean-shift step before the average, its push weakened."""
        (pushed, mass_push), (pulled, mass_pull) = sides.push("mass"), sides.pull("mass")
        ratio = sides.condition_ratio(*sides.shares)
        if ratio is not None:
            pushed, mass_push = per_sample(ratio, pushed) * pushed, ratio * mass_push
        weaker = surplus_share(mass_pull, mass_push) ** balance
        pushed, mass_push = per_sample(weaker, pushed) * pushed, weaker * mass_push
        return over_larger_mass(pushed, mass_push, pulled, mass_pull)

    def average(self, sides: Sides, spread: Any) -> Float[Array, "n all"]:
        """Weights of the average [n, all]: w(z_i, z_j)/Σ_j w(z_i, z_j); row i of the identity for an excluded particle.

        Between the two the step is smooth. A weight that is infinite at distance 0 is replaced by the row's largest
        other weight.

        Args:
          spread: of the references, squared; None: no particle is a stray.
        """
        weight = jnp.maximum(sides.pair_weights(), 0.0)  # a product with Cosine may be negative
        eye = jnp.eye(*weight.shape, dtype=bool)
        others = jnp.where(eye, 0.0, weight)
        at_zero = jnp.diagonal(weight)
        own = jnp.maximum(jnp.where(jnp.isfinite(at_zero), at_zero, 0.0), jnp.max(others, axis=1))
        own = jnp.where(own > least_mass(own.dtype), own, 1.0)
        weight = jnp.where(eye, own[:, None], others) * unit_of(own)[:, None]
        averaged = self.in_balance(sides, others, nearest=spread is not None)
        if spread is not None:
            averaged *= self.in_reach(sides, spread)
        return jnp.where(eye, (1 - averaged)[:, None], 0.0) + (averaged / weight.sum(1))[:, None] * weight

    def in_balance(self, sides: Sides, others: Float[Array, "n all"], *, nearest: bool = False) -> Float[Array, " n"]:
        """1 where the particles have at most the kernel mass of the references, falling to 0 where they have more.

        1/(1 + t⁴), t = surplus (q − p)₊/√(Σ_j v_j w(z_i, y_j)² − p²), p and q the means of the weights w(z_i, ·) over
        the references and over the other particles, `others` those of the batch. t is cut: the power of a large number
        would have no derivative. Weights come in units of their mean within the batch; one above LARGE is cut, which
        leaves p above q. A particle whose weights are all FAINT beside the others' counts as balanced.
        """
        memory, n = sides.memory, sides.everyone.n
        past = jnp.zeros(0, others.dtype) if memory is None else memory.weight.astype(others.dtype)
        each = 1 / jnp.maximum(n - 1 + past.sum(), 1)
        unit = unit_of(sides.total(others.sum()) / (n * max(n - 1, 1)))
        q = others.sum(1)
        if memory is not None:
            q += product(jnp.maximum(sides.memory_weights(), 0.0), past)
        q *= each * unit
        own = jnp.where(jnp.eye(*others.shape, dtype=bool), 0.0, each)
        ratio = sides.condition_ratio(own, each * past)
        q = q if ratio is None else q * ratio

        def moments(w, _, v):
            w = jnp.clip(unit * w, 0.0, LARGE)
            return jnp.stack([product(w, v), product(w**2, v)], axis=1)

        p, p2 = sides.over_refs(moments, nearest=nearest).T
        mass = jax.lax.stop_gradient(jnp.maximum(p, q))
        scale = reciprocal(jnp.where(mass > FAINT, mass, 0.0))
        p, q, p2 = scale * p, scale * q, scale * (scale * p2)
        least = (1e-3 * jnp.maximum(p, q)) ** 2  # where all references weigh the same
        t = self.surplus * jnp.maximum(q - p, 0.0) * reciprocal(safe_sqrt(jnp.maximum(p2 - p**2, least)))
        return 1 / (1 + jnp.minimum(t, 16.0) ** 4)

    def in_reach(self, sides: Sides, spread: Any) -> Float[Array, " n"]:
        """1 near a reference, 0 far from all: 1/(1 + (d²/far s²)⁸), d the distance to the nearest, s² the spread."""
        far = jnp.where(jnp.isfinite(spread), sides.nearest2() / (self.far * spread), 0.0)
        return 1 / (1 + jnp.minimum(far, 16.0) ** 8)


def balance_at(reach: Any, level: Level | None, dtype: Any = float) -> Any:
    """b, which says how much the push is weakened at a noise level; 0 if the level is None or the reach is 0."""
    if level is None:
        return 0.0
    reach2, noise2 = (2 * level.alpha * reach) ** 2, jnp.asarray(level.sigma) ** 2
    total = reach2 + noise2
    return jnp.asarray(jnp.where(total > 0, reach2 / jnp.where(total > 0, total, 1.0), 0.0), dtype)


def surplus_share(mass_pull: Float[Array, " n"], mass_push: Float[Array, " n"]) -> Float[Array, " n"]:
    """min(1, mass_pull/mass_push), with mass_pull at least `least_mass`, so that powers of it have a derivative."""
    mass_pull = jnp.maximum(mass_pull, least_mass(mass_pull.dtype))
    surplus = mass_push > mass_pull
    units = unit_of(mass_pull), unit_of(jnp.where(surplus, mass_push, 1.0))
    quotient = (mass_pull * units[0]) / jnp.where(surplus, mass_push * units[1], 1.0)
    least = jnp.finfo(mass_pull.dtype).tiny  # at 0 a power has no slope
    share = jnp.maximum(jax.lax.stop_gradient(mass_pull) * units[1], least)
    return jnp.where(surplus, quotient * share, 1.0)
