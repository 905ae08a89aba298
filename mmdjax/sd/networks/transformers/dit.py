"""Transformers of latents conditioned on labels: DiT, which predicts noise, and SiT, which predicts a velocity.

Patches of the latent are tokens; blocks of attention and feed-forward change them, each modulated by an embedding c of
time and label (adaLN-Zero). DiT predicts ε at the index t of the trained table. SiT is the same network at t in [0, 1],
from noise at 0 to data at 1, and predicts

    v = x_data − x_noise    along    x_t = t x_data + (1 − t) x_noise.

The published files and diffusers' differ in two ways that weights do not show, and both are kept. The frequencies of
the embedding of t are 10000^{−i/128} in the published code, 10000^{−i/127} in diffusers. The second norm's epsilon is
1e-6 in the published code, 1e-5 by diffusers' default. Also, in diffusers each block has tables of its own for c.

References:
  Peebles & Xie 2023 (DiT), Ma et al. 2024 (SiT), Nichol & Dhariwal 2021 (learned variances).
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from mmdjax.sd.config import Config, check_size
from mmdjax.sd.networks.layers import timestep_embedding
from mmdjax.sd.networks.transformers.blocks import (
    AdaLNZeroBlock,
    PlainNorm,
    Transformer,
    modulate,
    sincos_positions,
    unpatchify,
)
from mmdjax.tree import is_concrete

WAVES = 256  # sines and cosines of t


@dataclasses.dataclass(frozen=True)
class DiTConfig(Config):
    """diffusers' config.json of a DiT."""

    CLASSES: ClassVar = ("DiTTransformer2DModel",)
    FIXED: ClassVar = {
        "activation_fn": "gelu-approximate",
        "attention_type": "default",
        "dropout": 0.0,
        "norm_elementwise_affine": False,
        "norm_type": "ada_norm_zero",
    }

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    num_embeds_ada_norm: int = 1000
    upcast_attention: bool = False
    norm_eps: float = 1e-5
    norm_num_groups: Any = 32  # nothing reads it
    freq_shift: int = 1
    shared_embedder: bool = False

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_classes(self) -> int:
        """Labels are 0 to num_classes − 1; num_classes itself means none."""
        return self.num_embeds_ada_norm

    def __post_init__(self):
        check_size(self, self.num_layers)
        check_channels(self)


@dataclasses.dataclass(frozen=True)
class PublishedDiTConfig(DiTConfig):
    """A DiT as its authors published it; see `mmdjax.sd.files.published`."""

    CLASSES: ClassVar = ("DiT",)

    norm_eps: float = 1e-6
    freq_shift: int = 0
    shared_embedder: bool = True


@dataclasses.dataclass(frozen=True)
class SiTConfig(PublishedDiTConfig):
    """A SiT as its authors published it; see `mmdjax.sd.files.published`."""

    CLASSES: ClassVar = ("SiT",)


class DiT(Transformer):
    """The diffusion transformer with labels, by its configuration.

    Call with x [n, h, w, c], t [n] (the index of the trained table, from 0) and labels [n], integers from 0;
    `config.num_classes`, or None for all of them, means no class. Returns the predicted noise [n, h, w, c]; the half
    of the output that predicts variances is left out. Pictures of another size than the training's have their positions
    scaled to its grid, as in diffusers.

    Raises:
      ValueError: labels of another number or type, or outside 0 to num_classes; a size that the patches do not divide.
        Inside `jit`, a label out of range gives NaN.
    """

    config: DiTConfig

    def inputs(self):
        cfg = self.config
        x = jax.ShapeDtypeStruct((1, cfg.patch_size, cfg.patch_size, cfg.in_channels), jnp.float32)
        return x, jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], t: Shaped[Array, " n"], labels: Any = None
    ) -> Float[Array, "n h w c"]:
        cfg = self.config
        n, height, width, _ = x.shape
        labels = jnp.full(n, cfg.num_classes) if labels is None else check_labels(labels, n, cfg.num_classes)
        waves = timestep_embedding(t, WAVES, shift=cfg.freq_shift).astype(self.dtype)
        h = self.patches("pos_embed.proj", x, cfg.patch_size, cfg.width)
        grid = height // cfg.patch_size, width // cfg.patch_size
        h = (h + sincos_positions(*grid, cfg.width, base=cfg.sample_size // cfg.patch_size)).astype(self.dtype)
        first = c = self.condition("emb" if cfg.shared_embedder else "transformer_blocks.0.norm1.emb", waves, labels)
        for i in range(cfg.num_layers):
            if i and not cfg.shared_embedder:
                c = self.condition(f"transformer_blocks.{i}.norm1.emb", waves, labels)
            settings = {"eps": cfg.norm_eps, "bias": cfg.attention_bias, "upcast": cfg.upcast_attention}
            heads = cfg.num_attention_heads
            h = self.part(AdaLNZeroBlock, f"transformer_blocks.{i}", heads=heads, **settings)(h, c)
        shift, scale = jnp.split(self.dense("proj_out_1", 2 * cfg.width, zero=True)(nn.silu(first)), 2, axis=-1)
        h = modulate(self.part(PlainNorm, "norm_out")(h), shift, scale)
        features = cfg.patch_size**2 * (cfg.out_channels or cfg.in_channels)
        out = self.dense("proj_out_2", features, zero=True)(h)
        return unpatchify(out, cfg.patch_size, height, width)[..., : cfg.in_channels]

    def condition(self, name: str, waves: Float[Array, "n d"], labels: Shaped[Array, " n"]) -> Float[Array, "n e"]:
        """c, the sum of the embeddings of time and label."""
        cfg = self.config
        table = self.embed(f"{name}.class_embedder.embedding_table", cfg.num_classes + 1, cfg.width)
        return self.two_layers(f"{name}.timestep_embedder", waves, cfg.width) + table(labels)


class SiT(DiT):
    """The interpolant transformer: the network of `DiT` called with t in [0, 1], 0 noise and 1 data.

    Returns the velocity, data − noise. `method="flow"` is the same in the convention of rectified flow, as
    `from_model(…, "flow")` takes it: t is 0 for data and 1 for noise, and the velocity is noise − data.
    """

    config: SiTConfig

    def flow(self, x: Float[Array, "n h w c"], t: Shaped[Array, " n"], labels: Any = None) -> Float[Array, "n h w c"]:
        """noise − data at the time t from data to noise."""
        return -self(x, 1 - t, labels)


def check_labels(labels: Any, n: int, num_classes: int) -> Array:
    """The labels as an array; see the errors of `DiT`."""
    if labels.shape != (n,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels are {labels.dtype} of shape {labels.shape}; give integers [{n}], one for each sample")
    wrong = [int(label) for label in np.asarray(labels) if not 0 <= label <= num_classes] if is_concrete(labels) else []
    if wrong:
        raise ValueError(
            f"labels has {', '.join(map(str, wrong[:5]))}; give 0 to {num_classes - 1}, or {num_classes} for no class"
        )
    return jnp.asarray(labels)


def check_channels(cfg: Any) -> None:
    """Raise ValueError unless a config's output channels are its input channels, once or twice (learned variances)."""
    if cfg.out_channels not in (None, cfg.in_channels, 2 * cfg.in_channels):
        raise ValueError(
            f"out_channels is {cfg.out_channels} for in_channels {cfg.in_channels}; implemented: the same number, or "
            "twice it, where variances are learned"
        )
