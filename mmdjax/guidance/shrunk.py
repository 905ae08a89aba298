"""A rule for few references: "field" that moves particles only as far as the references' number supports.

A batch that matches few references exactly also matches their sampling error. If the references were drawn from what
the model makes, noise of the same level would turn them into points like x_t, and

    (x_t, x̂0)   of the particles,      (α y + σ ε, y)   of the references y, ε standard normal,

would have equal means of every function that is linear in the second entry, as x̂0 = E[x_0 | x_t]. So these pairs are
compared, with the kernel

    K = k(x_t, x_t') (1 + ⟨x̂0 − c, x̂0' − c⟩/s²),

k an IMQ whose bandwidth squared is α² s² + σ² D, c and s² the references' mean and squared spread, D the size of a
sample. Of each network call's whole shift this part is made:

    part = max(0, 1 − evidence · E/MMD²),   E = MMD²(biased) − MMD²(unbiased) of the references' own term,

E the expected squared distance, in K, between m references and what they were drawn from: James and Stein's estimate,
positive part. The largest part so far counts, as a guided batch no longer shows how far the model was from the
references. A small batch has an error of its own in MMD², larger than E: it follows the references.

References:
  James & Stein 1961 (shrinkage, the positive part). Muandet et al. 2016 (shrinkage of kernel mean embeddings).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax._core.numerics import product, reciprocal
from mmdjax._points.particles import Particles, fill_empty, flat
from mmdjax.guidance.field import Field
from mmdjax.kernels import IMQ, Polynomial, Product
from mmdjax.mmd import cross_term, self_term
from mmdjax.schedules import Level
from mmdjax.tree import check_number, is_concrete, pytree


@pytree
class Shrunk(Field):
    """precondition="shrunk": "field", less what could be chance.

    Args:
      evidence: multiplies the references' sampling error; more moves less, 0 is "field".
    Raises:
      TypeError, ValueError: an evidence that is not a number, or below 0.
    """

    evidence: Any = 1.0

    def __post_init__(self):
        check_number("Shrunk.evidence", self.evidence)
        if is_concrete(self.evidence) and not np.all(np.asarray(self.evidence) >= 0):
            raise ValueError(f"Shrunk.evidence is {self.evidence}; give at least 0; 1 is usual")

    def from_refs(self, refs, distances):
        """That of "field", the references themselves, and their noise, the same in all calls."""
        refs = fill_empty(refs)
        y = flat(refs.x)
        noise = jax.random.normal(jax.random.key(0), y.shape, y.dtype)
        return super().from_refs(refs, distances), Particles(y, weight=refs.weight), noise

    def prepare(self, sides, level, seen):
        """That of "field"."""
        return super().prepare(sides, level, None if seen is None else seen[0])

    def part(self, x, x0, level, seen, before):
        """The largest part so far."""
        _, refs, noise = seen
        p = refs.probabilities()
        distance, error = compared(flat(x), flat(x0), refs.x, p, noise, level)
        part = 1 - jnp.clip(self.evidence * error * reciprocal(distance), 0.0, 1.0)
        alone = jnp.sum(p**2) > 0.99  # of one reference nothing says how far it is from others
        return jnp.maximum(before, jnp.where(alone, 1.0, part))


def compared(
    x: Float[Array, "n d"],
    x0: Float[Array, "n d"],
    y: Float[Array, "m d"],
    p: Float[Array, " m"],
    noise: Float[Array, "m d"],
    level: Level,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """MMD² of K, biased, between particles and references y of weights p and with this noise; and E."""
    size = y.shape[1]
    centre = product(p, y)
    spread2 = product(p, jnp.sum((y - centre) ** 2, axis=1))
    unit = jnp.sqrt(size * reciprocal(spread2))  # Polynomial divides by the size
    bandwidth = jnp.sqrt(level.alpha**2 * spread2 + level.sigma**2 * size)
    kernel = Product(x=IMQ(bandwidth), cond=Polynomial(degree=1))
    batch = Particles(x, unit * (x0 - centre))
    refs = Particles(level.alpha * y + level.sigma * noise, unit * (y - centre), p)
    own = self_term(kernel, refs, "v")
    distance = self_term(kernel, batch, "v") - 2 * cross_term(kernel, batch, refs) + own
    return distance, own - self_term(kernel, refs, "u")
