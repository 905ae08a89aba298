"""Reference packs: encoded references in one file, to be shared without the pictures.

A pack is a safetensors file: "latents" [m, h, w, k]; with prompts also "index" [m] into the conditions of the distinct
prompts, "cond.context" and "cond.pooled". Its metadata holds the distinct prompts, a hash of the networks that encoded
it, so that it is not used with another model, and a hash of all of this, so that damage is found.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmdjax._files.fingerprint import arrays_hash, sha256, tree_bytes
from mmdjax._points.particles import Particles
from mmdjax.checkpoint import CheckpointError, Entry, open_safetensors, write_safetensors
from mmdjax.sd.pipeline import Pipeline
from mmdjax.sd.text.prompts import rows
from mmdjax.tree import short_repr

FORMAT = "mmdjax references 1"
DECODERS = ("decoder", "post_quant_conv", "quantize")  # what latents do not depend on


@dataclasses.dataclass(frozen=True, eq=False)
class ReferencePack:
    """m encoded references; made by `encode_references` or `load_references`.

    Args:
      latents: [m, h, w, k], the posterior's means, scaled.
      model: the hash of the networks that encoded it; see `identity`.
      prompts: the distinct prompts; None if there are none.
      index: [m], the prompt of each reference.
      cond: the condition of each distinct prompt.
    """

    latents: Float[Array | np.ndarray, "m h w k"]
    model: str
    prompts: tuple[str, ...] | None = None
    index: Int[np.ndarray, " m"] | None = None
    cond: Mapping[str, Any] | None = None

    __repr__ = short_repr

    def particles(self) -> Particles:
        """The references for `guided_sample`, with their conditions if there are prompts."""
        cond = None if self.cond is None else rows(self.cond, self.index)
        return Particles(jnp.asarray(self.latents), cond)

    def without_prompts(self) -> "ReferencePack":
        """The same references without their prompts."""
        return dataclasses.replace(self, prompts=None, index=None, cond=None)

    def captions(self) -> list[str] | None:
        """The prompt of each reference."""
        if self.prompts is None or self.index is None:
            return None
        return [self.prompts[i] for i in self.index]

    @property
    def content(self) -> str:
        """The hash of its content."""
        texts = [FORMAT, self.model, json.dumps(self.prompts)]
        return arrays_hash(self._arrays(), *texts)

    def check(self, pipeline: Pipeline, params: Any) -> None:
        """Raise ValueError unless the pack was encoded by the same networks as this model's."""
        if self.model != identity(pipeline, params, prompts=self.prompts is not None):
            parts = "autoencoder and text encoders" if self.prompts is not None else "autoencoder"
            raise ValueError(
                f"this pack of {len(self.latents)} references was encoded by another model (its {parts} hash to "
                f"{self.model[:12]}…); encode the pictures again with this one, or load the same weights, cast alike"
            )

    def save(self, path: str | Path) -> None:
        """Write the pack, a safetensors file."""
        arrays = self._arrays()
        entries = {key: Entry(x.shape, x.dtype, lambda x=x: x) for key, x in arrays.items()}
        metadata = {"format": FORMAT, "model": self.model, "prompts": json.dumps(self.prompts), "content": self.content}
        write_safetensors(path, entries, metadata)

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {"latents": self.latents, "index": self.index}
        arrays |= {f"cond.{key}": leaf for key, leaf in (self.cond or {}).items()}
        return {key: np.asarray(leaf) for key, leaf in arrays.items() if leaf is not None}


def encode_references(
    pipeline: Pipeline,
    params: Any,
    images: Float[Array | np.ndarray, "m h w c"] | Iterable,
    prompts: str | Sequence[str] | None = None,
    *,
    batch_size: int | None = None,
) -> ReferencePack:
    """Encode references once: pictures by the autoencoder (its mean, scaled), prompts by the text encoders.

    Args:
      images: [m, h, w, c] in [−1, 1]; or an iterator of such batches, as `PictureFolder.batches` gives.
      prompts: one for each picture, or one for all; None: references without prompts.
      batch_size: pictures at a time; None: all.
    Raises:
      ValueError: another number of prompts than of pictures; see `Pipeline.encode_images` and `encode_prompts`.
    """
    if isinstance(images, jax.Array | np.ndarray):
        _check_prompts(prompts, len(images))
        images = (images,)
    latents = jnp.concatenate([pipeline.encode_images(params, batch, batch_size=batch_size) for batch in images])
    _check_prompts(prompts, len(latents))
    prompts = [prompts] * len(latents) if isinstance(prompts, str) else prompts
    model = identity(pipeline, params, prompts=prompts is not None)
    if prompts is None:
        return ReferencePack(latents, model)
    distinct = tuple(dict.fromkeys(prompts))
    index = np.array([distinct.index(prompt) for prompt in prompts], np.int32)
    return ReferencePack(latents, model, distinct, index, pipeline.encode_prompts(params, distinct))


def _check_prompts(prompts: Any, count: int) -> None:
    if prompts is not None and not isinstance(prompts, str) and len(prompts) != count:
        raise ValueError(
            f"there are {len(prompts)} prompts for {count} pictures; give one for each, one for all, or None"
        )


def load_references(path: str | Path, pipeline: Pipeline | None = None, params: Any = None) -> ReferencePack:
    """A pack from its file.

    Args:
      pipeline: the model to use it with, which is checked; None: no check.
      params: the model's parameters.
    Raises:
      FileNotFoundError: no such file.
      CheckpointError: the file is damaged, or not a pack.
      ValueError: the pack was encoded by another model.
    """
    path = Path(path)
    file = open_safetensors(path)
    if file.metadata.get("format") != FORMAT or "latents" not in file:
        raise CheckpointError(
            f"{path.name} is of format {file.metadata.get('format')!r}, not {FORMAT!r}; make one with encode_references"
        )
    try:
        prompts = json.loads(file.metadata.get("prompts", "null"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: its prompts are not JSON") from error
    if prompts is not None and not isinstance(prompts, list):
        raise CheckpointError(f"{path.name}: its prompts are not a list")
    pack = ReferencePack(
        file["latents"],
        file.metadata.get("model", ""),
        None if prompts is None else tuple(prompts),
        file.get("index"),
        {key.removeprefix("cond."): jnp.asarray(file[key]) for key in file if key.startswith("cond.")} or None,
    )
    if pack.content != file.metadata.get("content"):
        raise CheckpointError(f"{path.name} is damaged: its content does not match its hash; fetch it again")
    if pipeline is not None:
        pack.check(pipeline, params)
    return pack


def identity(pipeline: Pipeline, params: Any, *, prompts: bool = True) -> str:
    """A hash of all that latents (and with `prompts` conditions) depend on: weights, scaling and vocabulary.

    It does not include the U-Net and the decoder, so that models with the same encoder share packs. It depends on the
    precision of the parameters, but not on that of the computation.
    """
    name = next(name for name in ("vae", "vqvae") if name in pipeline.modules)
    config = pipeline.autoencoder.config
    said = [type(config).__name__, config.scaling_factor, getattr(config, "shift_factor", None)]
    parts: list[Any] = [{key: tree for key, tree in params[name].items() if key not in DECODERS}]
    if prompts:
        said += [pipeline.tokenizers[encoder].encoding.to_str() for encoder in pipeline.encoders]
        parts += [params[encoder] for encoder in pipeline.encoders]
        skips = [getattr(pipeline.modules[encoder].config, "clip_skip", 0) for encoder in pipeline.encoders]
        said += [skips] if any(skips) else []  # packs without it are as they were
    return sha256([json.dumps(said).encode(), *tree_bytes(parts)])
