"""Tiny models with random weights in the layout of diffusers, to try things without a checkpoint.

They have all parts of the real ones and run anywhere in seconds. Their pictures are noise.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

from mmdjax.sd.families.unets import SD_SCHEDULER
from mmdjax.sd.files import convert
from mmdjax.sd.models import Component, module_from_config
from mmdjax.sd.pipeline import Pipeline
from mmdjax.sd.scheduler import Scheduler
from mmdjax.sd.text.tokenizer import END, START, load_tokenizer

# CLIP's way to write any byte as a letter: printable ones stand for themselves
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = [chr(b) for b in PRINTABLE] + [chr(256 + i) for i in range(256 - len(PRINTABLE))]
MERGES = ("c a", "ca t</w>", "d o", "do g</w>")

UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
UNCONDITIONAL = {
    "_class_name": "UNet2DModel",
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
}
LABELS = {
    "_class_name": "DiTTransformer2DModel",
    "sample_size": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "out_channels": 8,
    "num_embeds_ada_norm": 3,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
VQVAE = VAE | {"_class_name": "VQModel", "latent_channels": 3, "num_vq_embeddings": 64}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
}


def write_tiny(folder: str | Path, *, unconditional: bool = False, labels: bool = False, seed: int = 0) -> Path:
    """Write a model of 32 × 32 pictures with random weights, like Stable Diffusion.

    Args:
      unconditional: like an unconditional latent model instead.
      labels: like a DiT of three classes, "cat", "dog" and "bird".
    Returns:
      The folder, which `mmdjax.sd.load` and diffusers read.

    Example:
      >>> import tempfile
      >>> from mmdjax.sd import load
      >>> pipeline, params = load(write_tiny(tempfile.mkdtemp()))
      >>> pipeline.latent_shape()
      (16, 16, 4)
    """
    folder = Path(folder)
    configs = {"unet": UNCONDITIONAL, "vqvae": VQVAE}
    tokenizers, index = {}, {}
    if labels:
        configs = {"transformer": LABELS, "vae": VAE}
        index = {"_class_name": "DiTPipeline", "id2label": {"0": "cat", "1": "dog", "2": "bird"}}
    elif not unconditional:
        size = write_vocabulary(folder / "tokenizer")
        tokenizers = {"text_encoder": load_tokenizer(folder / "tokenizer")}
        text = TEXT | {"vocab_size": size, "eos_token_id": size - 1}
        configs = {"unet": UNET, "vae": VAE, "text_encoder": text}
    parts = {name: _random(raw, seed) for name, raw in configs.items()}
    modules = {name: part.module for name, part in parts.items()}
    pipeline = Pipeline(modules, configs, Scheduler(SD_SCHEDULER), tokenizers, index)
    pipeline.export(folder, {name: part.params for name, part in parts.items()})
    return folder


def write_vocabulary(folder: str | Path, *, merges: Iterable[str] = MERGES, length: int = 77, pad: str = END) -> int:
    """Write a vocabulary like CLIP's: bytes, bytes at the end of a word, the results of the merges, start and end.

    Args:
      merges: pairs "a b" to merge, in this order; "</w>" marks the end of a word.
      length: of a row of ids.
      pad: the padding token.
    Returns:
      Its size; the last id is the end's.
    """
    folder, merges = Path(folder), list(merges)
    folder.mkdir(parents=True, exist_ok=True)
    words = [*BYTES, *(sign + "</w>" for sign in BYTES), *(merge.replace(" ", "") for merge in merges), START, END]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    config = {"model_max_length": length, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(words)


def _random(raw: dict, seed: int) -> Component:
    # by numpy, not by the module's init: nothing to compile
    module, rng = module_from_config(raw), np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1] == "scale":
            return np.ones(leaf.shape, np.float32)
        if path[-1] == "bias":
            return np.zeros(leaf.shape, np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if path[-1] == "kernel" else 1
        return (rng.standard_normal(leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    leaves = convert.flat(convert.abstract(module))
    return Component(module, unflatten_dict({path: draw(path, leaf) for path, leaf in leaves.items()}), raw)
