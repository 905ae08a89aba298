"""The published rule: what it moves, when it acts, and what it remembers.

References:
  MMD Guidance, arXiv 2601.08379.
"""

import functools
from typing import Any, ClassVar

from mmdjax.guidance.placements import Clean
from mmdjax.kernels import Polynomial
from mmdjax.tree import pytree


@pytree
class Published(Clean):
    """`Clean`, with the memory as the published code keeps it.

    Nothing moves until one sample is remembered; samples are remembered as they were before the last shift; and a full
    memory keeps only its last sample when a batch begins.
    """

    keeps_unshifted: ClassVar[bool] = True

    def begin(self, memory):
        """Only the last sample, once every slot is taken."""
        return memory.reset_when_full()

    def acts(self, memory):
        """Not before a sample is remembered; without a memory the batch itself is guided."""
        return 1.0 if memory is None else memory.weight.sum() > 0


def settings(alpha: Any) -> dict[str, Any]:
    """The fields of `MMDGuidance.paper(alpha)`."""
    return {
        "kernel": Polynomial(),
        "scale": alpha,
        "at": "clean",
        "estimator": "v",
        "inner_steps": 1,
        "precondition": "raw",
        "transform": _trust_ratio(),
        "published": True,
    }


@functools.cache
def _trust_ratio():
    # one object for all calls, or each would compile anew
    import optax

    return optax.scale_by_trust_ratio(eps=1e-5)
