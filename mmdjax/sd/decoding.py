"""Between pictures and latents by an autoencoder, with parameters as arguments, compiled once for each shape."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmdjax.sd.tiling import decode_sliced, decode_tiled
from mmdjax.tree import pytree, static


@pytree
class Decoder:
    """Latents [n, h, w, k] -> pictures [n, h2, w2, c], not clipped; made by `Pipeline.decoder`."""

    module: Any = static()
    params: Any

    def __call__(self, latents: Float[Array, "n h w k"]) -> Float[Array, "n h2 w2 c"]:
        return self.module.apply({"params": self.params}, latents, method="from_latents").astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def encode_whole(module: Any, params: Any, images: Array, batch_size: int | None) -> Array:
    """Latents [n, h2, w2, k] of pictures [n, h, w, c], some at a time; float32."""
    encode = functools.partial(module.apply, {"params": params}, method="to_latents")
    latents = encode(images) if batch_size is None else decode_sliced(encode, images, size=batch_size)
    return latents.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def decode_whole(module: Any, params: Any, latents: Array, batch_size: int | None, tile: int | None) -> Array:
    """Pictures [n, h, w, c] of latents [n, h2, w2, k], some at a time or in tiles; float32, in [−1, 1]."""
    decode = functools.partial(module.apply, {"params": params}, method="from_latents")
    if tile is not None:
        decode = functools.partial(decode_tiled, decode, tile=tile, overlap=tile // 4)
    images = decode(latents) if batch_size is None else decode_sliced(decode, latents, size=batch_size)
    return jnp.clip(images.astype(jnp.float32), -1.0, 1.0)
