"""A denoiser D(x, sigma, cond) in units of data, with guidance as a transform of it: swirl-dynamics.

`MMDTransform` has the form of `swirl_dynamics.lib.diffusion.guidance.Transform` (0.0.1, as of 2026):
(denoise_fn, guidance_inputs) -> denoise_fn, with x already divided by the scheme's scale, so that α = 1. Give it to a
sampler as `guidance_transforms=(MMDTransform(refs, sigma_max),)`, after classifier-free guidance if there is any.

    python examples/embed/denoise_fn.py
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from world import GIVEN, NUM_SAMPLES, NUM_STEPS, references, report, x0_hat

from mmdjax import Level, MMDGuidance, guide_denoiser


class MMDTransform:
    """Made once: a sampler calls its transforms anew in every step, and the references need no second look."""

    def __init__(self, refs, sigma_max, guidance=MMDGuidance()):
        self.guide, self.sigma_max = guide_denoiser(GIVEN, guidance, refs), sigma_max

    def __call__(self, denoise_fn, guidance_inputs):
        def guided(x, sigma, cond=None):
            level = Level(sigma / self.sigma_max, 1.0, sigma)  # the first number matters for a window only
            return self.guide(denoise_fn(x, sigma, cond), x, level, cond)

        return guided


# --- a stand-in for the package ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OdeSampler:
    """As the package's sampler of this name, on sigmas in place of a scheme's times, by Euler's method."""

    input_shape: tuple[int, ...]
    denoise_fn: Any
    sigmas: Any
    guidance_transforms: Sequence[Any] = ()

    def generate(self, num_samples, rng, cond=None, guidance_inputs=None):
        x = self.sigmas[0] * jax.random.normal(rng, (num_samples, *self.input_shape))

        def step(x, ends):
            denoise_fn = self.denoise_fn
            for transform in self.guidance_transforms:
                denoise_fn = transform(denoise_fn, guidance_inputs)
            sigma, after = ends
            return x + (after - sigma) * (x - denoise_fn(x, sigma, cond)) / sigma, None

        return jax.lax.scan(step, x, (self.sigmas[:-1], self.sigmas[1:]))[0]


def main():
    sigmas = jnp.geomspace(20.0, 0.01, NUM_STEPS + 1)
    transform = MMDTransform(references(), sigma_max=sigmas[0])
    made = {}
    for name, transforms in {"unguided": (), "guided": (transform,)}.items():
        sampler = OdeSampler((2,), lambda x, sigma, cond: x0_hat(x, 1.0, sigma), sigmas, transforms)
        made[name] = sampler.generate(NUM_SAMPLES, jax.random.key(0))
    return report(**made)


if __name__ == "__main__":
    main()
