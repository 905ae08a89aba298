"""The alignment tasks: a pretrained model, and a target distribution of which few references are given.

Each task is a record; `draw(seed, num_refs)` gives references, fresh samples of the target and the rest, a large set
that all methods are compared with. The three are disjoint. `CHOOSING` are the seeds that a default may be chosen on,
`REPORTING` those that are only reported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import chi2

import mmdjax.sd
from mmdjax import IMQ, Delta, DiffusionModel, Particles, Product, load_digits
from mmdjax.digits import slant, splits, thicken
from mmdjax.mixtures import mixture, mixture_model
from mmdjax.tree import pytree

NUM_REFS, NUM_SAMPLES, NUM_STEPS = 100, 200, 50
CHOOSING, REPORTING = range(5), range(100, 105)
LATENT_DIGITS = Path(__file__).parents[1] / "examples" / "latent_digits"
NUM_REST = 2000  # where the target can be drawn from without end


class Draw(NamedTuple):
    """Arrays, or Particles where they have conditions or weights."""

    refs: Any
    fresh: Any
    rest: Any


@dataclass(frozen=True, eq=False)
class Task:
    """A prior and a target.

    Args:
      name: of the table's column.
      model, params: the prior.
      draw: (seed, num_refs=100) -> Draw; ValueError where a finite pool has too few references.
      classify: samples -> the target's class or mode of each, the nearest one; None where the target has none.
      proportions: of these classes in the target; 0 for a class of the prior that the target leaves out.
      centres, std: a Gaussian mixture's modes in the target [k, d], and their standard deviation in each coordinate.
      cond: the conditions to sample, [NUM_SAMPLES], or None.
      kernel: the default one times one of the conditions, where there are some; None otherwise.
      show: samples -> images, where they are none.
      costly: fewer settings of the other methods are tried.
    """

    name: str
    model: DiffusionModel
    params: Any
    draw: Callable[..., Draw]
    classify: Callable[[Any], np.ndarray] | None = None
    proportions: np.ndarray | None = None
    centres: np.ndarray | None = None
    std: float | None = None
    cond: Any = None
    kernel: Any = None
    show: Callable[[Any], np.ndarray] | None = None
    costly: bool = False

    def off_centre(self, x: Any) -> np.ndarray:
        """Distance of each sample to its nearest mode, over the radius that holds 99% of that mode."""
        distance, _ = _nearest(x, self.centres)
        return distance / (self.std * np.sqrt(chi2.ppf(0.99, self.centres.shape[1])))


# Gaussian mixtures


def _mixture_task(name, prior, modes, proportions, std, shift=0.0):
    # modes: which of the prior's means the target keeps; shift: of each of them, in standard deviations a coordinate
    model = mixture_model(prior.shape[1])
    centres = (prior[modes] + shift * std).astype(np.float32)

    def draw(seed, num_refs=NUM_REFS):
        rng = np.random.default_rng(seed)
        mode = rng.choice(len(modes), size=num_refs + NUM_SAMPLES + NUM_REST, p=proportions)
        points = centres[mode] + np.float32(std) * rng.normal(size=(len(mode), prior.shape[1])).astype(np.float32)
        return _split(points, num_refs)

    others = np.delete(prior, modes, axis=0)
    places = np.concatenate([centres, others])
    return Task(
        name,
        model,
        mixture(prior, std),
        draw,
        classify=lambda x: _nearest(x, places)[1],
        proportions=np.concatenate([proportions, np.zeros(len(others))]),
        centres=centres,
        std=std,
    )


def ring() -> Task:
    """8 Gaussians on a circle of radius 4, std .35, to three of them."""
    angles = 2 * np.pi * np.arange(8) / 8
    means = 4 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return _mixture_task("ring: 8 Gaussians to 3", means, [0, 2, 5], [0.4, 0.3, 0.3], 0.35)


def grid() -> Task:
    """5 × 5 Gaussians, spacing 2, std .2, to seven of them in unequal proportions."""
    means = 2.0 * np.stack(np.meshgrid(np.arange(-2, 3), np.arange(-2, 3)), axis=-1).reshape(25, 2)
    modes, proportions = [0, 3, 7, 11, 14, 18, 22], [0.25, 0.2, 0.15, 0.15, 0.1, 0.1, 0.05]
    return _mixture_task("grid: 25 Gaussians to 7", means, modes, proportions, 0.2)


def mixture_16d() -> Task:
    """10 Gaussians in 16-D, std .5, to four of them, each shifted by half a standard deviation a coordinate."""
    means = 2 * np.random.default_rng(0).normal(size=(10, 16))
    return _mixture_task("16-D: 10 Gaussians to 4, shifted", means, [1, 4, 6, 9], [0.4, 0.3, 0.2, 0.1], 0.5, shift=0.5)


def mixture_of_dimension(d: int) -> Task:
    """12 Gaussians, std .5, to three of them, each shifted by half a standard deviation a coordinate; for sweeps.

    The means are normal, their spread such that two are some 11 apart up to 16 dimensions and .7 √d beyond; drawn
    again until all are six standard deviations apart.
    """
    rng, std = np.random.default_rng(d), 0.5
    while True:
        means = 2 * max(1.0, np.sqrt(16 / d)) * rng.normal(size=(12, d))
        distances = np.linalg.norm(means[:, None] - means[None], axis=-1)
        if distances[np.triu_indices(12, 1)].min() > 6 * std:
            break
    return _mixture_task(f"{d}-D: 12 Gaussians to 3, shifted", means, [0, 5, 8], [0.5, 0.3, 0.2], std, shift=0.5)


def moons() -> Task:
    """A flat patchwork of 8 × 6 Gaussians, to two thin interleaved half circles of radius 2, noise .15."""
    means = np.stack(np.meshgrid(np.arange(-3.5, 4), np.arange(-2.5, 3)), axis=-1).reshape(48, 2)

    def draw(seed, num_refs=NUM_REFS):
        rng = np.random.default_rng(seed)
        size = num_refs + NUM_SAMPLES + NUM_REST
        angle, upper = np.pi * rng.random(size), rng.random(size) < 0.5
        arc = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], axis=1)
        points = 2 * np.where(upper[:, None], arc, -arc) + 0.15 * rng.normal(size=(size, 2))
        return _split(points.astype(np.float32), num_refs)

    return Task("two moons from a patchwork", mixture_model(2), mixture(means, 0.5), draw)


# Digits


def digits_mixture() -> Task:
    """Digits of the classes 0, 3 and 6 with weights .5, .3, .2; sampling is unconditional.

    References are held-out images. A class has some 178 images in all, so those that are left, the model's training
    images among them, make two disjoint sets, weighted to the target's proportions: fresh samples and the rest. Both
    come from one finite pool without replacement, so a perfect method's energy is a little below 0 here.
    """
    model, params = load_digits()
    proportions = {0: 0.5, 3: 0.3, 6: 0.2}

    def draw(seed, num_refs=NUM_REFS):
        counts = {c: round(share * num_refs) for c, share in proportions.items()}
        parts = _by_class(np.random.default_rng(seed), counts)
        refs, fresh, rest = zip(*parts.values(), strict=True)
        return Draw(np.concatenate(refs), _weighted(fresh, proportions), _weighted(rest, proportions))

    shares = np.array([proportions.get(c, 0.0) for c in range(10)])
    return Task("digits: classes 0, 3, 6", model, params, draw, classify=_digit, proportions=shares)


def digits_thick() -> Task:
    """Held-out digits with thickened strokes."""
    return _digits_style("digits: thickened strokes", thicken)


def digits_slanted() -> Task:
    """Held-out digits leaning to the right."""
    return _digits_style("digits: slanted strokes", slant)


def _digits_style(name, style):
    model, params = load_digits()

    def draw(seed, num_refs=NUM_REFS):
        _, (images, _) = splits()
        return _split_pool(style(images), np.random.default_rng(seed), num_refs)

    return Task(name, model, params, draw)


def digits_prompted() -> Task:
    """Class-conditional digits whose style depends on the class: 3s and 9s thick, 5s and 8s slanted.

    The label is the condition. These four look alike; of 3 and 7, say, the pictures alone tell the style, and any
    kernel will do. References are held-out images, as many of each class; fresh and rest as in `digits_mixture`, with
    their labels.
    """
    model, params = load_digits()
    styles = {3: thicken, 5: slant, 8: slant, 9: thicken}
    cond = np.repeat(np.array(list(styles), np.int32), NUM_SAMPLES // len(styles))

    def draw(seed, num_refs=NUM_REFS):
        parts = _by_class(np.random.default_rng(seed), dict.fromkeys(styles, num_refs // len(styles)))
        styled = {c: [styles[c](images) for images in three] for c, three in parts.items()}
        shares = dict.fromkeys(styles, 1 / len(styles))
        refs, fresh, rest = (_weighted(part, shares) for part in zip(*styled.values(), strict=True))
        return Draw(refs, fresh, rest)

    kernel = Product(x=IMQ(), cond=Delta())
    return Task("digits: 3, 9 thick, 5, 8 slanted", model, params, draw, cond=cond, kernel=kernel)


@pytree
class EmptyPrompt:
    """A text-to-image denoiser under the empty prompt; params: (the pipeline's, the prompt's encoding)."""

    denoiser: Any

    def __call__(self, params, x, level, cond):
        network, prompt = params
        prompt = jax.tree.map(lambda v: jnp.broadcast_to(v, (x.shape[0], *v.shape[1:])), jax.lax.stop_gradient(prompt))
        return self.denoiser(network, x, level, prompt)


def latent_digits() -> Task:
    """The latent diffusion model in examples/latent_digits, without a prompt, to held-out digits with thick strokes."""
    pipeline, params = mmdjax.sd.load(LATENT_DIGITS, param_dtype=jnp.float32)
    denoiser, schedule, shape = EmptyPrompt(pipeline.denoiser), pipeline.schedule, pipeline.latent_shape()
    _, (images, _) = splits()
    latents = np.asarray(pipeline.encode_images(params, thicken(images).repeat(3, axis=-1)))

    def draw(seed, num_refs=NUM_REFS):
        return _split_pool(latents, np.random.default_rng(seed), num_refs)

    return Task(
        "latent digits: thickened strokes",
        DiffusionModel(denoiser, schedule, shape),
        ({"unet": params["unet"]}, pipeline.encode_prompts(params, [""])),
        draw,
        show=lambda x: np.asarray(pipeline.decode(params, x)),
        costly=True,
    )


def _by_class(rng, counts):
    # class -> (references, held out; half of all that is left; the other half)
    train, held_out = splits()
    parts = {}
    for c, count in counts.items():
        mine = rng.permutation(held_out[0][held_out[1] == c])
        if count > len(mine):
            raise ValueError(f"{count} references of class {c} are wanted; {len(mine)} images of it are held out")
        left = rng.permutation(np.concatenate([mine[count:], train[0][train[1] == c]]))
        parts[c] = mine[:count], left[: len(left) // 2], left[len(left) // 2 :]
    return parts


def _weighted(parts, proportions):
    # class by class, weighted so that the classes have their proportions; cond is the class
    weight = [np.full(len(part), p / len(part)) for part, p in zip(parts, proportions.values(), strict=True)]
    labels = np.repeat(list(proportions), list(map(len, parts))).astype(np.int32)
    return Particles(np.concatenate(parts), cond=labels, weight=np.concatenate(weight).astype(np.float32))


def _digit(x):
    # the class of the nearest training image: 98.7% right on held-out ones
    (images, labels), _ = splits()
    return labels[_nearest(x, images)[1]]


def _nearest(x, places):
    x, places = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (x, places))
    d2 = (x**2).sum(1)[:, None] + (places**2).sum(1) - 2 * x @ places.T
    index = d2.argmin(1)
    return np.linalg.norm(x - places[index], axis=1), index


def _split_pool(images, rng, num_refs):
    if num_refs + NUM_SAMPLES >= len(images):
        raise ValueError(f"num_refs is {num_refs}; {len(images)} images are held out, {NUM_SAMPLES} of them fresh")
    return _split(images[rng.permutation(len(images))], num_refs)


def _split(points, num_refs):
    return Draw(points[:num_refs], points[num_refs : num_refs + NUM_SAMPLES], points[num_refs + NUM_SAMPLES :])


TASKS = (ring, grid, moons, mixture_16d, digits_mixture, digits_thick, digits_slanted, digits_prompted, latent_digits)
