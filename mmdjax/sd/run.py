"""A run from prompts and references to a folder of pictures: what `mmdjax sample` does.

00000.png …          the samples
grid.png             the first of them
comparison.png       references as the autoencoder sees them, unguided and guided samples of the same noise
samples.safetensors  "latents" [n, h, w, k], "prompt" [n] (an index into run.json's), and "unguided" [n, h, w, k]
run.json             settings, versions, hashes, and the distances to the references before and after
"""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mmdjax.checkpoint import Entry, write_safetensors
from mmdjax.guidance import MMDGuidance, fit_kernel
from mmdjax.identity import tree_hash
from mmdjax.metrics import energy_distance
from mmdjax.mmd import mmd2
from mmdjax.particles import Particles
from mmdjax.plots import image_grid, save_labelled_grids
from mmdjax.provenance import provenance
from mmdjax.samplers import DDIM, Sampler
from mmdjax.sampling import guided_sample
from mmdjax.sd.pack import ReferencePack
from mmdjax.sd.pipeline import Pipeline
from mmdjax.sd.prompts import rows
from mmdjax.tree import replace
from mmdjax.whole import write_json, written_whole

IN_GRID, IN_COMPARISON = 64, 16  # pictures
SMALL = 64  # pixels: smaller pictures are enlarged in grids
REMEMBERED = 1000  # samples of earlier batches that the later ones are guided around


