"""From prompts and references to samples: what `Pipeline.sample` and `mmdjax sample` have in common."""

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from mmdjax._core.progress import progress_bar
from mmdjax._points.particles import Particles
from mmdjax.guidance import MMDGuidance, default_kernel
from mmdjax.guidance.avoid import Avoid
from mmdjax.runs import sample_many
from mmdjax.samplers import Sampler
from mmdjax.sd.pack import ReferencePack, encode_references, load_references
from mmdjax.sd.pictures import open_pictures
from mmdjax.sd.text.prompts import rows
from mmdjax.tree import replace, short_repr

REMEMBERED = 1000  # samples of earlier batches that the later ones are guided around, unless told otherwise


class Prepared(NamedTuple):
    """What a run is made of.

    Args:
      call: model, conditions, sizes and time grid, for `sample_many`.
      guided: references, what to avoid, guidance and memory, likewise; none of them for plain sampling.
      prompts: the distinct prompts.
      cond: their conditions, or None.
      index: [n], the prompt of each sample.
      guidance_scale: of classifier-free guidance; 1: none.
    """

    call: dict[str, Any]
    guided: dict[str, Any]
    prompts: Sequence[str]
    cond: Any
    index: Int[np.ndarray, " n"]
    guidance_scale: float


def prepare(
    pipeline: Any,
    params: Any,
    refs: ReferencePack | None,
    *,
    num_samples: int,
    prompts: Sequence[str],
    negative: str,
    guidance_scale: float | None,
    embedded_guidance: float | None,
    num_steps: int,
    guidance: MMDGuidance,
    height: int | None,
    width: int | None,
    batch_size: int,
    memory: int,
    avoid: ReferencePack | None = None,
    avoid_strength: float = 1.0,
    avoid_radius: float | None = None,
) -> Prepared:
    """The arguments of `sample_many` for a pipeline; see `sample` and `sample_to_folder` for these ones.

    All batches have one size. Without prompts, the samples take those of the references in turn, else the empty prompt.
    If references and samples have prompts and the guidance has no kernel, it is `pipeline.kernel()`.

    Raises:
      ValueError: num_samples or batch_size below 1, a negative memory.
    """
    for name, value, least in (("num_samples", num_samples, 1), ("batch_size", batch_size, 1), ("memory", memory, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; give at least {least}")
    batches = math.ceil(num_samples / batch_size)
    cond, scale, guidance_scale = None, {}, _guidance_scale(pipeline, guidance_scale)
    if pipeline.conditional:
        prompts = prompts or (refs.captions() if refs is not None else None) or [""]
        cond = pipeline.encode_prompts(params, prompts)
        if guidance_scale != 1:
            null_cond = pipeline.encode_prompts(params, negative, negative=True)
            scale = {"guidance_scale": guidance_scale, "null_cond": null_cond}
    model = pipeline.model(height=height, width=width, embedded_guidance=embedded_guidance, **scale)
    particles = None if refs is None else refs.particles()
    avoided = None if avoid is None else avoid.particles()
    first: Particles | None = particles if particles is not None else avoided
    if first is not None and guidance.kernel is None and first.cond is not None and cond is not None:
        guidance = replace(guidance, kernel=pipeline.kernel())
    kept_off = None
    if avoided is not None:
        unlike = avoided.cond is None and avoid_radius is None and guidance.base_kernel.uses_cond
        kernel = default_kernel(guidance.at) if unlike else None
        kept_off = Avoid(avoided.x, avoided.cond, strength=avoid_strength, radius=avoid_radius, kernel=kernel)
    index = np.arange(num_samples) % max(len(prompts), 1)
    call = {
        "model": model,
        "num_samples": num_samples,
        "batch_size": math.ceil(num_samples / batches),
        "cond": None if cond is None else Conditions(cond, index),
        "times": pipeline.times(num_steps, height=height, width=width),
    }
    remembered = min(num_samples, memory) if first is not None and batches > 1 else 0
    guided = {"refs": particles, "avoid": kept_off, "guidance": guidance, "memory": remembered or None}
    return Prepared(call, guided, prompts, cond, index, guidance_scale)


def _guidance_scale(pipeline: Any, given: float | None) -> float:
    if not pipeline.conditional:
        return 1.0
    return pipeline.family.guidance_scale(pipeline.index) if given is None else given


def sample(
    pipeline: Any,
    params: Any,
    key: Array,
    prompts: str | Sequence[str],
    *,
    refs: Any,
    avoid: Any,
    num_samples: int | None,
    sampler: Sampler,
    batch_size: int,
    progress: bool,
    height: int | None,
    width: int | None,
    **how: Any,
) -> Float[np.ndarray, "n h w c"]:
    """See `Pipeline.sample`."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if prompts and not pipeline.conditional:
        raise ValueError(f"this model is unconditional; leave out the prompts {prompts}")
    size = {"height": height, "width": width}
    packs = {
        name: as_pack(pipeline, params, given, batch_size=batch_size, **size)
        for name, given in (("refs", refs), ("avoid", avoid))
    }
    ready = prepare(
        pipeline,
        params,
        packs["refs"],
        num_samples=max(len(prompts), 1) if num_samples is None else num_samples,
        prompts=prompts,
        batch_size=batch_size,
        avoid=packs["avoid"],
        **size,
        **how,
    )
    with tempfile.TemporaryDirectory() as folder:
        call = {**ready.guided, **ready.call, "sampler": sampler, "progress": progress}
        latents = np.asarray(sample_many(params, key, call.pop("refs"), out=Path(folder) / "samples", **call))
    return np.stack(decode_each(pipeline, params, latents, progress))


def as_pack(
    pipeline: Any,
    params: Any,
    given: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 4,
) -> ReferencePack | None:
    """References as a pack: a pack itself, its file, a folder of pictures, with captions or without, or [m, h, w, c].

    Raises:
      FileNotFoundError, CheckpointError, PictureError: a file or folder that cannot be used.
      ValueError: a pack of another model; pictures of another size than the samples.
    """
    if isinstance(given, str | Path):
        path = Path(given)
        if path.suffix == ".safetensors":
            given = load_references(path)
        else:
            config = pipeline.autoencoder.config
            folder = open_pictures(path, smallest=config.downscale)
            sides = [side * config.downscale for side in pipeline.latent_shape(height, width)[:2]]
            batches = folder.batches(*sides, channels=config.in_channels, batch_size=batch_size)
            captions = folder.captions if pipeline.conditional else None
            return encode_references(pipeline, params, batches, captions)
    if given is None:
        return None
    if not isinstance(given, ReferencePack):
        given = encode_references(pipeline, params, given, batch_size=batch_size)
    given.check(pipeline, params)
    check_size("references", given, pipeline.latent_shape(height, width), pipeline.autoencoder.config.downscale)
    return given


def check_size(name: str, pack: ReferencePack | None, shape: tuple[int, ...], down: int) -> None:
    """Raise ValueError if encoded pictures have another size than the samples."""
    if pack is not None and tuple(pack.latents.shape[1:]) != shape:
        theirs, ours = ([side * down for side in sides[:2]] for sides in (pack.latents.shape[1:], shape))
        raise ValueError(
            f"the {name} have {theirs[0]} × {theirs[1]} pixels but the samples {ours[0]} × {ours[1]}; encode the "
            "pictures again in the samples' size, or sample in theirs"
        )


def decode_each(pipeline: Any, params: Any, latents: Any, progress: bool) -> list[np.ndarray]:
    """The pictures of latents, one at a time."""
    one_by_one = progress_bar(range(len(latents)), desc="decoding", disable=not progress or not len(latents))
    return [np.asarray(pipeline.decode(params, latents[i : i + 1]))[0] for i in one_by_one]


@dataclasses.dataclass(frozen=True, eq=False)
class Conditions:
    """The conditions of samples, by the numbers of the samples, from the condition of each distinct prompt."""

    distinct: Any
    index: Int[np.ndarray, " n"]

    __repr__ = short_repr

    def __call__(self, samples: Int[np.ndarray, " b"]) -> Any:
        return rows(self.distinct, self.index[samples])
