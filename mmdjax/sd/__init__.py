"""Stable Diffusion and latent diffusion in Flax, without torch: the models and their converter."""

from mmdjax.sd.clip import CLIPText, CLIPTextConfig, TextOutput
from mmdjax.sd.unet import UNet2D, UNet2DCondition, UNet2DConditionConfig, UNet2DConfig
from mmdjax.sd.vae import AutoencoderKL, AutoencoderKLConfig, VQModel, VQModelConfig

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "CLIPText",
    "CLIPTextConfig",
    "TextOutput",
    "UNet2D",
    "UNet2DCondition",
    "UNet2DConditionConfig",
    "UNet2DConfig",
    "VQModel",
    "VQModelConfig",
]
