"""The direction in which MMD² to the references falls, for each generated particle.

For particles z_i of weight u_i (batch and memory together) and references y_j of weight v_j,

    ∂MMD²/∂z_i / u_i = 2 [Σ_{j≠i} u_j ∂k(z_i, z_j)/∂z_i / (1 − Σu²) − Σ_j v_j ∂k(z_i, y_j)/∂z_i]        ("u")

and a precondition P_i. "mass" is one over twice the larger of the particle's kernel masses, from references and from
particles: for a kernel of the distance the mean-shift step to the references less the one to the other particles, a
majorise-minimise step, bounded, with no scale to tune. With p_i and q_i the masses from references and from particles,
"field" changes four things. With a product kernel the push is multiplied by the density of the particle's condition
among the references over that among the particles: x is compared at each condition, whatever the conditions' shares on
either side, which guidance cannot change. The push is weakened by

    min(1, (p_i/q_i)^b),   b = (2h)²/((2h)² + (σ/α)²),   h the kernel's reach:

where the noise can no longer carry a particle from one mode to another, a mode with too many would only push the
surplus out to where there is no data. And the steps are averaged over neighbours in the batch,

    shift_i ← Σ_j w(z_i, z_j) shift_j / Σ_j w(z_i, z_j),

so that the batch moves as a smooth field: what sets single references apart is noise of a small sample, and it moves
particles apart from their neighbours; what the target is, moves them together. Details below h stay the model's. Two
kinds of particle move by their own step, as an average would leave them with the neighbours that they came with: one
with a surplus around it, q_i above p_i by more than a fraction of the spread of the references' weights there; and,
where references are clean, a stray, farther from every one of them than these are from each other.

References:
  Gretton et al. 2012, eq. 3 and 5. Cheng 1995 (mean shift as majorise-minimise). Liu & Wang 2016 (a
  velocity smoothed by a kernel).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmdjax.blocks import block_beside, least_over, sum_over
from mmdjax.kernels import RBF, Kernel, Product, Radial, Sum
from mmdjax.mmd import pair_norm
from mmdjax.numerics import least_mass, product, reciprocal, safe_sqrt, unit_of
from mmdjax.particles import Particles, per_sample, wide_dtype
from mmdjax.placement import WHOLE, Shards
from mmdjax.schedules import Level
from mmdjax.tree import pytree, static

SURPLUS = 5  # how soon a particle leaves the average where the batch outweighs the references
FAR = 0.7  # how far from them, squared, in their spread
LARGE, FAINT = 1e15, 1e-12  # kernel weights that count, in units of their mean: their squares are float32 numbers


def shift_direction(
    kernel: Kernel | tuple[Kernel, Kernel],
    z: Particles,
    refs: Particles,
    memory: Particles | None,
    *,
    estimator: str = "u",
    precondition: str = "mass",
    balance: Any = 0.0,
    everyone: Particles | None = None,
    shards: Shards = WHOLE,
) -> Float[Array, "n ..."]:
    """P_i ∂MMD²/∂z_i / u_i for a batch of equal weights; the particles of `memory` count on its side but do not move.

    Args:
      kernel: for all pairs, or (among the batch, between batch and fixed points).
      z: the batch, n particles.
      refs: m references.
      memory: weights 0 or 1, or None.
      estimator: "u" or "v".
      precondition: as in `MMDGuidance`; "field" before the average over neighbours, which is `neighbours`.
      balance: b, for "field".
      everyone: the batch on all devices, as `shards.everyone` has it; None: z is all of it.
      shards: over which devices batch and references are split.
    Returns:
      [n, ...], like z.x.
    """
    among, fixed = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    everyone = z if everyone is None else everyone
    weights = jnp.ones(everyone.n, wide_dtype(z.x))
    if memory is not None:
        weights = jnp.concatenate([weights, memory.weight.astype(weights.dtype)])
    u = weights / weights.sum()
    coef = u / pair_norm(u, estimator)
    own = jnp.broadcast_to(coef[: everyone.n], (z.n, everyone.n))
    if estimator == "u":
        own = jnp.where(jnp.eye(*own.shape, dtype=bool), 0.0, own)
    rule = {"raw": "none", "field": "mass"}.get(precondition, precondition)

    def gradient(k, points, coef, rows=z, same=False):
        return k.gradient(rows, points, coef, same=same, precondition=rule)

    pushed, mass_push = gradient(among, everyone, own, same=True)
    p = shards.probabilities(refs).astype(u.dtype)
    pulled, mass_pull = shards.pull(lambda rows: gradient(fixed, refs, p, rows), z, everyone)
    if memory is not None:
        by_memory, mass_memory = gradient(fixed, memory, coef[everyone.n :])
        pushed, mass_push = pushed + by_memory, mass_push + mass_memory
    if precondition == "field":
        if isinstance(fixed, Product):
            ratio = _condition_ratio(fixed, z, everyone, refs, memory, own, coef[everyone.n :], shards)
            pushed, mass_push = per_sample(ratio, pushed) * pushed, ratio * mass_push
        weaker = _surplus_share(mass_pull, mass_push) ** balance
        pushed, mass_push = per_sample(weaker, pushed) * pushed, weaker * mass_push
    match precondition:
        case "mass" | "field":
            mass = jnp.maximum(mass_pull, mass_push)
            unit = unit_of(mass)
            step = per_sample(unit, pushed) * (pushed - pulled)
            return step / per_sample(jnp.where(unit > 0, mass * unit, 1.0), step)
        case "raw":
            return per_sample(2 * u[: z.n], pushed) * (pushed - pulled)
    return 2 * (pushed - pulled)


def _surplus_share(mass_pull: Float[Array, " n"], mass_push: Float[Array, " n"]) -> Float[Array, " n"]:
    """min(1, mass_pull/mass_push), a mass_pull that vanishes counting as the least one, so that powers have a slope."""
    mass_pull = jnp.maximum(mass_pull, least_mass(mass_pull.dtype))
    surplus = mass_push > mass_pull
    units = unit_of(mass_pull), unit_of(jnp.where(surplus, mass_push, 1.0))
    quotient = (mass_pull * units[0]) / jnp.where(surplus, mass_push * units[1], 1.0)
    least = jnp.finfo(mass_pull.dtype).tiny  # at 0 a power has no slope
    share = jnp.maximum(jax.lax.stop_gradient(mass_pull) * units[1], least)
    return jnp.where(surplus, quotient * share, 1.0)


def _condition_ratio(
    kernel: Product,
    z: Particles,
    everyone: Particles,
    refs: Particles,
    memory: Particles | None,
    own: Float[Array, "n all"],
    of_memory: Float[Array, " k"],
    shards: Shards,
) -> Float[Array, " n"]:
    """Density of each particle's condition among the references, over that among the other particles; detached.

    At most twice the ratio with the particle itself among the particles, which is what it is where two share a
    condition: a particle alone with its condition would be pushed by those of others as if they had its own.
    """
    p = shards.probabilities(refs).astype(own.dtype)
    among_refs = shards.pull(lambda rows: product(jnp.abs(kernel.cond_gram(rows, refs)), p), z, everyone)
    alike = jnp.abs(kernel.cond_gram(z, everyone))
    others, everybody = jnp.sum(own * alike, axis=1), alike.sum(1)
    count = jnp.asarray(everyone.n, own.dtype)
    if memory is not None:
        of_past = jnp.abs(kernel.cond_gram(z, memory))
        others += product(of_past, of_memory)
        everybody += product(of_past, memory.weight.astype(own.dtype))
        count += memory.weight.sum()
    ratio = jnp.minimum(among_refs * reciprocal(others), 2 * among_refs * count * reciprocal(everybody))
    return jax.lax.stop_gradient(ratio)


def balance_at(kernel: Kernel, level: Level | None) -> Any:
    """b: how far the push is weakened at a noise level; 0 without one, or for a kernel without a reach."""
    if level is None:
        return 0.0
    reach2, noise2 = (2 * level.alpha * kernel.reach()) ** 2, jnp.asarray(level.sigma) ** 2
    total = reach2 + noise2
    return jnp.where(total > 0, reach2 / jnp.where(total > 0, total, 1.0), 0.0)


def neighbours(
    kernel: Kernel | tuple[Kernel, Kernel],
    z: Particles,
    refs: Particles,
    memory: Particles | None = None,
    *,
    spread2: Any = jnp.inf,
    everyone: Particles | None = None,
    shards: Shards = WHOLE,
) -> Float[Array, "n all"]:
    """The average over neighbours: w(z_i, z_j)/Σ_j w(z_i, z_j), for a particle that is no surplus and no stray.

    Row i of the identity for one that is, with a smooth step between. A weight that is infinite at distance 0 counts
    there as the row's largest other. `spread2`: of the references, squared. The rest: see `shift_direction`.
    """
    among, fixed = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    everyone = z if everyone is None else everyone
    weight = jnp.maximum(among.pair_weights(z, everyone, same=True), 0.0)  # a product with Cosine may be negative
    eye = jnp.eye(*weight.shape, dtype=bool)
    others = jnp.where(eye, 0.0, weight)
    at_zero = jnp.diagonal(weight)
    own = jnp.maximum(jnp.where(jnp.isfinite(at_zero), at_zero, 0.0), jnp.max(others, axis=1))
    own = jnp.where(own > least_mass(own.dtype), own, 1.0)
    weight = jnp.where(eye, own[:, None], others) * unit_of(own)[:, None]

    averaged = _in_balance(fixed, z, refs, memory, others, everyone, shards)
    averaged *= _in_reach(among, z, refs, spread2, everyone, shards)
    return jnp.where(eye, (1 - averaged)[:, None], 0.0) + (averaged / weight.sum(1))[:, None] * weight


def _in_balance(
    kernel: Kernel,
    z: Particles,
    refs: Particles,
    memory: Particles | None,
    others: Float[Array, "n all"],
    everyone: Particles,
    shards: Shards,
) -> Float[Array, " n"]:
    """1 where the particles have at most the kernel mass of the references, falling to 0 where they have more.

    1/(1 + t⁴), t = SURPLUS (q − p)₊/√(Σ_j v_j w(z_i, y_j)² − p²), p and q the means of the weights w(z_i, ·) over the
    references and over the other particles, `others` those of the batch. t is cut: the power of a large number would
    have no derivative. Weights come in units of their mean within the batch; one above LARGE is cut, which leaves p
    above q. A particle whose weights are all FAINT beside the others' counts as balanced.
    """
    past = jnp.zeros(0, others.dtype) if memory is None else memory.weight.astype(others.dtype)
    each = 1 / jnp.maximum(everyone.n - 1 + past.sum(), 1)
    unit = unit_of(shards.total(others.sum()) / (everyone.n * max(everyone.n - 1, 1)))
    q = others.sum(1)
    if memory is not None:
        q += product(jnp.maximum(kernel.pair_weights(z, memory), 0.0), past)
    q *= each * unit
    if isinstance(kernel, Product):
        own = jnp.where(jnp.eye(*others.shape, dtype=bool), 0.0, each)
        q *= _condition_ratio(kernel, z, everyone, refs, memory, own, each * past, shards)
    v = shards.probabilities(refs).astype(others.dtype)

    def moments(points):
        def in_block(rows):
            w = jnp.clip(unit * kernel.pair_weights(points, rows.of(refs)), 0.0, LARGE)
            return jnp.stack([product(w, rows.weights(v)), product(w**2, rows.weights(v))], axis=1)

        return sum_over(in_block, refs.n, block_beside(points.n, refs.x))

    p, p2 = shards.pull(moments, z, everyone).T
    mass = jax.lax.stop_gradient(jnp.maximum(p, q))
    scale = reciprocal(jnp.where(mass > FAINT, mass, 0.0))
    p, q, p2 = scale * p, scale * q, scale * (scale * p2)
    least = (1e-3 * jnp.maximum(p, q)) ** 2  # where all references weigh the same
    t = SURPLUS * jnp.maximum(q - p, 0.0) * reciprocal(safe_sqrt(jnp.maximum(p2 - p**2, least)))
    return 1 / (1 + jnp.minimum(t, 16.0) ** 4)


def _in_reach(
    kernel: Kernel, z: Particles, refs: Particles, spread2: Any, everyone: Particles, shards: Shards
) -> Float[Array, " n"]:
    """1 near a reference, 0 far from all: 1/(1 + (d²/FAR s²)⁸), d to the nearest one and s² = `spread2`; cut too."""
    present = refs.probabilities() > 0

    def nearest2(particles):
        def in_block(rows):
            d2 = kernel.distance2(particles, rows.of(refs))
            return jnp.min(jnp.where(rows.of(present), d2, jnp.inf), axis=1)

        return least_over(in_block, refs.n, block_beside(particles.n, refs.x))

    far = jnp.where(jnp.isfinite(spread2), shards.least(nearest2, z, everyone) / (FAR * spread2), 0.0)
    return 1 / (1 + jnp.minimum(far, 16.0) ** 8)


@pytree
class DiffusedRBF(Radial):
    """E_ε exp(−|x − y − σε|²/2h²) = (h²/(h² + σ²))^{D/2} exp(−|x − y|²/2(h² + σ²)), ε standard normal of size D."""

    bandwidth: Any
    sigma: Any
    size: int = static()

    def profile(self, d2):
        """k; the power is taken in the exponent, where it does not underflow alone."""
        h2, s2 = self.bandwidth**2, self.sigma**2
        return jnp.exp(-d2 / (2 * (h2 + s2)) - 0.5 * self.size * jnp.log1p(s2 / h2))

    def weight(self, d2):
        """w = k/(h² + σ²)."""
        return self.profile(d2) / (self.bandwidth**2 + self.sigma**2)

    def length2(self, a):
        """h², as of the RBF that it comes from."""
        return jnp.asarray(self.bandwidth) ** 2


def diffused_pair(kernel: Kernel, level: Level | None, size: int = 1) -> Any:
    """The kernel among particles at a level, and that between them and α · clean points; level None only checks.

    Raises:
      ValueError: not an RBF, nor a Sum of them or a Product with one.
    """
    match kernel:
        case RBF(bandwidth=h) if type(kernel) is RBF:  # a subclass may have another value
            if level is None:
                return None
            among: Any = kernel.at_level(level)
            hs = among.bandwidth if isinstance(h, tuple) else (among.bandwidth,)
            parts = [DiffusedRBF(width, level.sigma, size) for width in hs]
            return among, parts[0] if len(parts) == 1 else Sum(*parts, weights=(1.0 / len(parts),) * len(parts))
        case Product(x=x, cond=cond):
            pair = diffused_pair(x, level, size)
            return None if pair is None else tuple(Product(k, cond) for k in pair)
        case Sum(kernels=kernels, weights=weights):
            pairs = [diffused_pair(k, level, size) for k in kernels]
            return None if level is None else tuple(Sum(*ks, weights=weights) for ks in zip(*pairs, strict=True))
    raise ValueError(
        f'at="diffused" integrates the noise in closed form, which exists for RBF only, not {type(kernel).__name__}; '
        'use RBF, or at="sample"'
    )
