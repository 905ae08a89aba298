"""Stable Diffusion 1.5 at full size with random weights: its configurations, and checkpoints of it on disk."""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from common import normal
from flax.traverse_util import unflatten_dict

from mmdjax.checkpoint import write_safetensors
from mmdjax.sd.files import compvis, convert
from mmdjax.sd.models import Component, export, module_from_config, save

CONFIGS: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    },
    "text_encoder": {
        "architectures": ["CLIPTextModel"],
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "eos_token_id": 2,
    },
}
PREFIXES = {  # of a single file
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a parameter of PyTorch's name and shape.

    Weights have variance one over the fan-in, norms' scales are 1 ± .3 and biases ± .2: activations keep their size and
    no layer is without effect.
    """
    noise = normal(zlib.crc32(key.encode()), *shape)
    if len(shape) > 1 and "embeddings" not in key:
        noise *= np.prod(shape[1:]) ** -0.5
    elif len(shape) == 1:
        noise = 1 + 0.3 * noise if key.endswith("weight") else 0.2 * noise
    return noise


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A parameter that is drawn when it is asked for: nothing of the model is held."""

    key: str
    leaf: str
    shape: tuple[int, ...]
    dtype: Any

    def __array__(self, dtype=None, copy=None):
        value = draw(self.key, convert.torch_shape(self.leaf, self.shape))
        return convert.to_flax(self.leaf, value.astype(self.dtype if dtype is None else dtype))


def component(name: str, dtype: Any = np.float32) -> Component:
    """A network whose parameters are `Drawn`."""
    module = module_from_config(CONFIGS[name])
    tree = convert.abstract(module)
    leaves, keys = convert.flat(tree), convert.keys(tree)
    params = {path: Drawn(key, path[-1], leaves[path].shape, np.dtype(dtype)) for key, path in keys.items()}
    return Component(module, unflatten_dict(params), CONFIGS[name])


def write_folder(path: Path, dtype: Any = np.float32) -> None:
    """As diffusers keeps a model."""
    export(path, {name: component(name, dtype) for name in CONFIGS})
    _write_scheduler(path)


def write_saved(path: Path, dtype: Any = np.float32) -> None:
    """As `mmdjax.sd` saves one: Flax's layout."""
    save(path, {name: component(name, dtype) for name in CONFIGS})
    _write_scheduler(path)


def write_single(path: Path, dtype: Any = np.float32) -> None:
    """As one file in CompVis's naming."""
    entries = {}
    for name, prefix in PREFIXES.items():
        module, params, _ = component(name, dtype)
        mine = convert.params_to_torch(params)
        entries |= {prefix + source.key: mine[key] for key, source in compvis.sources(module, mine).items()}
    write_safetensors(path, entries)


def _write_scheduler(path: Path) -> None:
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
