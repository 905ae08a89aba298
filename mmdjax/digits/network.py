"""The digits' denoising network, in its own file so that importing `mmdjax.digits` does not import Flax."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NULL_CLASS = 10
AUGMENTED = 11  # added to a label in training where the picture was moved and turned; never sampled


class DigitsNetwork(nn.Module):
    """v̂(x, t, label): residual dense blocks on the 64 pixels, scaled and shifted by an embedding of time and class.

    h ← h + W₂ silu(W₁ (LN(h) (1 + s(c)) + b(c))).  The modulation is Perez et al. 2018 (FiLM), W₂, s and b starting at
    zero as in Peebles & Xie 2023 (adaLN-Zero). Dense, to be quick on a CPU.

    Labels 0 to 9 are the classes, 10 is the null class. In training, `AUGMENTED` is added to the labels of augmented
    pictures, so that samples do not look like these.  Karras et al. 2022, appendix F.2 (non-leaking augmentation).
    """

    width: int = 192
    blocks: int = 4
    embedding: int = 64

    @nn.compact
    def __call__(
        self, x: Float[Array, "n 8 8 1"], t: Float[Array, " n"], label: Int[Array, " n"] | None = None
    ) -> Float[Array, "n 8 8 1"]:
        n = x.shape[0]
        label = jnp.full((n,), NULL_CLASS) if label is None else label
        zeros = nn.initializers.zeros
        classes = nn.Embed(2 * AUGMENTED, self.embedding, embedding_init=nn.initializers.normal(0.5))
        c = nn.Dense(self.embedding)(fourier(t, self.embedding)) + classes(label)
        c = nn.silu(nn.Dense(self.embedding)(nn.silu(c)))
        h = nn.Dense(self.width)(x.reshape(n, -1))
        for _ in range(self.blocks):
            scale, shift = jnp.split(nn.Dense(2 * self.width, kernel_init=zeros)(c), 2, axis=-1)
            y = nn.LayerNorm(use_bias=False, use_scale=False)(h) * (1 + scale) + shift
            h = h + nn.Dense(self.width, kernel_init=zeros)(nn.silu(nn.Dense(self.width)(y)))
        return nn.Dense(x[0].size, kernel_init=zeros)(nn.LayerNorm()(h)).reshape(x.shape)


def fourier(t: Float[Array, " n"], dim: int, max_frequency: float = 50.0) -> Float[Array, "n dim"]:
    """sin and cos of t at dim/2 frequencies from 1 to max_frequency, evenly spaced in the logarithm."""
    frequencies = jnp.exp(jnp.linspace(0.0, jnp.log(max_frequency), dim // 2))
    angles = t[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
