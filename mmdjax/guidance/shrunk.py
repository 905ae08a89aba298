"""The default rule: "field" that moves particles only as far as the references' number supports.

A batch that matches few references exactly also matches their sampling error. If the references were drawn from what
the model makes, noise of the same level would turn them into points like x_t, and

    (x_t, x̂0)   of the particles,      (α y + σ ε, y)   of the references y, ε standard normal,

would have equal means of every function that is linear in the second entry, as x̂0 = E[x_0 | x_t]. So these pairs are
compared, with the kernel

    K = k(x_t, x_t') (1 + ⟨x̂0 − c, x̂0' − c⟩/s²),

k an IMQ whose bandwidth squared is α² s²/4 + σ² D, c and s² the references' mean and squared spread, D the size of a
sample. How much of the distance chance explains is

    C = E/MMD²,      E = MMD²(biased) − MMD²(unbiased) of the references' own term,

E the expected squared distance, in K, between m references and what they were drawn from. James and Stein's estimate,
positive part, moves a batch until the share C of the distance is left. Here, with c the least C of all calls so far, it
is c√c, which is less, so that a clear difference is followed nearly whole. A batch that was guided before has only
√(c/C) of the distance left. So of a call's whole shift this part is made:

    part = max(0, 1 − c√c/√(c/C)) = max(0, 1 − c√C).

The more references, the less harm their error does. E counts in full up to half of `enough` references, less and less
from there, and not at all from `enough` on. A batch of few samples has an error of its own in MMD², which counts as
a difference: with fewer than about three samples for each reference most of each shift is made.

References:
  James & Stein 1961 (shrinkage, the positive part). Muandet et al. 2016 (shrinkage of kernel mean embeddings).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax._core.numerics import product, reciprocal, safe_sqrt
from mmdjax._points.particles import Particles, effective_number, fill_empty, flat
from mmdjax.guidance.field import Field
from mmdjax.kernels import IMQ, Polynomial, Product
from mmdjax.mmd import cross_term, self_term
from mmdjax.schedules import Level
from mmdjax.tree import check_number, is_concrete, pytree, static


@pytree
class Shrunk(Field):
    """precondition="shrunk": "field", less what could be chance.

    Args:
      evidence: multiplies the references' sampling error; more moves less, 0 is "field".
      enough: the number of references from which their error no longer counts, an integer.
    Raises:
      TypeError, ValueError: an evidence that is not a number, or below 0; an `enough` that is no integer of at least 0.
    """

    evidence: Any = 1.0
    enough: int = static(default=100)

    def __post_init__(self):
        check_number("Shrunk.evidence", self.evidence)
        if is_concrete(self.evidence) and not np.all(np.asarray(self.evidence) >= 0):
            raise ValueError(f"Shrunk.evidence is {self.evidence}; give at least 0; 1 is usual")
        if not isinstance(self.enough, int):
            raise TypeError(f"Shrunk.enough is {self.enough!r}; give an integer")
        if self.enough < 0:
            raise ValueError(f"Shrunk.enough is {self.enough}; give at least 0; 100 is usual")

    def doubts(self, refs):
        """Unless there are enough."""
        return refs.n < self.enough or refs.weight is not None

    def from_refs(self, refs, distances):
        """That of "field"; and unless there are enough the references themselves, and noise, the same in all calls."""
        spread, refs = super().from_refs(refs, distances), fill_empty(refs)
        if not self.doubts(refs):
            return spread, None, None
        y = flat(refs.x)
        return spread, Particles(y, weight=refs.weight), jax.random.normal(jax.random.key(0), y.shape, y.dtype)

    def prepare(self, sides, level, seen):
        """That of "field"."""
        return super().prepare(sides, level, None if seen is None else seen[0])

    def part(self, x, x0, level, seen, count, before):
        """The part, and 1 − c."""
        _, refs, noise = seen
        if refs is None:  # there are enough
            return jnp.ones_like(before), before
        p = refs.probabilities()
        distance, error = compared(flat(x), flat(x0), refs.x, p, noise, level)
        looked_at = effective_number(refs)  # of large samples not all are
        distance, error = distance - error * (1 - looked_at / count), error * looked_at / count
        error *= self.evidence * jnp.clip(2 - 2 * count / max(self.enough, 1), 0.0, 1.0)
        chance = error * reciprocal(distance)
        shown = jnp.maximum(before, 1 - jnp.minimum(chance, 1.0))
        part = jnp.maximum(1 - (1 - shown) * safe_sqrt(chance), 0.0)
        alone = looked_at < 1.01  # of one reference nothing says how far it is from others
        return jnp.where(alone, 1.0, part), jnp.where(alone, before, shown)


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
    bandwidth = jnp.sqrt(level.alpha**2 * spread2 / 4 + level.sigma**2 * size)
    kernel = Product(x=IMQ(bandwidth), cond=Polynomial(degree=1))
    batch = Particles(x, unit * (x0 - centre))
    refs = Particles(level.alpha * y + level.sigma * noise, unit * (y - centre), p)
    own = self_term(kernel, refs, "v")
    distance = self_term(kernel, batch, "v") - 2 * cross_term(kernel, batch, refs) + own
    return distance, own - self_term(kernel, refs, "u")
