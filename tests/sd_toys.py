"""Tiny models of Stable Diffusion's kinds, of random weights and without torch."""

import json
from pathlib import Path

import sd_tiny

from mmdjax.sd import tiny
from mmdjax.sd.models import export

UNCONDITIONAL = tiny.UNCONDITIONAL | {"sample_size": 4, "block_out_channels": [32, 32]}


def write_pipeline(folder, *, prefix="", unconditional=False):
    """A folder of diffusers: 4 × 4 latents of 8 × 8 pictures; prompts of 8 tokens, unless unconditional."""
    folder = Path(folder)
    scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}
    if unconditional:
        raw = {"unet": UNCONDITIONAL, "vqvae": sd_tiny.VQ | {"latent_channels": 3}}
    else:
        text = sd_tiny.TEXT | {"vocab_size": 518, "eos_token_id": 517}
        unet = sd_tiny.UNET | {"cross_attention_dim": 32, "sample_size": 4}
        raw = {"unet": unet, "vae": sd_tiny.VAE, "text_encoder": text}
        tiny.write_vocabulary(folder / "tokenizer", length=8)
    export(folder, {name: sd_tiny.component(config, prefix=prefix) for name, config in raw.items()})
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder
