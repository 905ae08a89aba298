"""References that stay in host memory or on disk; the device gets a block of rows when it needs it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax.tree import pytree, static


class _Source:
    """An array on the host, compared by identity: another object compiles anew."""

    def __init__(self, array: Any):
        self.array = array


@pytree
class HostReferences:
    """References [m, ...] of which the device never holds more than a block of about 16 MB.

    Give it in place of an array of references to `guided_sample` (with "denoised" or "clean"), `mmd2`, or a kernel's
    `gradient`, inside `jit` or outside. The default guidance reads all rows ten times at each network call: once for
    what its inner steps share, once for each of the eight, and once for its trace. If that takes longer than the
    network, use a `mmdjax.compression.coreset` instead. References of at most a block are read once a run. Rows are
    read as float32.

    Limits: in `mmd2` and a kernel's `gradient`, kernels of distances and inner products (not `Mapped` nor your own
    functions, which need arrays); no derivative with respect to the references; one process; values are not checked.
    Make one object and use it for all calls: another one compiles anew.

    Args:
      array: anything of shape [m, ...] whose rows numpy can index: `np.load(path, mmap_mode="r")`, an array.
    Raises:
      ValueError: no rows, or the numbers are not floats.

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
            raise ValueError(f"references have dtype {array.dtype}; give floats, scaled as the training data was")
        object.__setattr__(self, "source", _Source(array))
        object.__setattr__(self, "index", np.arange(array.shape[0], dtype=np.int32))

    def __repr__(self) -> str:
        return f"HostReferences(float32{list(self.shape)})"

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, ...]."""
        return (*np.shape(self.index), *self.source.array.shape[1:])

    @property
    def dtype(self) -> Any:
        """The dtype of rows on the device."""
        return jnp.float32

    def flat(self) -> Float[Array, "n d"]:
        """Rows as a matrix on the device."""
        width = math.prod(self.shape[1:])
        array = self.source.array

        def read(index):
            rows = np.asarray(array[np.asarray(index)], np.float32)
            return rows.reshape(-1, width)

        result = jax.ShapeDtypeStruct((self.shape[0], width), jnp.float32)
        return jax.pure_callback(read, result, self.index, vmap_method="sequential")
