"""Stable Diffusion, FLUX, PixArt, DiT and latent diffusion in Flax, without torch.

pipeline, pretrained, sample    whole models, their loading, and one call from prompts to pictures
families                        what each family does its own way
networks                        the networks in Flax; `models` loads them
files                           checkpoints as people have them, LoRAs, conversion
text, scheduler, flow           prompts; noise levels and time grids
pack, pictures, run, describe   references; what the command line does
"""

import sys

from mmdjax.checkpoint import CheckpointError
from mmdjax.sd.files import archive, compvis, convert, single
from mmdjax.sd.models import Component, export, load_component, load_models, module_from_config, save
from mmdjax.sd.networks import clip, layers, primitives, unet, vae
from mmdjax.sd.networks.clip import CLIPText, CLIPTextConfig, TextOutput
from mmdjax.sd.networks.qwen3 import Qwen3, Qwen3Config
from mmdjax.sd.networks.t5 import T5Encoder, T5EncoderConfig
from mmdjax.sd.networks.transformers.dit import DiT, DiTConfig, SiT, SiTConfig
from mmdjax.sd.networks.transformers.flux import Flux, FluxConfig
from mmdjax.sd.networks.transformers.flux2 import Flux2, Flux2Config
from mmdjax.sd.networks.transformers.pixart import PixArt, PixArtConfig
from mmdjax.sd.networks.transformers.sd3 import SD3, SD3Config
from mmdjax.sd.networks.unet import UNet2D, UNet2DCondition, UNet2DConditionConfig, UNet2DConfig
from mmdjax.sd.networks.vae import AutoencoderKL, AutoencoderKLConfig, VQModel, VQModelConfig
from mmdjax.sd.networks.vae_flux2 import AutoencoderKLFlux2, AutoencoderKLFlux2Config
from mmdjax.sd.pack import ReferencePack, encode_references, load_references
from mmdjax.sd.pipeline import Pipeline
from mmdjax.sd.pretrained import load
from mmdjax.sd.text import prompts, tokenizer
from mmdjax.sd.text.prompts import prompt_kernel
from mmdjax.sd.tiling import decode_sliced, decode_tiled

# These stood here, and go on being imported by their old names.
for _moved in (archive, clip, compvis, convert, layers, primitives, prompts, single, tokenizer, unet, vae):
    sys.modules[f"{__name__}.{_moved.__name__.rpartition('.')[2]}"] = _moved

__all__ = [
    "SD3",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "AutoencoderKLFlux2",
    "AutoencoderKLFlux2Config",
    "CLIPText",
    "CLIPTextConfig",
    "CheckpointError",
    "Component",
    "DiT",
    "DiTConfig",
    "Flux",
    "Flux2",
    "Flux2Config",
    "FluxConfig",
    "Pipeline",
    "PixArt",
    "PixArtConfig",
    "Qwen3",
    "Qwen3Config",
    "ReferencePack",
    "SD3Config",
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
