"""A function of the network's outputs, called after classifier-free guidance: hackable_diffusion.

`MMDProjectionFn` has the form of `hackable_diffusion.lib.inference.projection.ProjectionFn` (0.0.1, as of 2026):
(xt, conditioning, time, outputs) -> outputs, with one kind of output in a dict, and time [batch, 1, …]. All samples
must be at one time, as they are in the package's samplers; under `jit`, where that cannot be seen, others give NaN.

    python examples/embed/projection.py
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from world import GIVEN, NUM_SAMPLES, NUM_STEPS, references, report, x0_hat

from mmdjax import Level, MMDGuidance, guide_denoiser


@dataclasses.dataclass(kw_only=True, frozen=True)
class MMDProjectionFn:
    """For `GuidedDiffusionInferenceFn(projection_fn=MMDProjectionFn(guide=..., process=process))`."""

    guide: Any  # guide_denoiser(GIVEN, guidance, refs); refs=Particles(x, cond) compares with `conditioning`
    process: Any

    def __call__(self, xt, conditioning, time, outputs):
        (kind,) = outputs
        convert = lambda prediction: self.process.convert_predictions(prediction=prediction, xt=xt, time=time)
        info = self.process.get_schedule_info(time)
        level = Level(time, info["alpha"], info["sigma"])
        x0 = self.guide(convert(outputs)["x0"], xt, level, conditioning)
        return {kind: convert({"x0": x0})[kind]}


# --- a stand-in for the package ---------------------------------------------------------------------------------------


class RectifiedFlowProcess:
    def get_schedule_info(self, time):
        return {"time": time, "alpha": 1 - time, "sigma": time}

    def convert_predictions(self, prediction, xt, time):
        ((kind, value),) = prediction.items()
        x0 = value if kind == "x0" else xt - time * value
        return {"x0": x0, "velocity": (xt - x0) / time}


@dataclasses.dataclass(kw_only=True, frozen=True)
class GuidedDiffusionInferenceFn:
    base_inference_fn: Any
    guidance_scale: float = 1.5
    projection_fn: Any = lambda xt, conditioning, time, outputs: outputs

    def __call__(self, time, xt, conditioning):
        with_cond = self.base_inference_fn(time=time, xt=xt, conditioning=conditioning)
        without = self.base_inference_fn(time=time, xt=xt, conditioning=None)
        mix = lambda a, b: b + self.guidance_scale * (a - b)
        outputs = jax.tree.map(mix, with_cond, without)
        return self.projection_fn(xt=xt, conditioning=conditioning, time=time, outputs=outputs)


def network(time, xt, conditioning):
    """A velocity; the condition makes the model's data larger."""
    larger = 1.0 if conditioning is None else 1.0 + 0.1 * conditioning["label"][:, None]
    return {"velocity": (xt - larger * x0_hat(xt, 1 - time, time)) / time}


def sample(inference_fn, noise, conditioning, times):
    """Euler's method; the last step is to clean data."""

    def step(x, ends):
        t, s = ends
        time = jnp.full((len(x), 1), t)
        return x + (s - t) * inference_fn(time=time, xt=x, conditioning=conditioning)["velocity"], None

    return jax.lax.scan(step, noise, (times[:-1], times[1:]))[0]


def main():
    process, conditioning = RectifiedFlowProcess(), {"label": jnp.zeros(NUM_SAMPLES)}
    project = MMDProjectionFn(guide=guide_denoiser(GIVEN, MMDGuidance(), references()), process=process)
    noise, times = jax.random.normal(jax.random.key(0), (NUM_SAMPLES, 2)), jnp.linspace(1.0, 0.0, NUM_STEPS + 1)
    plain = GuidedDiffusionInferenceFn(base_inference_fn=network)
    guided = dataclasses.replace(plain, projection_fn=project)
    return report(unguided=sample(plain, noise, conditioning, times), guided=sample(guided, noise, conditioning, times))


if __name__ == "__main__":
    main()
