"""The faces' networks, apart from `mmdjax.faces` so that importing that one does not import Flax."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmdjax.faces import CLASSES, CONDITIONS, VALUES
from mmdjax.sd.networks.layers import timestep_embedding
from mmdjax.sd.networks.transformers.blocks import (
    AdaLNZeroBlock,
    PlainNorm,
    modulate,
    patchify,
    sincos_positions,
    unpatchify,
)


class FacesNetwork(nn.Module):
    """v̂(x, t, cond): a transformer on patches, modulated by an embedding of time, hair, hair colour and skin (DiT).

    cond [n, 3] counts from 0 in the order of `CONDITIONS`; the number after the last class of each is its null.
    Peebles & Xie 2023.
    """

    width: int = 128
    blocks: int = 4
    heads: int = 4
    patch: int = 2

    @nn.compact
    def __call__(
        self, x: Float[Array, "n 16 16 3"], t: Float[Array, " n"], cond: Int[Array, "n 3"] | None = None
    ) -> Float[Array, "n 16 16 3"]:
        n, height, width, channels = x.shape
        nulls = jnp.array([CLASSES[name] for name in CONDITIONS])
        cond = jnp.broadcast_to(nulls, (n, len(CONDITIONS))) if cond is None else cond
        c = nn.Dense(self.width, name="time.2")(
            nn.silu(nn.Dense(self.width, name="time.0")(timestep_embedding(1000 * t, self.width)))
        )
        for i, name in enumerate(CONDITIONS):
            table = nn.Embed(CLASSES[name] + 1, self.width, embedding_init=nn.initializers.normal(0.5), name=name)
            c = c + table(cond[:, i])
        h = nn.Dense(self.width, name="patches")(patchify(x, self.patch))
        h = h + sincos_positions(height // self.patch, width // self.patch, self.width)
        for i in range(self.blocks):
            h = AdaLNZeroBlock(heads=self.heads, name=f"blocks.{i}")(h, c)
        shift, scale = jnp.split(
            nn.Dense(2 * self.width, kernel_init=nn.initializers.zeros, name="out.modulation")(nn.silu(c)), 2, axis=-1
        )
        h = modulate(PlainNorm(name="out.norm")(h), shift, scale)
        out = nn.Dense(self.patch**2 * channels, kernel_init=nn.initializers.zeros, name="out.pixels")(h)
        return unpatchify(out, self.patch, height, width)


class AttributesNetwork(nn.Module):
    """Logits of each attribute, [n, values], and the features that they are linear in, [n, 128]."""

    @nn.compact
    def __call__(
        self, x: Float[Array | np.ndarray, "n 16 16 3"]
    ) -> tuple[dict[str, Float[Array, "n values"]], Float[Array, "n 128"]]:
        h = nn.gelu(nn.Dense(384, name="pixels")(x.reshape(x.shape[0], -1)))
        features = nn.gelu(nn.Dense(128, name="features")(h))
        return {name: nn.Dense(count, name=name)(features) for name, count in VALUES.items()}, features
