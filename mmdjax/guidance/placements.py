"""Placements: where guidance moves particles, and which references it meets there.

    "denoised"   x̂0, against clean references
    "sample"     x_s after the step, against references (and memory) brought to level s by fresh noise
    "clean"      x_s after the step, against clean references: the published placement
    "diffused"   as "sample", but averaged over the references' noise in closed form

`at="sample"` names one of these, and `at=AtSample()` is the same. Your own placement is a subclass of `Placement`; the
numbers in its fields may be swept and differentiated.

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
    """Where particles are moved, and what they are compared with there: base class for `MMDGuidance(at=...)`.

    A subclass sets class attributes and overrides methods; each has a default. x [n, *shape] is a batch, t the level
    before a sampler's step and s the level after it.

    Class attributes:
      moves: "x0_hat": the estimate of the clean sample, at each network call. "x_s": the sample after the step.
      clean: True: particles are compared with the references as given. False: `meet` changes them at each level.
      steps: inner steps for each network call, unless `MMDGuidance(inner_steps=...)` is given.
      rule: the default of `MMDGuidance(precondition=...)`, by name.
      keeps_unshifted: True: a memory is given x as it was before the last shift.

    Example:
      >>> class Late(Placement):  # clean references, x_s moved twice as often as "clean" does
      ...     steps = 2
      >>> from mmdjax import MMDGuidance
      >>> MMDGuidance(at=Late()).steps
      2
    """

    moves: ClassVar[Literal["x0_hat", "x_s"]] = "x_s"
    clean: ClassVar[bool] = True
    steps: ClassVar[int] = 1
    rule: ClassVar[str] = "mass"
    keeps_unshifted: ClassVar[bool] = False

    @property
    def settles(self) -> bool:
        """Whether the subclass overrides `settle`; then the last x̂0 is kept for it."""
        return type(self).settle is not Placement.settle

    @property
    def inside(self) -> bool:
        """Whether only x̂0 is moved, inside the network call. Only such a placement serves every solver."""
        return self.moves == "x0_hat" and not self.settles

    def default_kernel(self) -> Kernel:
        """The kernel of `MMDGuidance()`."""
        return IMQ(Neighbourhood())

    def check(self, kernel: Kernel) -> None:
        """Raise ValueError for a kernel that the placement cannot use. By default all are accepted."""

    def length(self, t: Level, s: Level) -> Any:
        """The sum of the inner steps' lengths after a sampler's step from t to s, made in ceil(length) equal parts.

        At most `steps`. None: `steps` inner steps of length 1. Only used with moves="x_s".
        """
        return None

    def meet(
        self, key: Any, kernel: Kernel, refs: Particles, memory: Particles | None, s: Level
    ) -> tuple[Any, Particles, Particles | None]:
        """(kernel, references, memory) that x_s at level s is compared with; only used with moves="x_s".

        The kernel may be a pair: the first between particles of the batch, the second between them and references or
        memory. `memory` is None or holds past samples, of weight 0 where a slot is empty.
        """
        return kernel, refs, memory

    def settle(self, key: Any, x: Any, x0: Any, t: Level, s: Level) -> Any:
        """The x_s to go on with, of the same shape, where moves="x0_hat"; x is the sampler's, x0 the last guided x̂0."""
        return x

    def begin(self, memory: Memory) -> Memory:
        """The memory to use in a call, made from the given one before the first step."""
        return memory

    def acts(self, memory: Particles | None) -> Any:
        """A factor of the scale, such as 0 as long as the memory is empty."""
        return 1.0


@pytree
class Denoised(Placement):
    """at="denoised": x̂0 is compared with clean references and moved, at each network call. For every solver."""

    moves: ClassVar[Literal["x0_hat", "x_s"]] = "x0_hat"
    steps: ClassVar[int] = 8
    rule: ClassVar[str] = "shrunk"


@pytree
class AtSample(Placement):
    """at="sample": x_s is compared with references that got fresh noise of level s, and moved after the step.

    The inner steps after a sampler's step have a total length of 20 × its decrease in log σ²/α², counted up to .575.
    """

    clean: ClassVar[bool] = False
    steps: ClassVar[int] = math.ceil(RATE * CAP)

    def default_kernel(self):
        """2.5 times the median nearest-neighbour distance of the references."""
        return IMQ(NearestNeighbour(2.5))

    def length(self, t, s):
        """In proportion to the decrease in log σ²/α²."""
        return RATE * jnp.minimum(jax.lax.stop_gradient(s.log_snr() - t.log_snr()), CAP)

    def meet(self, key, kernel, refs, memory, s):
        """References and memory with noise of level s."""
        key_refs, key_memory = jax.random.split(key)
        refs = replace(refs, x=diffuse(key_refs, refs.x, s))
        if memory is not None:
            memory = replace(memory, x=diffuse(key_memory, memory.x, s))
        return kernel.at_level(s), refs, memory


@pytree
class Clean(Placement):
    """at="clean": x_s is compared with clean references and moved after the step, as published."""


@pytree
class Diffused(AtSample):
    """at="diffused": as `AtSample`, but averaged over the noise of references and memory in closed form; for `RBF`."""

    def default_kernel(self):
        """At the references' median distance."""
        return RBF()

    def check(self, kernel):
        """The closed form exists for RBF, sums of RBFs, and products with one on the samples."""
        kernel.check_diffused()

    def meet(self, key, kernel, refs, memory, s):
        """References and memory multiplied by α; their noise is in the kernel."""
        pair = kernel.diffused(s, math.prod(refs.x.shape[1:]))
        refs = replace(refs, x=s.alpha * refs.x)
        if memory is not None:
            memory = replace(memory, x=s.alpha * memory.x)
        return pair, refs, memory
