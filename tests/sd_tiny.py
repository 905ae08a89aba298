"""Tiny random networks of our own, written as checkpoints: what the tests without torch load."""

import zlib

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from mmdjax.sd.files import convert
from mmdjax.sd.models import Component, export, module_from_config
from mmdjax.sd.tiny import VAE

UNET = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
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


def draw(key, shape):
    """The value of a parameter of PyTorch's name and shape: from its name alone, so that no file need hold it.

    Norms' scales and biases are drawn too: left at 1 and 0, they would hide a missing or swapped one.
    """
    rng = np.random.RandomState(zlib.crc32(key.encode()))
    noise = rng.standard_normal(shape)
    if "norm" in key and key.endswith("weight") and len(shape) == 1:
        noise = 1 + 0.3 * noise
    elif key.endswith("running_var"):
        noise = 0.5 + noise**2
    elif len(shape) == 1:
        noise = 0.2 * noise
    elif "embedding" not in key or "linear" in key:
        noise = noise / np.sqrt(np.prod(shape[1:]))
    return noise.astype(np.float32)


def component(raw, *, prefix="", **how):
    """A network of this config.json with parameters drawn by `draw`, of their names without the prefix."""
    module = module_from_config(raw, **how)
    tree = convert.abstract(module)
    leaves = convert.flat(tree)
    params = {}
    for key, path in convert.keys(tree).items():
        value = draw(key.removeprefix(prefix), convert.torch_shape(path[-1], leaves[path].shape))
        params[path] = jnp.array(convert.to_flax(path[-1], value))
    return Component(module, unflatten_dict(params), raw)


def write(folder, raw):
    """The network as a folder of diffusers, and the path of its weights."""
    export(folder.parent, {folder.name: component(raw)})
    return next(folder.glob("*.safetensors"))
