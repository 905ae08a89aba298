"""Tiny random models of the real libraries, one of each family, and how to run them beside ours."""

from unittest import mock

import numpy as np
import sd_tiny
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SD1_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
}
SD2_UNET = SD1_UNET | {
    "block_out_channels": (64, 128),
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL_UNET = SD1_UNET | {
    "block_out_channels": (64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
    "cross_attention_dim": 40,
}
LDM_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": 32,
}
KL = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "sample_size": 16,
}
VQ = KL | {"latent_channels": 3, "num_vq_embeddings": 64, "scaling_factor": 1.0}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 7,
}
PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "caption_channels": 20,
    "sample_size": 8,
}
ALPHA_1024 = {"use_additional_conditions": True, "interpolation_scale": 2}
SD3 = {
    "medium": {
        "sample_size": 8,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 24,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 12,
    },
}
SD3["medium35"] = SD3["medium"] | {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
SD3["large35"] = SD3["medium"] | {
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 8,
    "qk_norm": "rms_norm",
}
FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "axes_dims_rope": (4, 14, 14),
    "guidance_embeds": True,
}
FLUX2 = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (8, 8, 8, 8),
    "guidance_embeds": False,
}
KL_FLUX2 = KL | {"latent_channels": 4}
TEXT = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "projection_dim": 16,
    "bos_token_id": 98,
    "eos_token_id": 99,
}
CLIP_L = TEXT | {"hidden_act": "quick_gelu"}
CLIP_H = TEXT | {"hidden_act": "gelu"}
CLIP_G = CLIP_H | {"hidden_size": 96}  # beside CLIP_L's 64: readers of single files tell the two apart by it


def randomise(model):
    """Every parameter drawn by its name."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(sd_tiny.draw(name, tuple(p.shape))))
    return model.eval()


def randomise_statistics(model):
    """Running statistics drawn by their names, as `randomise` draws parameters."""
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(torch.from_numpy(sd_tiny.draw(name, tuple(buffer.shape))))
    return model


def flux(model, x, t, context, pooled, guidance=None):
    """FLUX.1's prediction at latents [n, h, w, c], with the packing and the places of its pipeline."""
    (n, height, width, channels), length = x.shape, context.shape[1]
    tokens = FluxPipeline._pack_latents(nchw(x), n, channels, height, width)
    places = FluxPipeline._prepare_latent_image_ids(n, height // 2, width // 2, "cpu", torch.float32)
    t, context, pooled = (torch.from_numpy(np.array(a)) for a in (t, context, pooled))
    with torch.no_grad():
        y = model(
            tokens,
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=t,
            img_ids=places,
            txt_ids=torch.zeros(length, 3),
            guidance=None if guidance is None else torch.from_numpy(np.array(guidance)),
        ).sample
    return nhwc(FluxPipeline._unpack_latents(y, 8 * height, 8 * width, 8))


def flux2(model, x, t, context, guidance=None):
    """FLUX.2's prediction at latents [n, h, w, c], with the places of its pipeline."""
    latents, context = nchw(x), torch.from_numpy(np.array(context))
    places = Flux2KleinPipeline._prepare_latent_ids(latents)
    with torch.no_grad():
        y = model(
            Flux2KleinPipeline._pack_latents(latents),
            encoder_hidden_states=context,
            timestep=torch.from_numpy(np.array(t)),
            img_ids=places,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(context),
            guidance=None if guidance is None else torch.from_numpy(np.array(guidance)),
        ).sample
    return nhwc(Flux2KleinPipeline._unpack_latents_with_ids(y, places, *latents.shape[2:]))


def text_encoder(config, projection=False):
    cls = CLIPTextModelWithProjection if projection else CLIPTextModel
    return randomise(cls(CLIPTextConfig(**config)))


FAMILIES = {
    "sd1": lambda: {
        "unet": randomise(UNet2DConditionModel(**SD1_UNET | {"cross_attention_dim": 64})),
        "vae": randomise(AutoencoderKL(**KL)),
        "text_encoder": text_encoder(CLIP_L | {"eos_token_id": 2}),
    },
    "sd2": lambda: {
        "unet": randomise(UNet2DConditionModel(**SD2_UNET | {"cross_attention_dim": 64})),
        "vae": randomise(AutoencoderKL(**KL)),
        "text_encoder": text_encoder(CLIP_H),
    },
    "sdxl": lambda: {
        "unet": randomise(UNet2DConditionModel(**SDXL_UNET | {"cross_attention_dim": 160})),
        "vae": randomise(AutoencoderKL(**KL | {"scaling_factor": 0.13025})),
        "text_encoder": text_encoder(CLIP_L),
        "text_encoder_2": text_encoder(CLIP_G, projection=True),
    },
    "ldm": lambda: {
        "unet": randomise(UNet2DModel(**LDM_UNET)),
        "vqvae": randomise(VQModel(**VQ)),
    },
}


def nchw(x):
    return torch.from_numpy(np.array(np.moveaxis(np.asarray(x), -1, 1)))


def nhwc(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def exact_sqrt():
    """While it lasts, torch's square root is the correctly rounded one; its vectorised one, by processor, is not."""
    return mock.patch.object(torch.Tensor, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.numpy())))


def relative(ours, theirs):
    """Largest difference over the largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()
