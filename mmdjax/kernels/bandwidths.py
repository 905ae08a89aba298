"""Bandwidths taken from the references: rules (refs: Particles) -> length.

Any callable of that form may be given as a bandwidth. Those here are detached and read at most 2,000 references.

References:
  Gretton et al. 2012, section 8 (the median heuristic).
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from mmdjax._core.modes import in_own_modes
from mmdjax._core.numerics import all_finite
from mmdjax._points.distances import nearest_distance, neighbour_distance, pairwise_median, subset_of
from mmdjax._points.mesh import distances_of
from mmdjax._points.particles import Particles, as_particles, check_points, flat, whole
from mmdjax.tree import is_concrete, pytree


@pytree
class Median:
    """factor × the median distance between two references."""

    factor: Any = 1.0

    def __call__(self, refs: Particles) -> Array:
        return self.factor * pairwise_median(*_some(refs))


@pytree
class NearestNeighbour:
    """factor × the median distance of a reference to its nearest neighbour, duplicates ignored."""

    factor: Any = 2.0

    def __call__(self, refs: Particles) -> Array:
        return self.factor * nearest_distance(*_some(refs))


@pytree
class Neighbourhood:
    """factor × .8 × the median distance of a reference to its √m-th nearest neighbour among m, duplicates ignored.

    In few dimensions that is several times the distance to the nearest neighbour: within it there are enough references
    that none is copied. In many dimensions, where all distances are alike, it is hardly more. It shrinks as m grows. It
    is at most factor × 3.5 × the median distance to the nearest neighbour, or modes of fewer than √m references would
    be blurred together.
    """

    factor: Any = 1.0

    def __call__(self, refs: Particles) -> Array:
        looked_at = _some(refs)
        return self.factor * jnp.minimum(0.8 * neighbour_distance(*looked_at), 3.5 * nearest_distance(*looked_at))


def _some(refs: Particles) -> tuple[Array, Array, Callable]:
    # the rows that are looked at, before they are cast: a cast of all of them would be a copy of the references
    points = whole(refs)
    looked_at = subset_of(Particles(points.x, weight=points.weight))
    return flat(looked_at.x), looked_at.probabilities(), distances_of(refs)


@in_own_modes
def median_bandwidth(refs: Any) -> Float[Array, ""]:
    """The median distance between two references: the usual width of an RBF.  Gretton et al. 2012, section 8.

    Detached. At most 2,000 references are read, spread evenly over the rows. Rows of weight 0 are left out.

    Args:
      refs: Particles, or an array [m, ...] of at least two samples.
    Raises:
      ValueError: fewer than two references; references that are not finite; a median distance that is 0 or overflows
        (NaN inside `jit`).

    Example:
      >>> float(median_bandwidth(jnp.array([[0.0], [1.0], [3.0]])))
      2.0
    """
    refs = as_particles(refs)
    check_points("refs", refs)
    bandwidth = Median()(refs)
    if is_concrete(bandwidth) and not all_finite(bandwidth):
        raise ValueError("the references' median distance is 0, or overflows; give references that differ")
    return bandwidth