def sample_to_folder(
    out: str | Path,
    pipeline: Pipeline,
    params: Any,
    refs: ReferencePack | None,
    *,
    num_samples: int,
    seed: int = 0,
    prompts: Sequence[str] = (),
    negative: str = "",
    cfg_scale: float = 7.5,
    num_steps: int = 50,
    sampler: Sampler = DDIM(eta=1.0),
    guidance: MMDGuidance = MMDGuidance(),
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 4,
    compare: bool = True,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Sample a pipeline guided by references and write pictures and figures; see the top of this module.

    Batches are of one size and joined by a memory of the last 1,000 samples, so that many small batches align as one
    large one would. Where references and samples have prompts and the guidance names no kernel, it is
    `pipeline.kernel()`.

    Args:
      out: a folder that does not exist or is empty.
      refs: encoded references, or None: plain sampling.
      prompts: sample i takes prompt i modulo their number; (): those of the references, in turn, else the empty prompt.
      negative: the negative prompt.
      cfg_scale: of classifier-free guidance; 1 is none. Unused by models without prompts.
      batch_size: the most samples that are made at once.
      compare: sample without guidance, too, from the same noise: twice the time.
      settings: what else run.json should tell.
      progress: show bars.
    Returns:
      What run.json holds.
    Raises:
      FileExistsError: `out` has something in it.
      ValueError: prompts for a model without, num_samples or batch_size below 1, references of another size; see
        `guided_sample`.
      FloatingPointError: latents or pictures are not finite.
    """
    out = check_out(out)
    for name, value in {"num_samples": num_samples, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; give at least 1")
    _check_size(refs, pipeline.latent_shape(height, width), pipeline.autoencoder.config.downscale)
    started = time.perf_counter()
    prompts = _prompts(pipeline, refs, prompts)
    batches = math.ceil(num_samples / batch_size)
    batch_size = math.ceil(num_samples / batches)

    cond, null_cond = None, None
    if pipeline.conditional:
        cond = pipeline.encode_prompts(params, prompts)
        if cfg_scale != 1:
            null_cond = pipeline.encode_prompts(params, negative, negative=True)
    scale = {} if null_cond is None else {"guidance_scale": cfg_scale, "null_cond": null_cond}
    model = pipeline.model(height=height, width=width, **scale)
    particles = None if refs is None else refs.particles()
    if particles is not None and guidance.kernel is None and particles.cond is not None and cond is not None:
        guidance = replace(guidance, kernel=pipeline.kernel())

    compare = compare and particles is not None
    index = np.arange(batches * batch_size) % max(len(prompts), 1)
    memory: Any = min(num_samples, REMEMBERED) if particles is not None and batches > 1 else None
    made: dict[str, list[np.ndarray]] = {"latents": [], **({"unguided": []} if compare else {})}
    pictures: list[np.ndarray] = []
    for number in _bar(range(batches), "batches", progress and batches > 1):
        of_batch = slice(number * batch_size, min((number + 1) * batch_size, num_samples))
        call = {
            "model": model,
            "num_samples": batch_size,
            "cond": None if cond is None else rows(cond, index[number * batch_size :][:batch_size]),
            "sampler": sampler,
            "times": pipeline.times(num_steps),
            "progress": progress,
        }
        key = jax.random.fold_in(jax.random.key(seed), number)
        samples = guided_sample(params, key, particles, guidance=guidance, memory=memory, **call)
        memory = samples.memory
        kept = of_batch.stop - of_batch.start
        made["latents"].append(np.asarray(samples.x[:kept]))
        if compare:
            made["unguided"].append(np.asarray(guided_sample(params, key, None, **call).x[:kept]))
        decoded = _decode(pipeline, params, made["latents"][-1], progress)
        for position, picture in enumerate(decoded, start=of_batch.start):
            save_picture(out / f"{position:05d}.png", picture)
        pictures.extend(decoded[: IN_GRID - len(pictures)])

    arrays = {name: np.concatenate(parts) for name, parts in made.items()}
    arrays["prompt"] = index[:num_samples].astype(np.int32)
    _save_grids(out, pipeline, params, refs, np.stack(pictures), arrays.get("unguided"), progress)
    entries = {name: Entry(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}
    write_safetensors(out / "samples.safetensors", entries, {"format": "mmdjax samples 1"})
    report = {
        "settings": dict(settings or {}),
        "prompts": list(prompts),
        "batch_size": batch_size,
        "references": None if refs is None else len(refs.latents),
        "distances": None if particles is None else _distances(guidance, particles, arrays, cond),
        "hashes": {
            "weights": tree_hash(params),
            "references": None if refs is None else refs.content,
            "samples.safetensors": hashlib.sha256((out / "samples.safetensors").read_bytes()).hexdigest(),
        },
        "made_with": provenance(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(out / "run.json", report)
    return report


def check_out(out: str | Path) -> Path:
    """The folder, made where it does not exist.

    Raises:
      FileExistsError: it has something in it, or is a file.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder; nothing was overwritten. Give another --out")
    out.mkdir(parents=True, exist_ok=True)
    return out


def save_picture(path: Path, picture: Float[Array | np.ndarray, "h w c"]) -> None:
    """One picture in [−1, 1] as a PNG file."""
    with written_whole(path) as partial:
        image_grid(picture[None], columns=1, margin=0).save(partial, format="PNG")


def _prompts(pipeline: Pipeline, refs: ReferencePack | None, prompts: Sequence[str]) -> Sequence[str]:
    if not pipeline.conditional:
        if prompts:
            raise ValueError(f"this model is unconditional; leave out the prompts {list(prompts)}")
        return ()
    return prompts or (refs.captions() if refs is not None else None) or [""]


def _check_size(refs: ReferencePack | None, shape: tuple[int, ...], down: int) -> None:
    if refs is not None and tuple(refs.latents.shape[1:]) != shape:
        theirs, ours = ([side * down for side in sides[:2]] for sides in (refs.latents.shape[1:], shape))
        raise ValueError(
            f"the references are of {theirs[0]} × {theirs[1]} pixels but the samples of {ours[0]} × {ours[1]}; "
            "encode the pictures again in this size, or sample in theirs"
        )


def _bar(items: Any, label: str, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(items, desc=label, disable=not shown)


def _decode(pipeline: Pipeline, params: Any, latents: Any, progress: bool) -> list[np.ndarray]:
    one_by_one = _bar(range(len(latents)), "decoding", progress)
    return [np.asarray(pipeline.decode(params, latents[i : i + 1]))[0] for i in one_by_one]


def _save_grids(out, pipeline, params, refs, pictures, unguided, progress) -> None:
    columns = math.ceil(math.sqrt(len(pictures)))
    scale = max(1, SMALL // pictures.shape[2])
    with written_whole(out / "grid.png") as partial:
        image_grid(pictures, columns=columns, scale=scale, margin=2).save(partial, format="PNG")
    if unguided is None:
        return
    pairs = {"references": refs.latents, "unguided": unguided}
    grids = {title: np.stack(_decode(pipeline, params, x[:IN_COMPARISON], progress)) for title, x in pairs.items()}
    save_labelled_grids(out / "comparison.png", {**grids, "guided": pictures[:IN_COMPARISON]}, columns=4, scale=scale)


def _distances(guidance: MMDGuidance, refs: Particles, arrays: Mapping[str, np.ndarray], cond: Any) -> dict[str, Any]:
    """To the references, in latents, unbiased: the energy distance and MMD² by the guidance's kernel."""
    kernel = fit_kernel(guidance, refs)
    found = {}
    for name, x in (("before", arrays.get("unguided")), ("after", arrays["latents"])):
        if x is not None:
            samples = Particles(jnp.asarray(x), None if cond is None else rows(cond, arrays["prompt"]))
            found[name] = {
                "energy_distance": float(energy_distance(samples.x, refs.x)),
                "mmd2": float(mmd2(kernel, samples, refs, estimator="u")),
            }
    return found
