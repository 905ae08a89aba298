"""What a checkpoint is and how much memory it needs, for `mmdjax inspect`. No weights are read."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mmdjax._core.extras import installed
from mmdjax.checkpoint import CheckpointError, open_safetensors
from mmdjax.sd.files.convert import permitted, shape_of
from mmdjax.sd.files.lora import plan
from mmdjax.sd.models import Component, load_models, local_path
from mmdjax.sd.pack import FORMAT, load_references
from mmdjax.sd.pipeline import Pipeline
from mmdjax.sd.pretrained import assemble, with_tokens

GIB = 2**30


def describe(path: str | Path, *, batch_size: int | None = None, dtype: Any = jnp.float32, **how: Any) -> str:
    """A model or a reference pack in words: its networks, their parameters and memory, what it predicts and takes.

    Args:
      batch_size: compile the U-Net for this number of pictures, and report the memory that XLA reserves on this device.
      dtype: the dtype to compile it in.
      how: `variant`, `ema`, `configs`, `clip_skip`, `allow_unused` and `parts` of `load_models`; `scheduler`,
        `tokenizer`, `lora` and `textual_inversion` of `load`.
    Raises:
      FileNotFoundError, CheckpointError, ValueError: see `mmdjax.sd.load_models`; every key is checked.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors" and open_safetensors(path).metadata.get("format") == FORMAT:
        return _pack(path)
    path = local_path(path, how.get("variant"))
    rest = {name: how.pop(name) for name in ("scheduler", "tokenizer") if name in how}
    lora, inversion = (how.pop(name, None) or {} for name in ("lora", "textual_inversion"))
    permits = permitted(how.get("allow_unused", ()))
    found = load_models(path, put=shape_of, dtype=dtype, **how)
    lines = [str(path), "", *_table(found), "", *plan(lora, found, permits).said]
    if inversion:
        rest["tokenizer"], new = with_tokens(path, found, rest.get("tokenizer"), inversion)
        lines += [f"{', '.join(inversion)}: {len(rows.rows)} new vectors of {name}" for name, rows in new.items()]
    if len(found) == 1:
        return "\n".join([*lines, "one network, not a whole pipeline"])
    try:
        pipeline = assemble(path, found, **rest, vocabularies=installed("tokenizers"))
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        return "\n".join([*lines, f"not a whole pipeline: {error}"])
    lines += _properties(pipeline)
    if batch_size is not None:
        params = {name: component.params for name, component in found.items()}
        needed = _activations(pipeline, params, batch_size, dtype)
        lines.append(f"{pipeline.family.said}, {batch_size} pictures at once: {needed}")
    return "\n".join(lines)


def _table(found: Mapping[str, Component]) -> list[str]:
    lines = [f"{'network':16}{'class':22}{'parameters':>14}  {'stored as':12}{'bytes':>10}"]
    total, stored = 0, 0
    for name, component in found.items():
        leaves = jax.tree.leaves(component.params)
        count = sum(math.prod(leaf.shape) for leaf in leaves)
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
        dtypes = "/".join(sorted({leaf.dtype.name for leaf in leaves}))
        lines.append(f"{name:16}{type(component.module).__name__:22}{count:14,}  {dtypes:12}{_size(size):>10}")
        total, stored = total + count, stored + size
    lines.append(f"{'in all':38}{total:14,}  {'':12}{_size(stored):>10}")
    lines.append(f"parameters in memory: float32 {_size(4 * total)}, bfloat16 or float16 {_size(2 * total)}")
    return lines


def _properties(pipeline: Pipeline) -> list[str]:
    scheduler, down = pipeline.scheduler, pipeline.autoencoder.config.downscale
    lines = [f"predicts: {scheduler.prediction}, {scheduler.num_train_steps} levels ({scheduler.raw['_class_name']})"]
    try:
        height, width, channels = pipeline.latent_shape()
        lines.append(f"pictures: {height * down} × {width * down}, latents {height} × {width} × {channels}")
    except ValueError:
        lines.append(f"pictures: any multiple of {down} pixels (the config names no size)")
    if not pipeline.conditional:
        return [*lines, "prompts: none, unconditional"]
    lacking = [name for name in pipeline.encoders if name not in pipeline.tokenizers]
    note = f"; no vocabulary for {', '.join(lacking)}: give --tokenizer" if lacking else ""
    if not installed("tokenizers"):
        note = '; their vocabularies were not looked at: pip install "mmdjax[sd]"'
    return [*lines, f"prompts: through {', '.join(pipeline.encoders)}{note}"]


def _activations(pipeline: Pipeline, params: Any, batch_size: int, dtype: Any) -> str:
    shape = pipeline.latent_shape()
    x = jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32)
    cond = None
    if pipeline.conditional:
        shapes = pipeline.family.cond_shapes()
        cond = {k: jax.ShapeDtypeStruct((batch_size, *leaf.shape), leaf.dtype) for k, leaf in shapes.items()}

    def call(params, x, cond):
        return pipeline.model().denoise(params, x, pipeline.schedule(0.5), cond)

    needed = jax.jit(call).lower(params, x, cond).compile().memory_analysis()
    if needed is None:
        return "unknown on this device"
    name = jnp.dtype(dtype).name
    return f"{_size(needed.temp_size_in_bytes)} beside the parameters, in {name} on {jax.devices()[0].device_kind}"


def _pack(path: Path) -> str:
    pack = load_references(path)
    captions = pack.captions()
    prompts = f"{len(set(captions))} prompts, such as {captions[0]!r}" if captions else "no prompts"
    return "\n".join(
        [
            str(path),
            f"reference pack: {len(pack.latents)} references with latents {list(pack.latents.shape[1:])}, {prompts}",
            f"encoded by the model of hash {pack.model}",
            f"content {pack.content}",
        ]
    )


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
