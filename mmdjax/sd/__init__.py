"""Stable Diffusion, latent diffusion and diffusion transformers in Flax, without torch: the models, their converter and
whole pipelines.
"""

from mmdjax.checkpoint import CheckpointError
from mmdjax.sd.clip import CLIPText, CLIPTextConfig, TextOutput
from mmdjax.sd.models import Component, export, load_component, load_models, module_from_config, save
from mmdjax.sd.pack import ReferencePack, encode_references, load_references
from mmdjax.sd.pipeline import Pipeline
from mmdjax.sd.pretrained import load
from mmdjax.sd.prompts import prompt_kernel
from mmdjax.sd.qwen3 import Qwen3, Qwen3Config
from mmdjax.sd.t5 import T5Encoder, T5EncoderConfig
from mmdjax.sd.tiling import decode_sliced, decode_tiled
from mmdjax.sd.transformers.dit import DiT, DiTConfig, SiT, SiTConfig
from mmdjax.sd.transformers.pixart import PixArt, PixArtConfig
from mmdjax.sd.unet import UNet2D, UNet2DCondition, UNet2DConditionConfig, UNet2DConfig
from mmdjax.sd.vae import AutoencoderKL, AutoencoderKLConfig, VQModel, VQModelConfig

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "CLIPText",
    "CLIPTextConfig",
    "CheckpointError",
    "Component",
    "DiT",
    "DiTConfig",
    "Pipeline",
    "PixArt",
    "PixArtConfig",
    "Qwen3",
    "Qwen3Config",
    "ReferencePack",
    "SiT",
    "SiTConfig",
    "T5Encoder",
    "T5EncoderConfig",
    "TextOutput",
    "UNet2D",
    "UNet2DCondition",
    "UNet2DConditionConfig",
    "UNet2DConfig",
    "VQModel",
    "VQModelConfig",
    "decode_sliced",
    "decode_tiled",
    "encode_references",
    "export",
    "load",
    "load_component",
    "load_models",
    "load_references",
    "module_from_config",
    "prompt_kernel",
    "save",
]
