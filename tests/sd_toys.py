"""Tiny models of Stable Diffusion's kinds, of random weights and without torch."""

import json
from pathlib import Path

import sd_tiny

from mmdjax.sd.models import export

UNCONDITIONAL = {
    "_class_name": "UNet2DModel",
    "sample_size": 4,
    "block_out_channels": [32, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
}
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
SIGNS = [chr(b) for b in PRINTABLE] + [chr(256 + i) for i in range(256 - len(PRINTABLE))]
MERGES = ["c a", "ca t</w>", "d o", "do g</w>"]


def write_tokenizer(folder, *, length=77, pad="<|endoftext|>"):
    """A vocabulary of 518: bytes, the same at the end of a word, "ca", "cat", "do", "dog", start, end."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = SIGNS + [sign + "</w>" for sign in SIGNS] + [merge.replace(" ", "") for merge in MERGES]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8")
    config = {"model_max_length": length, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


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
        write_tokenizer(folder / "tokenizer", length=8)
    export(folder, {name: sd_tiny.component(config, prefix=prefix) for name, config in raw.items()})
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder
