"""The small latent diffusion model of digits: its samples are digits, and guidance keeps styles with their prompts."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax import IMQ, MMDGuidance, guided_sample, mmd2
from mmdjax.digits import splits
from mmdjax.metrics import energy_distance
from mmdjax.sd import encode_references, load

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))
from prompt_aware_digits import FOLDER, styled_digits  # noqa: E402

EACH = 4  # samples of each prompt


@pytest.fixture(scope="module")
def loaded():
    return load(FOLDER, param_dtype=jnp.float32)


@pytest.fixture(scope="module")
def digits():
    return styled_digits(10, seed=0)


@pytest.fixture(scope="module")
def made(loaded, digits):
    """Latents [10 × EACH, ...] of "a zero", "a one", … by method, from one noise."""
    pipeline, params = loaded
    pictures = np.concatenate([refs for refs, _ in digits.values()])
    refs = encode_references(pipeline, params, pictures, np.repeat(list(digits), 10).tolist()).particles()
    cond = pipeline.encode_prompts(params, np.repeat(list(digits), EACH).tolist())
    null = pipeline.encode_prompts(params, "", negative=True)
    model = pipeline.model(guidance_scale=2.0, null_cond=null)
    how = {"model": model, "num_samples": 10 * EACH, "cond": cond, "times": pipeline.times(10)}
    methods = {
        "unguided": (None, MMDGuidance()),
        "plain": (refs, MMDGuidance()),
        "product": (refs, MMDGuidance(kernel=pipeline.kernel())),
    }
    return {
        name: guided_sample(params, jax.random.key(1), by, guidance=g, **how).x for name, (by, g) in methods.items()
    }


def test_samples_are_the_digits_that_were_asked_for(loaded, made):
    pipeline, params = loaded
    (images, labels), _ = splits()
    samples = np.asarray(pipeline.decode(params, made["unguided"])).mean(-1, keepdims=True)
    nearest = ((samples[:, None] - images[None]) ** 2).sum((2, 3, 4)).argmin(1)
    assert (labels[nearest] == np.repeat(np.arange(10), EACH)).mean() >= 0.9


def test_pictures_come_back(loaded):
    pipeline, params = loaded
    _, (held_out, _) = splits()
    pictures = held_out[:64].repeat(3, axis=-1)
    back = pipeline.decode(params, pipeline.encode_images(params, pictures))
    assert float(jnp.sqrt(jnp.mean((back - pictures) ** 2))) < 0.12  # of a range of 2; .085 in training


def test_guidance_keeps_styles_with_their_prompts(loaded, digits, made):
    pipeline, params = loaded
    found = {}
    for name, latents in made.items():
        images = pipeline.decode(params, latents)
        energy, distance = 0.0, 0.0
        for k, (_, fresh) in enumerate(digits.values()):
            mine, others = slice(k * EACH, (k + 1) * EACH), pipeline.encode_images(params, fresh)
            energy += float(energy_distance(images[mine], fresh)) / 10
            distance += float(mmd2(IMQ(2.0), latents[mine], others, estimator="u")) / 10
        found[name] = energy, distance
    for which in (0, 1):  # in pixels, in latents
        assert found["product"][which] < 0.2 * found["unguided"][which]
        assert found["product"][which] < 0.5 * found["plain"][which]
