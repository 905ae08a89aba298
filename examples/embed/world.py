"""What the examples in this folder share: a model that is known exactly, and references for three of its eight modes.

`GIVEN` is what makes `guide_denoiser` fit code that has x̂0 already: a denoiser whose parameters are x̂0.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mmdjax import Level
from mmdjax.metrics import energy_distance
from mmdjax.mixtures import Mixture, mixture, mixture_denoiser

ANGLES = 2 * np.pi * np.arange(8) / 8
RING = mixture(4 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1), std=0.35)
KEPT = np.array([0, 2, 5])
TARGET = Mixture(RING.means[KEPT], RING.log_stds[KEPT], RING.logits[KEPT])
NUM_SAMPLES, NUM_STEPS = 100, 30


def GIVEN(x0, x, level, cond):
    return x0


def references(n: int = 100):
    """[n, 2], drawn from the target."""
    return TARGET.sample(jax.random.key(1), n)


def x0_hat(x, alpha, sigma):
    """The model: E[x_0 | x_t = x], [n, 2]; alpha and sigma are numbers or [n, 1]."""
    return mixture_denoiser(RING, x, Level(None, jnp.asarray(alpha), jnp.asarray(sigma)))


def report(**made) -> dict[str, float]:
    """Print and return the energy distance of each set of samples to the target."""
    fresh = TARGET.sample(jax.random.key(2), 1000)
    energy = {name: float(energy_distance(x, fresh)) for name, x in made.items()}
    for name, value in energy.items():
        print(f"{name:12} energy distance to the target {value:8.4f}")
    return energy
