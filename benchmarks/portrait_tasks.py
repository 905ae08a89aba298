"""Tasks in the latent space of the text-to-image model in examples/portraits, which has seen no glasses of any kind."""

import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from task import NUM_REFS, Draw, Task, split_pool

import mmdjax.sd
from mmdjax import DiffusionModel, Particles
from mmdjax.tree import pytree

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES / "faces"))

from drawn_portraits import WORN_BY, kind, read_accessories, read_sheet  # noqa: E402  # found through the line above

NUM_SAMPLES, NUM_STEPS = 100, 25  # a network call is costly


@functools.cache
def _loaded():
    return mmdjax.sd.load(EXAMPLES / "portraits", param_dtype=jnp.float32)


@pytree
class OnePrompt:
    """A text-to-image denoiser under one prompt; params: (the pipeline's, the prompt's encoding)."""

    denoiser: Any

    def __call__(self, params, x, level, cond):
        network, prompt = params
        prompt = jax.tree.map(lambda v: jnp.broadcast_to(v, (x.shape[0], *v.shape[1:])), jax.lax.stop_gradient(prompt))
        return self.denoiser(network, x, level, prompt)


@pytree
class Prompted:
    """A text-to-image denoiser of prompts that carry their group beside their encoding."""

    denoiser: Any

    def __call__(self, params, x, level, cond):
        return self.denoiser(params, x, level, {name: part for name, part in cond.items() if name != "group"})


def _decoded(x):
    pipeline, params = _loaded()
    return np.asarray(pipeline.decode(params, x))


@functools.cache
def _encoded(sheet):
    pipeline, params = _loaded()
    return np.asarray(pipeline.encode_images(params, read_sheet(sheet).images))


def portraits_sunglasses() -> Task:
    """Everyone wears sunglasses; sampled with the empty prompt."""
    pipeline, params = _loaded()
    return Task(
        "portraits: sunglasses",
        DiffusionModel(OnePrompt(pipeline.denoiser), pipeline.schedule, pipeline.latent_shape()),
        ({"unet": params["unet"]}, pipeline.encode_prompts(params, [""])),
        functools.partial(split_pool, _encoded("sunglasses"), num_fresh=NUM_SAMPLES),
        num_samples=NUM_SAMPLES,
        num_steps=NUM_STEPS,
        methods="few",
        wanted=lambda x, groups: read_accessories(_decoded(x)) == "sunglasses",
        show=_decoded,
    )


def portraits_prompted() -> Task:
    """Prompts say the accessory without naming it: beards come with sunglasses, buns with glasses, the rest bare."""
    pipeline, params = _loaded()
    sheet, latents = read_sheet("mixed"), _encoded("mixed")
    group = np.searchsorted([*WORN_BY], kind(sheet.attributes)).astype(np.int32)
    encoded = jax.tree.map(np.asarray, pipeline.encode_prompts(params, sheet.prompts(accessory=False)))
    cond = encoded | {"group": group}
    rows = [np.flatnonzero(group == i) for i in range(len(WORN_BY))]

    def draw(seed, num_refs=NUM_REFS):
        parts = [split_pool(mine, seed, num_refs // 3, NUM_SAMPLES // 3) for mine in rows]
        return Draw(*(_take(latents, cond, np.concatenate(three)) for three in zip(*parts, strict=True)))

    def wanted(x, groups):
        return read_accessories(_decoded(x)) == np.array([*WORN_BY.values()])[groups]

    sampled = np.concatenate([np.resize(mine, NUM_SAMPLES // 3) for mine in rows])  # prompts, not pictures
    return Task(
        "portraits: accessory by prompt",
        DiffusionModel(Prompted(pipeline.denoiser), pipeline.schedule, pipeline.latent_shape()),
        {"unet": params["unet"]},
        draw,
        num_samples=len(sampled),
        num_steps=NUM_STEPS,
        methods="few",
        cond=jax.tree.map(lambda leaf: leaf[sampled], cond),
        group_of=lambda cond: cond["group"],
        kernel=pipeline.kernel(),
        wanted=wanted,
        show=_decoded,
    )


def _take(latents, cond, rows):
    return Particles(latents[rows], cond=jax.tree.map(lambda leaf: leaf[rows], cond))
