"""`mmdjax.sd.load`: a pipeline and its parameters from disk or the hub."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mmdjax._core.extras import optional
from mmdjax.checkpoint import read_json
from mmdjax.sd.convert import to_device
from mmdjax.sd.files import open_file
from mmdjax.sd.models import Component, load_models, local_path
from mmdjax.sd.pipeline import TOKENIZERS, Pipeline
from mmdjax.sd.prompts import ENCODERS
from mmdjax.sd.scheduler import Scheduler, in_place
from mmdjax.sd.spellings import respelled, said_of_sampling
from mmdjax.sd.tokenizer import Tokenizer, load_tokenizer

SD_SCHEDULER = {  # of single files, which have none
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
LDM_SCHEDULER = SD_SCHEDULER | {"beta_start": 0.0015, "beta_end": 0.0195, "set_alpha_to_one": True, "steps_offset": 0}


def load(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    variant: str | Mapping[str, str] | None = None,
    flash: bool = False,
    remat: bool = False,
    put: Callable = to_device,
    ema: bool = False,
    configs: Mapping[str, Mapping] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    tokenizer: str | Path | Mapping[str, str | Path] | None = None,
    clip_skip: int | None = None,
    allow_unused: str | Sequence[str] = (),
    progress: bool = False,
) -> tuple[Pipeline, dict[str, Any]]:
    """A pipeline and its parameters, by component, from disk or the hub.

    Args:
      path: a folder of diffusers, a folder that `Pipeline.save` wrote, a single file, or a hub id.
      dtype: the dtype that the networks compute in.
      param_dtype: cast parameters to this dtype, all or by component, such as {"unet": jnp.bfloat16}; None: as stored.
      variant: "fp16" for the half-precision files of a folder; by part, such as {"unet": "fp16"}.
      flash, remat: see `mmdjax.sd.layers.Block`.
      put: a function for each array of parameters, such as a `jax.device_put` to a sharding.
      ema: take the moving average of a single file's U-Net.
      configs: config.json of a single file's components, in place of what its shapes say.
      scheduler: settings in place of those in scheduler_config.json. With "_class_name", that class takes the place of
        the file's: the noise and the prediction are kept, spaced sigmas (Karras') are not. A single file of Stable
        Diffusion 2 needs its "prediction_type", unless its metadata say it.
      tokenizer: a folder with the vocabulary, or one for each text encoder; single files have none. None: the model's.
      clip_skip, allow_unused: see `mmdjax.sd.load_models`.
      progress: show a bar for each network.
    Returns:
      (pipeline, params), params a dictionary by component.
    Raises:
      FileNotFoundError, CheckpointError, ValueError: see `mmdjax.sd.load_models` and `Pipeline`.
    """
    path = local_path(path, variant)
    if tokenizer is not None or any((path / folder).is_dir() for folder in TOKENIZERS.values()):
        optional("tokenizers", "sd", "to read prompts")  # missing, it is better told before the weights are read
    found = load_models(
        path,
        variant=variant,
        dtype=dtype,
        param_dtype=param_dtype,
        flash=flash,
        remat=remat,
        put=put,
        ema=ema,
        configs=configs,
        clip_skip=clip_skip,
        allow_unused=allow_unused,
        progress=progress,
    )
    pipeline = assemble(path, found, scheduler=scheduler, tokenizer=tokenizer)
    return pipeline, {name: component.params for name, component in found.items()}


def assemble(
    path: str | Path,
    found: Mapping[str, Component],
    *,
    scheduler: Mapping[str, Any] | None = None,
    tokenizer: str | Path | Mapping[str, str | Path] | None = None,
    vocabularies: bool = True,
) -> Pipeline:
    """The pipeline of networks that `load_models` found at a path, with the scheduler and vocabularies there.

    See `load`. With vocabularies=False none is read, and the pipeline cannot encode prompts.
    """
    path = Path(path)
    modules = {name: component.module for name, component in found.items()}
    raw = _scheduler_config(path, modules.get("unet"), scheduler or {})
    index = path / "model_index.json"
    return Pipeline(
        modules,
        {name: component.config for name, component in found.items()},
        Scheduler(raw),
        _tokenizers(path, tuple(modules), tokenizer) if vocabularies else {},
        read_json(index) if index.exists() else {},
    )


def _scheduler_config(path: Path, unet: Any, override: Mapping[str, Any]) -> dict[str, Any]:
    file = path / "scheduler" / "scheduler_config.json"
    if file.exists():
        return in_place(read_json(file), override)
    if not path.is_file():
        if "_class_name" in override:
            return dict(override)
        raise FileNotFoundError(
            f"{path.name}: no scheduler/scheduler_config.json, which says how noise was added; give its settings: "
            'load(..., scheduler={"_class_name": "DDIMScheduler", ...})'
        )
    if unet is None or not hasattr(unet.config, "cross_attention_dim"):
        return in_place(LDM_SCHEDULER, override)
    override = said_of_sampling(respelled(open_file(path)), override)
    second = unet.config.use_linear_projection and unet.config.addition_embed_type is None
    if second and "prediction_type" not in override:
        raise ValueError(
            f"{path.name}: Stable Diffusion 2's models of noise and of velocity have the same shapes; give "
            'load(..., scheduler={"prediction_type": "epsilon"}) for the base model, "v_prediction" for the 768 one'
        )
    return in_place(SD_SCHEDULER, override)


def _tokenizers(path: Path, components: tuple[str, ...], given: Any) -> dict[str, Tokenizer]:
    found = {}
    for name in ENCODERS:
        own = path / TOKENIZERS[name]
        folder = given.get(name) if isinstance(given, Mapping) else given
        if name in components and (folder is not None or own.is_dir()):
            found[name] = load_tokenizer(own if folder is None else folder)
    return found
