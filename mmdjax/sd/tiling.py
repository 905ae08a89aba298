"""Decoding in less memory: a few pictures at a time, or one picture in overlapping tiles.

A decoder is any function of latents [n, h, w, k] to pictures [n, f h, f w, c], such as
`functools.partial(vae.apply, {"params": params}, method="from_latents")`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def decode_sliced(decode: Callable, z: Float[Array, "n h w k"], *, size: int = 1) -> Float[Array, "n h2 w2 c"]:
    """`decode(z)`, exactly, `size` pictures at a time."""
    return jax.lax.map(lambda one: decode(one[None])[0], z, batch_size=size)


def decode_tiled(
    decode: Callable, z: Float[Array, "n h w k"], *, tile: int = 64, overlap: int = 16
) -> Float[Array, "n h2 w2 c"]:
    """`decode(z)` in tiles of one size, blended linearly where they overlap.

    An approximation: the decoder's norms and attention see a tile, not the picture, so that colours may differ between
    tiles. Operations that reach no farther than `overlap` are exact. It takes the memory of one tile; latents within
    one tile are decoded as a whole.

    Args:
      tile: side of a tile, in latents.
      overlap: neighbouring tiles share at least this many latents.
    Raises:
      ValueError: the overlap does not leave room for a step.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap is {overlap} for tiles of {tile}; it must be at least 0 and less than the tile")
    sides, ramps, starts = [], [], []
    for length in z.shape[1:3]:
        side = min(tile, length)
        count = 1 if side == length else -(-(length - overlap) // (side - overlap))
        starts.append(np.linspace(0, length - side, count).round().astype(int))
        sides.append(side)
    out = jax.eval_shape(decode, jax.ShapeDtypeStruct((z.shape[0], *sides, z.shape[3]), z.dtype))
    factor = out.shape[1] // sides[0]
    for side, places in zip(sides, starts, strict=True):
        ramps.append(_ramp(side * factor, overlap * factor if len(places) > 1 else 0))
    weight = jnp.asarray(ramps[0][:, None, None] * ramps[1][None, :, None], jnp.float32)

    def add(total: Any, start: Array) -> Any:
        pictures, weights = total
        at = (0, start[0], start[1], 0)
        pixels = (0, start[0] * factor, start[1] * factor, 0)
        patch = decode(jax.lax.dynamic_slice(z, at, (z.shape[0], *sides, z.shape[3]))).astype(jnp.float32)
        both = jax.lax.dynamic_slice(pictures, pixels, patch.shape) + weight * patch
        share = jax.lax.dynamic_slice(weights, pixels, (1, *weight.shape)) + weight[None]
        return (
            jax.lax.dynamic_update_slice(pictures, both, pixels),
            jax.lax.dynamic_update_slice(weights, share, pixels),
        ), None

    height, width = (factor * length for length in z.shape[1:3])
    empty = jnp.zeros((z.shape[0], height, width, out.shape[3])), jnp.zeros((1, height, width, 1))
    corners = np.stack(np.meshgrid(*starts, indexing="ij"), axis=-1).reshape(-1, 2)
    (pictures, weights), _ = jax.lax.scan(add, empty, jnp.asarray(corners))
    return (pictures / weights).astype(out.dtype)


def _ramp(length: int, overlap: int) -> np.ndarray:
    # rises from a border over the overlap and falls to the other; nowhere 0, so that the outermost pixels keep a weight
    distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 1.0
    return np.minimum(distance / (overlap + 1), 1.0)
