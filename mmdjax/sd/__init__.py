"""Stable Diffusion and latent diffusion in Flax, without torch: the models and their converter."""

from mmdjax.sd.checkpoint import CheckpointError
from mmdjax.sd.clip import CLIPText, CLIPTextConfig, TextOutput
from mmdjax.sd.load import Component, export, load_component, load_models, module_from_config, save
from mmdjax.sd.tiling import decode_sliced, decode_tiled
from mmdjax.sd.unet import UNet2D, UNet2DCondition, UNet2DConditionConfig, UNet2DConfig
from mmdjax.sd.vae import AutoencoderKL, AutoencoderKLConfig, VQModel, VQModelConfig

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "CLIPText",
    "CLIPTextConfig",
    "CheckpointError",
    "Component",
    "TextOutput",
    "UNet2D",
    "UNet2DCondition",
    "UNet2DConditionConfig",
    "UNet2DConfig",
    "VQModel",
    "VQModelConfig",
    "decode_sliced",
    "decode_tiled",
    "export",
    "load_component",
    "load_models",
    "module_from_config",
    "save",
]
