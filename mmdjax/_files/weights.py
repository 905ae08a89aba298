"""Linen parameters in a safetensors file, under their paths joined by dots."""

from pathlib import Path
from typing import Any

import numpy as np


def load_weights(path: str | Path) -> dict:
    """A Linen parameter tree from a safetensors file; what it keeps in half precision becomes float32."""
    from flax.traverse_util import unflatten_dict
    from safetensors.numpy import load_file

    return unflatten_dict({name: value.astype(np.float32) for name, value in load_file(path).items()}, sep=".")


def save_weights(path: str | Path, params: Any, metadata: dict[str, str], *, dtype: Any = None) -> None:
    """The inverse of `load_weights`, with where the weights came from.

    Args:
      dtype: to write in, such as float16; by default each array's own.
    """
    from flax.traverse_util import flatten_dict
    from safetensors.numpy import save_file

    flat = flatten_dict(params, sep=".")
    save_file({name: np.ascontiguousarray(value, dtype) for name, value in flat.items()}, path, metadata=metadata)
