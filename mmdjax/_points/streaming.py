"""References that stay in host memory or on disk: a block of rows at a time comes to the device when it is needed."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax.tree import pytree, static


class _Source:
    """An array on the host; compared by identity, so that one object is compiled for once."""

    def __init__(self, array: Any):
        self.array = array


@pytree
class HostReferences:
    """References [m, ...] of which the device never holds more than a block, of some 16 MB.

    Give it in place of an array of references to `guided_sample`, `MMDGuidance` at "denoised" or "clean", `mmd2`, or a
    kernel's `gradient`, inside `jit` or outside. The default guidance reads all rows eleven times at each
    network call (for distances, for weights, for each of eight inner steps, for its trace), so that a network call
    should take longer than that, or a `mmdjax.compression.coreset` take their place. Rows come as float32.

    Limits: kernels of distances and inner products (not `Mapped`, nor functions of one's own, which ask for arrays); no
    derivative with respect to the references; one process; nothing checks the values. Make one object and use it for
    all calls: a second one compiles anew.

    Args:
      array: anything of shape [m, ...] whose rows numpy can take by number: `np.load(path, mmap_mode="r")`, an array.
    Raises:
      ValueError: no rows, or no floating-point numbers.

    Example:
      >>> from mmdjax import RBF, mmd2
      >>> refs = HostReferences(np.ones((3, 2), np.float16))
      >>> float(mmd2(RBF(1.0), jnp.ones((5, 2)), refs))
      0.0
    """

    index: Any
    source: Any = static()

    def __init__(self, array: Any):
        if len(np.shape(array)) < 1 or array.shape[0] == 0:
            raise ValueError(f"references have shape {np.shape(array)}; give at least one row")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"references have dtype {array.dtype}; the model works on floats")
        object.__setattr__(self, "source", _Source(array))
        object.__setattr__(self, "index", np.arange(array.shape[0], dtype=np.int32))

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, ...]."""
        return (*np.shape(self.index), *self.source.array.shape[1:])

    @property
    def dtype(self) -> Any:
        """What rows come as."""
        return jnp.float32

    def flat(self) -> Float[Array, "n d"]:
        """The rows, brought to the device."""
        width = math.prod(self.shape[1:])
        array = self.source.array

        def read(index):
            rows = np.asarray(array[np.asarray(index)], np.float32)
            return rows.reshape(-1, width)

        result = jax.ShapeDtypeStruct((self.shape[0], width), jnp.float32)
        return jax.pure_callback(read, result, self.index, vmap_method="sequential")
