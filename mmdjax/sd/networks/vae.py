"""Autoencoders of latent diffusion: between pictures in [−1, 1] and the latents that the diffusion model lives in.

`AutoencoderKL` (Stable Diffusion) encodes to a Gaussian; `VQModel` (the unconditional face models) to a vector whose
nearest code its decoder uses. The diffusion model works on `scaling_factor` times the latents: `to_latents` and
`from_latents` apply it, once; `encode` and `decode` do not.

References:
  Rombach et al. 2022, section 3.1 and appendix G; Kingma & Welling 2014 (the Gaussian); van den Oord et al. 2017 (the
  codes).
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmdjax.sd.config import Config, check_size
from mmdjax.sd.networks.layers import Block, ResnetBlock, SpatialAttention, upsample

COMMON = {"act_fn": "silu", "mid_block_add_attention": True}
EPS = 1e-6  # of every norm here, where the U-Nets have 1e-5


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(Config):
    """The settings that the config.json of both autoencoders have."""

    FIXED: ClassVar = COMMON

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: Any = 32
    scaling_factor: int | float = 0.18215
    force_upcast: bool = True

    @property
    def downscale(self) -> int:
        """Pixels to a latent, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def __post_init__(self):
        unknown = {*self.down_block_types, *self.up_block_types} - {"DownEncoderBlock2D", "UpDecoderBlock2D"}
        levels = len(self.block_out_channels)
        check_size(self, 2 * levels * (self.layers_per_block + 1), levels)
        if unknown:
            raise ValueError(f"blocks {sorted(unknown)} are not implemented in an autoencoder")


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig(AutoencoderConfig):
    """vae/config.json."""

    CLASSES: ClassVar = ("AutoencoderKL",)
    FIXED: ClassVar = COMMON | {"latents_mean": None, "latents_std": None}

    shift_factor: int | float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True


@dataclasses.dataclass(frozen=True)
class VQModelConfig(AutoencoderConfig):
    """vqvae/config.json.

    A missing `scaling_factor` is 1: the files of the published models are older than that key, and with diffusers'
    default for it (.18215) they give noise.
    """

    CLASSES: ClassVar = ("VQModel",)
    FIXED: ClassVar = COMMON | {"norm_type": "group", "lookup_from_codebook": False}

    latent_channels: int = 3
    num_vq_embeddings: int = 256
    vq_embed_dim: int | None = None
    scaling_factor: int | float = 1.0
    force_upcast: bool = False

    @property
    def code_size(self) -> int:
        """Length of one code."""
        return self.vq_embed_dim or self.latent_channels


