"""FLUX.2's autoencoder: latents of 32 channels, 2 × 2 of them packed as one of 128 and brought to mean 0, variance 1.

    latents = (pack(z) − mean) / √(variance + eps),

with z the posterior's mean, and the running statistics of a batch norm that was trained with the autoencoder.

References:
  Black Forest Labs 2025, github.com/black-forest-labs/flux2; Ioffe & Szegedy 2015 (batch norm).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmdjax.sd.networks.layers import Block, pack, unpack
from mmdjax.sd.networks.vae import COMMON, AutoencoderConfig, AutoencoderKL, Decoder, Encoder

PATCH = 2  # latents packed as one, along each side


@dataclasses.dataclass(frozen=True)
class AutoencoderKLFlux2Config(AutoencoderConfig):
    """vae/config.json of FLUX.2, but `latent_channels` is that of the packed latents, four times the file's.

    Example:
      >>> config = AutoencoderKLFlux2Config.from_json({"_class_name": "AutoencoderKLFlux2", "latent_channels": 32})
      >>> config.latent_channels, config.downscale
      (128, 16)
    """

    CLASSES: ClassVar = ("AutoencoderKLFlux2",)
    FIXED: ClassVar = COMMON | {"patch_size": (PATCH, PATCH), "batch_norm_momentum": 0.1, "scaling_factor": 1.0}

    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    latent_channels: int = 32 * PATCH**2
    sample_size: Any = 1024
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    batch_norm_eps: float = 1e-4
    scaling_factor: int | float = 1.0  # the statistics scale the latents

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Any:
        """The configuration in a parsed config.json. See `Config.from_json`."""
        config = super().from_json(raw)
        if "latent_channels" not in raw:
            return config
        return dataclasses.replace(config, latent_channels=config.latent_channels * PATCH**2)

    @property
    def z_channels(self) -> int:
        """Channels between encoder and decoder, before packing."""
        return self.latent_channels // PATCH**2

    @property
    def downscale(self) -> int:
        """Pixels to a packed latent, along each side."""
        return PATCH * super().downscale

    @property
    def of_decoder(self) -> "AutoencoderKLFlux2Config":
        """With the channels of the decoder's blocks, which may be other than the encoder's."""
        return dataclasses.replace(self, block_out_channels=self.decoder_block_out_channels or self.block_out_channels)

    def __post_init__(self):
        super().__post_init__()
        if self.decoder_block_out_channels and len(self.decoder_block_out_channels) != len(self.block_out_channels):
            raise ValueError(
                f"decoder_block_out_channels has {len(self.decoder_block_out_channels)} levels and block_out_channels "
                f"{len(self.block_out_channels)}; they must be as many"
            )


class AutoencoderKLFlux2(AutoencoderKL):
    """FLUX.2's autoencoder: `encode` to mean and log-variance, `decode` a latent, both of 32 channels and not packed.

    `to_latents` and `from_latents` are those of the diffusion model: packed and normalised, [n, h/16, w/16, 128] for
    pictures [n, h, w, 3].
    """

    config: AutoencoderKLFlux2Config

    def setup(self):
        cfg = self.config
        self.encoder = self.part(Encoder, None, cfg, 2 * cfg.z_channels)
        self.decoder = self.part(Decoder, None, cfg.of_decoder)
        self.bn = self.part(RunningNorm, None, cfg.latent_channels, cfg.batch_norm_eps)
        if cfg.use_quant_conv:
            self.quant_conv = self.conv(None, 2 * cfg.z_channels, 1)
        if cfg.use_post_quant_conv:
            self.post_quant_conv = self.conv(None, cfg.z_channels, 1)

    def to_latents(self, images: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 k"]:
        """The diffusion model's latents of pictures in [−1, 1]: the posterior's mean, packed and normalised."""
        return self.bn(pack(self.encode(images)[0], PATCH))

    def from_latents(self, latents: Float[Array, "n h2 w2 k"]) -> Float[Array, "n h w c"]:
        """Pictures of the diffusion model's latents, the inverse of `to_latents`; not clipped to [−1, 1]."""
        return self.decode(unpack(self.bn(latents, inverse=True), PATCH))


class RunningNorm(Block):
    """(x − mean) / √(variance + eps) by the checkpoint's statistics of each channel, or its inverse; in float32."""

    features: int
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "n h w k"], inverse: bool = False) -> Float[Array, "n h w k"]:
        mean = self.param("running_mean", nn.initializers.zeros, (self.features,), self.param_dtype)
        variance = self.param("running_var", nn.initializers.ones, (self.features,), self.param_dtype)
        mean, x32 = mean.astype(jnp.float32), x.astype(jnp.promote_types(x.dtype, jnp.float32))
        deviation = jnp.sqrt(variance.astype(jnp.float32) + self.eps)
        return (x32 * deviation + mean if inverse else (x32 - mean) / deviation).astype(x.dtype)
