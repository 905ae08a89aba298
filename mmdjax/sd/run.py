"""A run from prompts and references to a folder of pictures: what `mmdjax sample` does.

00000.png …          the samples
grid.png             the first of them
comparison.png       references as the autoencoder sees them, unguided and guided samples of the same noise
samples.safetensors  "latents" [n, h, w, k], "prompt" [n] (an index into run.json's), and "unguided" [n, h, w, k]
run.json             settings, versions, hashes, and the distances to the references before and after
parts                until the run is finished: the samples so far, from which the same call resumes (`mmdjax.runs`)
"""

import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from mmdjax._files.atomic import write_json, written_whole
from mmdjax._files.fingerprint import tree_hash
from mmdjax._files.lock import NAME as LOCK
from mmdjax._files.lock import locked
from mmdjax._points.particles import Particles, num_present
from mmdjax.checkpoint import Entry, write_safetensors
from mmdjax.conditional import mmd2_by_condition
from mmdjax.guidance import MMDGuidance
from mmdjax.guidance.bound import fit_kernel
from mmdjax.kernels import Energy, Product
from mmdjax.metrics import energy_distance, nearest_distance
from mmdjax.mmd import mmd2
from mmdjax.plots import image_grid, save_labelled_grids
from mmdjax.provenance import provenance
from mmdjax.runs import sample_many
from mmdjax.samplers import DDIM, Sampler
from mmdjax.sd.pack import ReferencePack
from mmdjax.sd.pipeline import Pipeline
from mmdjax.sd.sample import REMEMBERED, check_size, decode_each, prepare
from mmdjax.sd.text.prompts import rows
from mmdjax.sd.text.tokenizer import FILES

