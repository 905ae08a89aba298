"""Placements: where guidance moves particles, and which references it meets there.

    "denoised"   x̂0, against clean references
    "sample"     x_s after the step, against references (and memory) brought to level s by fresh noise
    "clean"      x_s after the step, against clean references: the published placement
    "diffused"   as "sample", the noise on the references integrated in closed form

`at="sample"` names one of these, and `at=AtSample()` is the same. A placement of one's own is a subclass of
`Placement`; numbers among its fields may be swept and differentiated.

References:
  MMD Guidance, arXiv 2601.08379.
"""

import math
from typing import Any, ClassVar, Literal, dataclass_transform

import jax
import jax.numpy as jnp

from mmdjax._points.particles import Particles
from mmdjax.kernels import IMQ, RBF, Kernel, NearestNeighbour, Neighbourhood
from mmdjax.memory import Memory
from mmdjax.schedules import Level, diffuse
from mmdjax.tree import Component, pytree, replace, static

RATE, CAP = 20.0, 0.575  # inner steps per unit of log σ²/α², and the most of it that one sampler step counts


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
class Placement(Component):
    """What the guidance asks of a placement; a subclass changes what differs.

    Class attributes:
      moves: "x0_hat", inside the sampler's step, or "x_s", after it.
      clean: whether particles are compared with the references as they are given, at every level.
      steps: inner steps a network call, unless `MMDGuidance(inner_steps=)` says another number.
      rule: the name of the default rule.
      keeps_unshifted: whether a memory is given x as it was before the last shift.
    """

    moves: ClassVar[Literal["x0_hat", "x_s"]] = "x_s"
    clean: ClassVar[bool] = True
    steps: ClassVar[int] = 1
    rule: ClassVar[str] = "mass"
    keeps_unshifted: ClassVar[bool] = False

    @property
    def settles(self) -> bool:
        """Whether the placement has a word on x_s too, for which the last x̂0 is kept."""
        return type(self).settle is not Placement.settle

    @property
    def inside(self) -> bool:
        """Whether all of it happens to x̂0, inside the network call, so that any solver is served."""
        return self.moves == "x0_hat" and not self.settles

    def default_kernel(self) -> Kernel:
        """The kernel of `MMDGuidance()`."""
        return IMQ(Neighbourhood())

    def check(self, kernel: Kernel) -> None:
        """Raise ValueError for a kernel that cannot serve."""

    def length(self, t: Level, s: Level) -> Any:
        """How many unit shifts a sampler step from t to s is worth, in at most `steps` equal parts; None: `steps`."""
        return None

    def meet(
        self, key: Any, kernel: Kernel, refs: Particles, memory: Particles | None, s: Level
    ) -> tuple[Any, Particles, Particles | None]:
        """What x_s is compared by and with: the kernel, or (among the batch, with the others); references; memory."""
        return kernel, refs, memory

    def settle(self, key: Any, x: Any, x0: Any, t: Level, s: Level) -> Any:
        """What becomes of the sampler's x_s, where x̂0 is moved: x0 is the last one that it was given."""
        return x

    def begin(self, memory: Memory) -> Memory:
        """The memory as a call finds it, before its first step."""
        return memory

    def acts(self, memory: Particles | None) -> Any:
        """What multiplies the scale: 1 or 0, by what is remembered."""
        return 1.0


@pytree
class Denoised(Placement):
    """at="denoised": moves x̂0 against clean references, at each network call; serves every solver."""

    moves: ClassVar[Literal["x0_hat", "x_s"]] = "x0_hat"
    steps: ClassVar[int] = 8
    rule: ClassVar[str] = "field"


@pytree
class AtSample(Placement):
    """at="sample": moves x_s after the step, against references brought to level s by fresh noise.

    A step is worth 20 × its decrease in log σ²/α² unit shifts, that decrease capped at .575.
    """

    clean: ClassVar[bool] = False
    steps: ClassVar[int] = math.ceil(RATE * CAP)

    def default_kernel(self):
        """2.5 times the median nearest-neighbour distance of the references."""
        return IMQ(NearestNeighbour(2.5))

    def length(self, t, s):
        """By the decrease in noise."""
        return RATE * jnp.minimum(jax.lax.stop_gradient(s.log_snr() - t.log_snr()), CAP)

    def meet(self, key, kernel, refs, memory, s):
        """Noisy references, noisy memory."""
        key_refs, key_memory = jax.random.split(key)
        refs = replace(refs, x=diffuse(key_refs, refs.x, s))
        if memory is not None:
            memory = replace(memory, x=diffuse(key_memory, memory.x, s))
        return kernel.at_level(s), refs, memory


@pytree
class Clean(Placement):
    """at="clean": moves x_s after the step, against clean references: the published placement."""


@pytree
class Diffused(AtSample):
    """at="diffused": as `AtSample`, the noise on references and memory integrated in closed form; for `RBF`."""

    def default_kernel(self):
        """At the references' median distance."""
        return RBF()

    def check(self, kernel):
        """There is a closed form for RBF, sums of them and products with one."""
        kernel.check_diffused()

    def meet(self, key, kernel, refs, memory, s):
        """References and memory at α times their place."""
        pair = kernel.diffused(s, math.prod(refs.x.shape[1:]))
        refs = replace(refs, x=s.alpha * refs.x)
        if memory is not None:
            memory = replace(memory, x=s.alpha * memory.x)
        return pair, refs, memory
