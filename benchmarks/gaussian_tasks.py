"""Tasks in the plane and in more dimensions: mixtures of Gaussians, whose denoiser is exact."""

import numpy as np
from task import NUM_REFS, NUM_REST, NUM_SAMPLES, Task, nearest, split

from mmdjax.mixtures import mixture, mixture_model


def _mixture_task(name, prior, modes, proportions, std, shift=0.0, **more):
    # modes: which of the prior's means the target keeps; shift: of each of them, in standard deviations a coordinate
    model = mixture_model(prior.shape[1])
    centres = (prior[modes] + shift * std).astype(np.float32)

    def draw(seed, num_refs=NUM_REFS):
        rng = np.random.default_rng(seed)
        mode = rng.choice(len(modes), size=num_refs + NUM_SAMPLES + NUM_REST, p=proportions)
        points = centres[mode] + np.float32(std) * rng.normal(size=(len(mode), prior.shape[1])).astype(np.float32)
        return split(points, num_refs)

    others = np.delete(prior, modes, axis=0)
    places = np.concatenate([centres, others])
    return Task(
        name,
        model,
        mixture(prior, std),
        draw,
        classify=lambda x: nearest(x, places)[1],
        proportions=np.concatenate([proportions, np.zeros(len(others))]),
        centres=centres,
        std=std,
        **more,
    )


def _as_it_is(name, prior, std):
    modes = np.arange(len(prior))
    return _mixture_task(name, prior, modes, np.full(len(prior), 1 / len(prior)), std, methods="few", as_it_is=True)


def ring() -> Task:
    """8 Gaussians on a circle of radius 4, std .35, to three of them."""
    angles = 2 * np.pi * np.arange(8) / 8
    means = 4 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return _mixture_task("ring: 8 Gaussians to 3", means, [0, 2, 5], [0.4, 0.3, 0.3], 0.35)


GRID = 2.0 * np.stack(np.meshgrid(np.arange(-2, 3), np.arange(-2, 3)), axis=-1).reshape(25, 2)


def grid() -> Task:
    """5 × 5 Gaussians, spacing 2, std .2, to seven of them in unequal proportions."""
    modes, proportions = [0, 3, 7, 11, 14, 18, 22], [0.25, 0.2, 0.15, 0.15, 0.1, 0.1, 0.05]
    return _mixture_task("grid: 25 Gaussians to 7", GRID, modes, proportions, 0.2)


def grid_as_it_is() -> Task:
    """The same 25, all of them alike."""
    return _as_it_is("grid as it is", GRID, 0.2)


def mixture_16d() -> Task:
    """10 Gaussians in 16-D, std .5, to four of them, each shifted by half a standard deviation a coordinate."""
    means = 2 * np.random.default_rng(0).normal(size=(10, 16))
    return _mixture_task("16-D: 10 Gaussians to 4, shifted", means, [1, 4, 6, 9], [0.4, 0.3, 0.2, 0.1], 0.5, shift=0.5)


def mixture_as_it_is() -> Task:
    """12 Gaussians in 16-D, std .5, all of them alike."""
    return _as_it_is("16-D as it is", 2 * np.random.default_rng(0).normal(size=(12, 16)), 0.5)


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
        return split(points.astype(np.float32), num_refs)

    return Task("two moons from a patchwork", mixture_model(2), mixture(means, 0.5), draw)
