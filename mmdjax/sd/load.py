"""Loading and saving models: the architecture from config.json, the parameters by `mmdjax.sd.convert`."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from mmdjax.sd.checkpoint import CheckpointError
from mmdjax.sd.clip import CLIPText, CLIPTextConfig
from mmdjax.sd.convert import params_from_torch
from mmdjax.sd.files import open_folder
from mmdjax.sd.unet import UNet2D, UNet2DCondition, UNet2DConditionConfig, UNet2DConfig
from mmdjax.sd.vae import AutoencoderKL, AutoencoderKLConfig, VQModel, VQModelConfig

MODULES = (
    (UNet2DConditionConfig, UNet2DCondition),
    (UNet2DConfig, UNet2D),
    (AutoencoderKLConfig, AutoencoderKL),
    (VQModelConfig, VQModel),
    (CLIPTextConfig, CLIPText),
)


class Component(NamedTuple):
    """One network of a model: `module.apply({"params": params}, ...)`.

    Args:
      config: the whole of its config.json, for writing it again.
    """

    module: Any
    params: Any
    config: Mapping[str, Any]


def module_from_config(
    raw: Mapping[str, Any], *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, flash: bool = False
) -> nn.Module:
    """The module that a parsed config.json describes.

    Raises:
      ValueError: of a class or with settings that are not implemented; both are named.
    """
    name = class_name(raw)
    for config, module in MODULES:
        if name in config.CLASSES:
            return module(config.from_json(raw), dtype=dtype, param_dtype=param_dtype, flash=flash)
    known = sorted(name for config, _ in MODULES for name in config.CLASSES)
    raise ValueError(f"config.json is of {name!r}, which is not implemented; implemented: {', '.join(known)}")


def class_name(raw: Mapping[str, Any]) -> str | None:
    """What a config.json is of: diffusers' `_class_name`, or transformers' `architectures`."""
    return raw.get("_class_name") or (raw.get("architectures") or [None])[0]


def load_component(
    folder: str | Path,
    *,
    variant: str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    flash: bool = False,
    put: Callable = jnp.array,
) -> Component:
    """One model's folder: config.json and its weights."""
    folder = Path(folder)
    raw = read_config(folder)
    module: Any = module_from_config(raw, dtype=dtype, param_dtype=param_dtype or jnp.float32, flash=flash)
    params = params_from_torch(module, open_folder(folder, variant), param_dtype=param_dtype, put=put)
    return Component(module, params, raw)


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
      FileNotFoundError, CheckpointError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder.name}: no config.json, which says what the weights are")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{folder.name}/config.json is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{folder.name}/config.json is not a JSON object")
    return raw
