"""Tiny random networks of our own, written as checkpoints: what the tests without torch load."""

import jax
import numpy as np

from mmdjax.sd import convert
from mmdjax.sd.load import Component, export, module_from_config

UNET = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
VQ = VAE | {"_class_name": "VQModel", "num_vq_embeddings": 16}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "eos_token_id": 49,
}


def component(raw, seed=0, **how):
    """A network of this config.json with parameters drawn, norms' too."""
    module = module_from_config(raw, **how)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        fan_in = leaf.size / leaf.shape[-1] if path[-1].key == "kernel" else 9.0
        value = noise / np.sqrt(fan_in) + (path[-1].key == "scale")
        return jax.numpy.asarray(value, leaf.dtype)

    return Component(module, jax.tree_util.tree_map_with_path(draw, convert.abstract(module)), raw)


def write(folder, raw, seed=0):
    """The network as a folder of diffusers, and the path of its weights."""
    export(folder.parent, {folder.name: component(raw, seed)})
    return next(folder.glob("*.safetensors"))