class Autoencoder(Block):
    """What both autoencoders share."""

    config: Any

    def inputs(self):
        side = 2 ** len(self.config.block_out_channels)
        return (jax.ShapeDtypeStruct((1, side, side, self.config.in_channels), jnp.float32),)

    @property
    def compute_dtype(self):
        """float32 in place of float16 if the config asks for it: SDXL's activations exceed float16's largest number."""
        return jnp.float32 if self.config.force_upcast and self.dtype == jnp.float16 else self.dtype

    def __call__(self, images):
        """Encode and decode pictures, so that `init` makes all parameters: [n, h, w, c] -> [n, h, w, c]."""
        return self.from_latents(self.to_latents(images))

    def to_latents(self, images: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 k"]:
        """The diffusion model's latents of pictures in [−1, 1]: scaling_factor · (mean − shift_factor)."""
        cfg = self.config
        z = self.encode(images)
        z = z[0] if isinstance(z, tuple) else z
        return (z - (getattr(cfg, "shift_factor", None) or 0.0)) * cfg.scaling_factor

    def from_latents(self, latents: Float[Array, "n h2 w2 k"]) -> Float[Array, "n h w c"]:
        """Pictures of the diffusion model's latents, the inverse of `to_latents`; not clipped to [−1, 1]."""
        cfg = self.config
        return self.decode(latents / cfg.scaling_factor + (getattr(cfg, "shift_factor", None) or 0.0))


class AutoencoderKL(Autoencoder):
    """Stable Diffusion's autoencoder: `encode` to mean and log-variance, `decode` a latent."""

    config: AutoencoderKLConfig

    def setup(self):
        cfg = self.config
        self.encoder = self.part(Encoder, None, cfg, 2 * cfg.latent_channels)
        self.decoder = self.part(Decoder, None, cfg)
        if cfg.use_quant_conv:
            self.quant_conv = self.conv(None, 2 * cfg.latent_channels, 1)
        if cfg.use_post_quant_conv:
            self.post_quant_conv = self.conv(None, cfg.latent_channels, 1)

    def encode(self, images: Float[Array, "n h w c"]) -> tuple[Float[Array, "n h2 w2 k"], Float[Array, "n h2 w2 k"]]:
        """Mean and log-variance of q(z | image), the latter in [−30, 20]."""
        h = self.encoder(images)
        mean, logvar = jnp.split(self.quant_conv(h) if self.config.use_quant_conv else h, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: Float[Array, "n h2 w2 k"]) -> Float[Array, "n h w c"]:
        """The picture of a latent."""
        z = z.astype(self.compute_dtype)
        return self.decoder(self.post_quant_conv(z) if self.config.use_post_quant_conv else z)


class VQModel(Autoencoder):
    """The vector-quantised autoencoder. `decode` quantises first, `encode` does not: diffusion runs in between."""

    config: VQModelConfig

    def setup(self):
        cfg = self.config
        self.encoder = self.part(Encoder, None, cfg, cfg.latent_channels)
        self.decoder = self.part(Decoder, None, cfg)
        self.quant_conv = self.conv(None, cfg.code_size, 1)
        self.post_quant_conv = self.conv(None, cfg.latent_channels, 1)
        self.quantize = self.part(Codebook, None, cfg.num_vq_embeddings, cfg.code_size)

    def encode(self, images: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 k"]:
        """The latent before quantisation."""
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Float[Array, "n h2 w2 k"], quantize: bool = True) -> Float[Array, "n h w c"]:
        """The picture of a latent, by default of its nearest codes."""
        z = z.astype(self.compute_dtype)
        return self.decoder(self.post_quant_conv(self.quantize(z) if quantize else z))


class Codebook(Block):
    """The nearest code to each vector, of equally near ones the first: [n, h, w, k] -> [n, h, w, k].

    Its gradient is that of the identity. Differences are squared, not expanded into products, whose rounding exceeds
    the distances among 8,192 codes.
    """

    num: int
    size: int

    @nn.compact
    def __call__(self, z):
        codes = self.embed("embedding", self.num, self.size).embedding.astype(jnp.float32)

        def nearest(one):
            return jnp.argmin(jnp.sum((one[:, :, None] - codes) ** 2, axis=-1), axis=-1)

        code = jnp.take(codes, jax.lax.map(nearest, z.astype(jnp.float32)), axis=0).astype(z.dtype)
        return jax.lax.stop_gradient(code) + (z - jax.lax.stop_gradient(z))


class Encoder(Block):
    """Pictures [n, h, w, c] -> [n, h/f, w/f, features]."""

    config: Any
    features: int

    @nn.compact
    def __call__(self, x):
        cfg = self.config
        h = self.conv("conv_in", cfg.block_out_channels[0])(x.astype(self.dtype))
        for i, features in enumerate(cfg.block_out_channels):
            for j in range(cfg.layers_per_block):
                h = _resnet(self, f"down_blocks.{i}.resnets.{j}", features)(h)
            if i < len(cfg.block_out_channels) - 1:
                # one row and column after the last, none before the first: unlike the U-Net
                h = self.conv(f"down_blocks.{i}.downsamplers.0.conv", features, stride=2, padding=[(0, 1)] * 2)(h)
        return self.conv("conv_out", self.features)(_norm(self, _middle(self, h)))


class Decoder(Block):
    """Latents [n, h/f, w/f, k] -> pictures [n, h, w, c]."""

    config: Any

    @nn.compact
    def __call__(self, z):
        cfg = self.config
        h = _middle(self, self.conv("conv_in", cfg.block_out_channels[-1])(z))
        for i, features in enumerate(cfg.block_out_channels[::-1]):
            for j in range(cfg.layers_per_block + 1):
                h = _resnet(self, f"up_blocks.{i}.resnets.{j}", features)(h)
            if i < len(cfg.block_out_channels) - 1:
                h = self.conv(f"up_blocks.{i}.upsamplers.0.conv", features)(
                    upsample(h, (2 * h.shape[1], 2 * h.shape[2]))
                )
        return self.conv("conv_out", cfg.out_channels)(_norm(self, h))


def _middle(self, h):
    h = _resnet(self, "mid_block.resnets.0", h.shape[-1])(h)
    h = self.part(SpatialAttention, "mid_block.attentions.0", 1, self.config.norm_num_groups, EPS)(h)
    return _resnet(self, "mid_block.resnets.1", h.shape[-1])(h)


def _resnet(self, name, features):
    return self.part(ResnetBlock, name, features, self.config.norm_num_groups, EPS)


def _norm(self, h):
    return nn.silu(self.group_norm("conv_norm_out", self.config.norm_num_groups, EPS)(h))