IN_GRID, IN_COMPARISON = 64, 16  # pictures
SMALL = 64  # pixels: smaller pictures are enlarged in grids
PARTS, REPORT = "parts", "run.json"
AS_BEFORE = {  # options that a run.json of before them does not name
    "memory": REMEMBERED,
    "captions": "use",
    "avoid": None,
    "avoid_strength": 1.0,
    "avoid_radius": None,
    "embedded_guidance": None,
    "lora": {},
    "part": {},
    "textual_inversion": {},
    "scheduler": None,
    "clip_skip": None,
    "allow_unused": [],
}


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
    cfg_scale: float | None = None,
    embedded_guidance: float | None = None,
    num_steps: int = 50,
    sampler: Sampler = DDIM(eta=1.0),
    guidance: MMDGuidance = MMDGuidance(),
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 4,
    memory: int = REMEMBERED,
    compare: bool = True,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
    avoid: ReferencePack | None = None,
    avoid_strength: float = 1.0,
    avoid_radius: float | None = None,
) -> dict[str, Any]:
    """Sample a pipeline guided by references and write pictures and figures; see the top of this module.

    All batches have one size, and a memory of earlier samples, so that many small batches align as one large one would.
    If references and samples have prompts and the guidance has no kernel, it is `pipeline.kernel()`. If a run stops,
    repeat the call to resume it.

    Args:
      out: a folder that does not exist, is empty, or holds an unfinished run of these settings.
      refs: encoded references, or None: plain sampling.
      prompts: sample i takes prompt i modulo their number. (): the references' prompts in turn, else the empty prompt.
      negative: the negative prompt.
      cfg_scale: of classifier-free guidance; 1 is none; None: the usual one of the model's family, 7.5 for Stable
        Diffusion. Unused by models without prompts.
      embedded_guidance: see `Pipeline.model`.
      batch_size: the most samples that are made at once.
      memory: how many samples of earlier batches count as particles in the guidance of a batch; 0: none.
      compare: also make unguided samples from the same noise, in twice the time.
      settings: further entries of run.json. A folder with a finished run of equal settings is left as it is.
      progress: show bars. JAX's persistent compilation cache keeps the sampling program only without them.
      avoid: encoded pictures to keep away from, or None. They keep away the samples of prompts like their captions; all
        samples where either has none.
      avoid_strength, avoid_radius: as in `Avoid`, in latents.
    Returns:
      The contents of run.json.
    Raises:
      FileExistsError: `out` holds other files, or an unfinished run of other settings, which are listed.
      BlockingIOError: another process is using `out`.
      ValueError: see `check_settings` and `guided_sample`; num_samples or batch_size below 1, a negative memory.
      FloatingPointError: latents or pictures are not finite.
    """
    out, settings = Path(out), dict(settings or {})
    finished = check_out(out, settings)
    if finished is not None:
        return finished
    how = {"num_steps": num_steps, "prompts": prompts, "negative": negative, "height": height, "width": width}
    check_settings(pipeline, refs, avoid=avoid, **how)
    started = time.perf_counter()
    ready = prepare(
        pipeline,
        params,
        refs,
        num_samples=num_samples,
        guidance_scale=cfg_scale,
        embedded_guidance=embedded_guidance,
        guidance=guidance,
        batch_size=batch_size,
        memory=memory,
        avoid=avoid,
        avoid_strength=avoid_strength,
        avoid_radius=avoid_radius,
        **how,
    )
    guided, call = ready.guided, {**ready.call, "sampler": sampler, "progress": progress}
    prompts, cond, index, guidance = ready.prompts, ready.cond, ready.index, guided["guidance"]
    particles = guided["refs"]
    key, parts = jax.random.key(seed), out / PARTS

    def save_pictures(start, latents):
        missing = [i for i in range(len(latents)) if not _is_whole(out / f"{start + i:05d}.png")]
        for i, picture in zip(missing, decode_each(pipeline, params, latents[missing], progress), strict=True):
            save_picture(out / f"{start + i:05d}.png", picture)

    with locked(out):
        how = {**guided, **call, "each": save_pictures, "out": parts / "guided"}
        arrays = {"latents": np.asarray(sample_many(params, key, how.pop("refs"), **how))}
        if compare and (refs is not None or avoid is not None):
            arrays["unguided"] = np.asarray(sample_many(params, key, None, out=parts / "unguided", **call))
        arrays["prompt"] = index.astype(np.int32)
        pictures = np.stack([_read_picture(out / f"{i:05d}.png") for i in range(min(num_samples, IN_GRID))])
        shown = {"references": refs, "avoided": avoid}
        _save_grids(out, pipeline, params, shown, pictures, arrays.get("unguided"), progress)
        entries = {name: Entry(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}
        write_safetensors(out / "samples.safetensors", entries, {"format": "mmdjax samples 1"})
        report = {
            "settings": settings,
            "prompts": list(prompts),
            "batch_size": call["batch_size"],
            "cfg_scale": ready.guidance_scale,
            "references": None if refs is None else len(refs.latents),
            "avoided": None if avoid is None else len(avoid.latents),
            "distances": None if particles is None else _distances(guidance, particles, arrays, cond),
            "by_condition": particles is not None and guidance.base_kernel.splits_cond,
            "nearest_avoided": None if avoid is None else _nearest(avoid.particles(), arrays),
            "hashes": {
                "weights": tree_hash(params),
                "references": None if refs is None else refs.content,
                "avoided": None if avoid is None else avoid.content,
                "samples.safetensors": hashlib.sha256((out / "samples.safetensors").read_bytes()).hexdigest(),
            },
            "made_with": provenance(),
            "seconds": round(time.perf_counter() - started, 1),
        }
        write_json(out / REPORT, report)
        shutil.rmtree(parts)  # after run.json, which says that the run is finished
    return report


def check_settings(
    pipeline: Pipeline,
    refs: ReferencePack | None = None,
    *,
    num_steps: int,
    prompts: Sequence[str] = (),
    negative: str = "",
    height: int | None = None,
    width: int | None = None,
    avoid: ReferencePack | None = None,
) -> None:
    """The checks of `sample_to_folder` that need no weights; its arguments.

    Raises:
      ValueError: a size that the autoencoder does not divide, or that is not the references'; a scheduler that has no
        grid of so many steps; prompts for an unconditional model, or for text encoders without a vocabulary.
    """
    for name, pack in (("references", refs), ("pictures to avoid", avoid)):
        check_size(name, pack, pipeline.latent_shape(height, width), pipeline.autoencoder.config.downscale)
    pipeline.times(num_steps, height=height, width=width)
    said = [*prompts, *([negative] if negative else [])]
    if said and not pipeline.conditional:
        raise ValueError(f"this model is unconditional; leave out the prompts {said}")
    lacking = [name for name in pipeline.encoders if name not in pipeline.tokenizers]
    if pipeline.conditional and lacking:
        raise ValueError(f"no vocabulary for {', '.join(lacking)}; give --tokenizer a folder with {FILES}")


def check_out(out: str | Path, settings: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Check that a folder can take a run: the contents of run.json if the run is finished, else None.

    Args:
      out: the folder; nothing is written.
      settings: of the run; None: any run in the folder is an error.
    Raises:
      FileExistsError: `out` is a file, or holds something other than a run of these settings.
    """
    out = Path(out)
    resumes = settings is not None
    if not out.exists() or (out.is_dir() and all(resumes and path.name == LOCK for path in out.iterdir())):
        return None
    if settings is not None and (out / REPORT).is_file():
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
        before, now = (AS_BEFORE | said for said in (report["settings"], json.loads(json.dumps(dict(settings)))))
        if "cfg_scale" not in report and now.get("cfg_scale", 0) is None:  # written when the default had a number
            now["cfg_scale"] = 7.5
        if before == now:
            shutil.rmtree(out / PARTS, ignore_errors=True)  # left where it was interrupted in doing so itself
            return report
    elif settings is not None and (out / PARTS).is_dir():
        return None
    raise FileExistsError(f"{out} exists and is not an empty folder; nothing was overwritten. Give another --out")


def check_writable(out: str | Path) -> None:
    """Raise OSError if a file or folder of this name cannot be made; leaves nothing behind."""
    parent = Path(out).absolute()
    parent = parent if parent.is_dir() else parent.parent
    while not parent.exists():
        parent = parent.parent
    try:
        tempfile.TemporaryFile(dir=parent).close()  # permissions do not tell all: read-only disks, special file systems
    except OSError as error:
        message = f"nothing can be written there ({error.strerror}); give another --out"
        raise OSError(error.errno, message, str(parent)) from error


def save_picture(path: Path, picture: Float[Array | np.ndarray, "h w c"]) -> None:
    """One picture in [−1, 1] as a PNG file."""
    with written_whole(path) as partial:
        image_grid(picture[None], columns=1, margin=0).save(partial, format="PNG")


def _is_whole(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            picture.verify()
    except (OSError, SyntaxError):  # missing or damaged, in Pillow's words
        return False
    return True


def _read_picture(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture, np.float32) / 127.5 - 1


def _save_grids(out, pipeline, params, packs, pictures, unguided, progress) -> None:
    columns = math.ceil(math.sqrt(len(pictures)))
    scale = max(1, SMALL // pictures.shape[2])
    with written_whole(out / "grid.png") as partial:
        image_grid(pictures, columns=columns, scale=scale, margin=2).save(partial, format="PNG")
    if unguided is None:
        return
    pairs = {title: pack.latents for title, pack in packs.items() if pack is not None} | {"unguided": unguided}
    grids = {title: np.stack(decode_each(pipeline, params, x[:IN_COMPARISON], progress)) for title, x in pairs.items()}
    save_labelled_grids(out / "comparison.png", {**grids, "guided": pictures[:IN_COMPARISON]}, columns=4, scale=scale)


def _distances(guidance: MMDGuidance, refs: Particles, arrays: Mapping[str, np.ndarray], cond: Any) -> dict[str, Any]:
    """The energy distance and MMD² (by the guidance's kernel) to the references, in latents, unbiased.

    With a kernel that compares prompts they are those at each prompt, of the samples whose prompt others share; None if
    there are none. Empty if there is only one sample or reference, for which they are undefined.
    """
    found = {}
    if min(len(arrays["latents"]), num_present(refs)) < 2:
        return found
    kernel = fit_kernel(guidance, refs)
    for name, x in _before_and_after(arrays):
        samples = Particles(jnp.asarray(x), None if cond is None else rows(cond, arrays["prompt"]))
        if isinstance(kernel, Product):
            energy = Product(x=Energy(), cond=kernel.cond)
            both = (mmd2_by_condition(each, samples, refs) for each in (energy, kernel))
        else:
            both = energy_distance(samples.x, refs.x), mmd2(kernel, samples, refs, estimator="u")
        figures = dict(zip(("energy_distance", "mmd2"), map(float, both), strict=True))
        found[name] = {key: None if math.isnan(value) else value for key, value in figures.items()}
    return found


def _nearest(avoided: Particles, arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """How near samples come to the pictures to avoid: the least and the median of their distances to the nearest."""
    found = {}
    for name, x in _before_and_after(arrays):
        near = np.asarray(nearest_distance(x, avoided.x))
        found[name] = {"least": float(near.min()), "median": float(np.median(near))}
    return found


def _before_and_after(arrays: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    both = ("before", arrays.get("unguided")), ("after", arrays["latents"])
    return [(name, x) for name, x in both if x is not None]
