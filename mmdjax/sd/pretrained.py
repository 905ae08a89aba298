"""`mmdjax.sd.load`: a pipeline and its parameters from disk or the hub."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mmdjax._core.extras import optional
from mmdjax.checkpoint import read_json
from mmdjax.sd.families import ENCODERS, TOKENIZERS, family_of
from mmdjax.sd.files.convert import permitted, shape_of, to_device
from mmdjax.sd.files.inversion import NewRows, add_tokens
from mmdjax.sd.files.lora import plan
from mmdjax.sd.files.places import open_file
from mmdjax.sd.files.spellings import respelled, said_of_sampling
from mmdjax.sd.flow import CLASS as FLOW_CLASS
from mmdjax.sd.flow import FlowScheduler
from mmdjax.sd.models import Component, load_models, local_path
from mmdjax.sd.pipeline import Pipeline
from mmdjax.sd.scheduler import Scheduler, in_place
from mmdjax.sd.text.fast_tokenizer import FastTokenizer
from mmdjax.sd.text.tokenizer import Tokenizer, load_tokenizer


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
    lora: Mapping[str | Path, float | Mapping[str, float]] | None = None,
    textual_inversion: Mapping[str, str | Path] | None = None,
    parts: Mapping[str, str | Path] | None = None,
) -> tuple[Pipeline, dict[str, Any]]:
    """A pipeline and its parameters, by component, from disk or the hub.

        pipeline, params = load("stable-diffusion-v1-5", dtype=jnp.bfloat16, lora={"style.safetensors": 0.8})

    Args:
      path: a folder of diffusers, a folder that `Pipeline.save` wrote, a single file, or a hub id.
      dtype: the dtype that the networks compute in.
      param_dtype: cast parameters to this dtype, all or by component, such as {"unet": jnp.bfloat16}; None: as stored.
      variant: "fp16" for the half-precision files of a folder; by part, such as {"unet": "fp16"}.
      flash, remat: see `mmdjax.sd.networks.layers.Block`.
      put: a function for each array of parameters, such as a `jax.device_put` to a sharding.
      ema: take the moving average of a single file's U-Net.
      configs: config.json of a single file's components, in place of what its shapes say.
      scheduler: settings in place of those in scheduler_config.json. With "_class_name", that class takes the place of
        the file's: the noise and the prediction are kept, spaced sigmas (Karras') are not. A single file of Stable
        Diffusion 2 needs its "prediction_type", unless its metadata say it.
      tokenizer: a folder with the vocabulary, or one for each text encoder; single files have none. None: the model's.
      clip_skip, allow_unused: see `mmdjax.sd.load_models`.
      progress: show a bar for each network.
      lora: strength of each LoRA, a file or PEFT's folder: a number, or numbers by component, such as {"unet": 0.8},
        which leave the others as they are. They are merged into the parameters, which take no more memory for it. See
        `mmdjax.sd.files.lora`.
      textual_inversion: file of each new token; "<cat>" in a prompt then stands for what was learnt. See
        `mmdjax.sd.files.inversion`.
      parts: folders of networks that a single file does not hold, such as {"vae": folder, "text_encoder_2": folder}.
    Returns:
      (pipeline, params), params a dictionary by component.
    Raises:
      FileNotFoundError, CheckpointError, ValueError: see `mmdjax.sd.load_models`, `Pipeline`,
        `mmdjax.sd.files.lora.plan` and `mmdjax.sd.files.inversion.add_tokens`.
    """
    path = local_path(path, variant)
    if tokenizer is not None or any((path / folder).is_dir() for folder in TOKENIZERS.values()):
        optional("tokenizers", "sd", "to read prompts")  # missing, it is better told before the weights are read
    new_rows: Mapping[str, NewRows] = {}
    if textual_inversion:
        how = {"variant": variant, "ema": ema, "configs": configs, "clip_skip": clip_skip}
        plain = load_models(path, allow_unused=allow_unused, parts=parts, put=shape_of, **how)
        tokenizer, new_rows = with_tokens(path, plain, tokenizer, textual_inversion)
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
        lora=lora,
        new_rows=new_rows,
        parts=parts,
    )
    pipeline = assemble(path, found, scheduler=scheduler, tokenizer=tokenizer)
    return pipeline, {name: component.params for name, component in found.items()}


def outline(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    variant: str | Mapping[str, str] | None = None,
    ema: bool = False,
    configs: Mapping[str, Mapping] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    tokenizer: str | Path | Mapping[str, str | Path] | None = None,
    clip_skip: int | None = None,
    allow_unused: str | Sequence[str] = (),
    lora: Mapping[Any, Any] | None = None,
    textual_inversion: Mapping[str, str | Path] | None = None,
    parts: Mapping[str, str | Path] | None = None,
) -> Pipeline:
    """The pipeline without its weights: every configuration, vocabulary and key is checked, in seconds. See `load`."""
    path = local_path(path, variant)
    found = load_models(
        path,
        parts=parts,
        variant=variant,
        dtype=dtype,
        ema=ema,
        configs=configs,
        clip_skip=clip_skip,
        allow_unused=allow_unused,
        put=shape_of,
    )
    plan(lora or {}, found, permitted(allow_unused))
    if textual_inversion:
        tokenizer, _ = with_tokens(path, found, tokenizer, textual_inversion)
    return assemble(path, found, scheduler=scheduler, tokenizer=tokenizer)


def with_tokens(
    path: str | Path, found: Mapping[str, Component], tokenizer: Any, textual_inversion: Mapping[str, str | Path]
) -> tuple[dict[str, Any], dict[str, NewRows]]:
    """The tokenizers of `load` with new tokens; see `mmdjax.sd.files.inversion.add_tokens`."""
    return add_tokens(textual_inversion, _tokenizers(Path(path), tuple(found), tokenizer), found)


def assemble(
    path: str | Path,
    found: Mapping[str, Component],
    *,
    scheduler: Mapping[str, Any] | None = None,
    tokenizer: str | Path | Mapping[str, str | Path | Tokenizer] | None = None,
    vocabularies: bool = True,
) -> Pipeline:
    """The pipeline of networks that `load_models` found at a path, with the scheduler and vocabularies there.

    See `load`. With vocabularies=False none is read, and the pipeline cannot encode prompts.
    """
    path = Path(path)
    modules = {name: component.module for name, component in found.items()}
    file = path / "scheduler" / "scheduler_config.json"
    raw = dict(scheduler or {})
    if file.exists():
        raw = in_place(read_json(file), raw)
    elif "_class_name" not in raw and not path.is_file():
        raise FileNotFoundError(
            f"{path.name}: no scheduler/scheduler_config.json, which says how noise was added; give its settings: "
            'load(..., scheduler={"_class_name": "DDIMScheduler", ...})'
        )
    elif path.is_file():
        family = family_of(modules)
        if family.component == "unet" and family.conditional:
            raw = said_of_sampling(respelled(open_file(path)), raw)
        raw = family.scheduler_config(raw, path.name)
    index = path / "model_index.json"
    return Pipeline(
        modules,
        {name: component.config for name, component in found.items()},
        FlowScheduler(raw) if raw.get("_class_name") == FLOW_CLASS else Scheduler(raw),
        _tokenizers(path, tuple(modules), tokenizer) if vocabularies else {},
        read_json(index) if index.exists() else {},
    )


def _tokenizers(path: Path, components: tuple[str, ...], given: Any) -> dict[str, Tokenizer | FastTokenizer]:
    found = {}
    for name in ENCODERS:
        own = path / TOKENIZERS[name]
        folder = given.get(name) if isinstance(given, Mapping) else given
        if name in components and (folder is not None or own.is_dir()):
            found[name] = (
                folder
                if isinstance(folder, Tokenizer | FastTokenizer)
                else load_tokenizer(own if folder is None else folder)
            )
    return found
