"""Past samples, in a ring of fixed capacity.

Finished samples count as generated particles in MMD² but do not move, so that many small batches align as one large
batch does. Shapes never change; empty slots have weight 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mmdjax._points.particles import Particles
from mmdjax.tree import pytree, replace


@pytree
class Memory:
    """Finished samples, which count as particles in the guidance of later batches but do not move.

    `guided_sample(..., memory=100)` makes one; give its result's `memory` to the next call.

    Args:
      particles: the slots; weight 1 where one holds a sample, 0 where it is empty.
      next: index of the slot for the next sample.

    Example:
      >>> memory = Memory.empty(3, (2,)).push(Particles(jnp.ones((2, 2))))
      >>> int(memory.count), memory.capacity
      (2, 3)
    """

    particles: Particles
    next: Any

    @classmethod
    def empty(cls, capacity: int, shape: tuple[int, ...], cond: Any = None) -> "Memory":
        """A memory without samples.

        Args:
          capacity: how many samples it holds; new ones replace the oldest.
          shape: of one sample.
          cond: conditions [n, ...] like those of the samples to come; None if they have none.
        Raises:
          ValueError: capacity below 1.
        """
        if not isinstance(capacity, (int, np.integer)) or capacity < 1:
            raise ValueError(f"memory is {capacity}; give the number of samples to remember, or None")
        slots = jax.tree.map(lambda c: jnp.zeros((capacity, *np.shape(c)[1:]), jnp.result_type(c)), cond)
        particles = Particles(jnp.zeros((capacity, *shape)), slots, jnp.zeros(capacity))
        return cls(particles, jnp.zeros((), jnp.int32))

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.particles.n

    @property
    def count(self) -> Int[Array, ""]:
        """Number of samples held."""
        return (self.particles.weight > 0).sum()

    def push(self, new: Particles) -> "Memory":
        """The memory with samples added in place of the oldest; of more than `capacity` samples the last are kept.

        Raises:
          TypeError: samples that are complex or not numbers.
          ValueError: samples or conditions of another structure or shape than the memory's.
        """
        held = self.particles
        for name, slots, rows in (("samples", held.x, new.x), ("conditions", held.cond, new.cond)):
            shapes = [jax.tree.map(lambda leaf: np.shape(leaf)[1:], tree) for tree in (slots, rows)]
            same = jax.tree.structure(slots) == jax.tree.structure(rows) and shapes[0] == shapes[1]
            if not same or any(np.shape(leaf)[:1] != (new.n,) for leaf in jax.tree.leaves(rows)):
                found = jax.tree.map(np.shape, rows)
                raise ValueError(f"memory holds {name} of shape {shapes[0]}; give [n, ...] of these, not {found}")
            if any(jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating) for leaf in jax.tree.leaves(rows)):
                raise TypeError(f"the new {name} are complex; a memory holds real numbers")
        kept = min(new.n, self.capacity)
        slots = (self.next + jnp.arange(new.n - kept, new.n)) % self.capacity
        written = jax.tree.map(
            lambda old, rows: old.at[slots].set(rows[new.n - kept :].astype(old.dtype)),
            (self.particles.x, self.particles.cond),
            (new.x, new.cond),
        )
        particles = Particles(written[0], written[1], self.particles.weight.at[slots].set(1.0))
        return replace(self, particles=particles, next=(self.next + new.n) % self.capacity)

    def reset_when_full(self) -> "Memory":
        """The memory, or if it is full only its last sample: what the published code does before a batch."""
        last = (jnp.arange(self.capacity) == (self.next - 1) % self.capacity).astype(self.particles.weight.dtype)
        weight = jnp.where(self.count == self.capacity, last, self.particles.weight)
        return replace(self, particles=replace(self.particles, weight=weight))
