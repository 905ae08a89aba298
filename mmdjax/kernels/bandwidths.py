"""Where a kernel's bandwidth comes from when it is left to the references: rules (refs: Particles) -> length.

Any callable of that form serves as a bandwidth. These are detached, and read at most 2,000 references.

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
    """factor × the median distance of a reference to its nearest other one, duplicates ignored."""

    factor: Any = 2.0

    def __call__(self, refs: Particles) -> Array:
        return self.factor * nearest_distance(*_some(refs))


@pytree
class Neighbourhood:
    """factor × .8 × the median distance of a reference to its √m-th nearest other one of m, duplicates ignored.

    In few dimensions that is a multiple of the nearest one's distance, so that a neighbourhood holds enough references
    to be no copy of one; in many, where all distances are alike, hardly more than it. It shrinks as m grows. At most
    factor × 3.5 × the median distance to the nearest one: modes of fewer than √m references would be blurred together.
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

    Detached; on at most 2,000 references spread evenly over the rows. Zero-weight rows are left out.

    Args:
      refs: Particles, or an array [m, ...] of at least two samples.
    Raises:
      ValueError: fewer than two references, or they cannot be used; their median distance is 0, or overflows. Inside
        `jit`, where that is not seen, it is NaN.

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
