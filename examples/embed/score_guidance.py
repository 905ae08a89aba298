"""A function of x̂0 and time whose result is added to the score: bayesflow, on its JAX backend.

`MMDScore` is the `guidance_function(x, time)` that `DiffusionModel` takes as a keyword up to 2.0.8. Since 2.0.12 it is
a method (x_pred, time, score) -> score, and `lambda x_pred, time, score: score + mmd_score(x_pred, time)` takes its
place. The score is (α x̂0 − x)/σ², so that moving x̂0 by a shift adds α · shift/σ² to it. References are parameters as
the network sees them, standardised; sample for one data set at a time, since all samples of a call are guided together.
The rule is "field": "shrunk", the default, needs x_t, which this function is not given.

    python examples/embed/score_guidance.py
"""

import jax
import jax.numpy as jnp
from world import GIVEN, NUM_SAMPLES, NUM_STEPS, references, report, x0_hat

from mmdjax import Level, MMDGuidance, guide_denoiser


class MMDScore:
    def __init__(self, refs, noise_schedule, guidance=MMDGuidance(precondition="field")):
        self.guide, self.noise_schedule = guide_denoiser(GIVEN, guidance, refs), noise_schedule

    def __call__(self, x, time):
        alpha, sigma = self.noise_schedule.get_alpha_sigma(self.noise_schedule.get_log_snr(time, training=False))
        return alpha * (self.guide(x, x, Level(time, alpha, sigma), None) - x) / sigma**2


# --- a stand-in for the package ---------------------------------------------------------------------------------------


class CosineNoiseSchedule:
    """log-SNR = −2 log tan(π t/2) between its ends, ±15."""

    def get_log_snr(self, t, training):
        first, last = 2 / jnp.pi * jnp.arctan(jnp.exp(jnp.array([-7.5, 7.5])))
        return -2 * jnp.log(jnp.tan(jnp.pi / 2 * (first + (last - first) * t)))

    def get_alpha_sigma(self, log_snr_t):
        return jnp.sqrt(jax.nn.sigmoid(log_snr_t)), jnp.sqrt(jax.nn.sigmoid(-log_snr_t))


class DiffusionModel:
    """The probability flow by Euler's method, in the angle φ with α = cos φ, σ = sin φ."""

    noise_schedule = CosineNoiseSchedule()

    def score(self, xz, time, guidance_function=None):
        alpha, sigma = self.noise_schedule.get_alpha_sigma(self.noise_schedule.get_log_snr(time, training=False))
        x_pred = x0_hat(xz, alpha, sigma)
        score = (alpha * x_pred - xz) / sigma**2
        return score if guidance_function is None else score + guidance_function(x=x_pred, time=time)

    def sample(self, z, **kwargs):
        times = jnp.linspace(0.999, 0.02, NUM_STEPS + 1)

        def step(z, ends):
            angles = [jnp.arctan2(*self._alpha_sigma(t)[::-1]) for t in ends]
            time = jnp.full((len(z), 1), ends[0])
            # dz/dφ = −tan φ (z + score)
            velocity = -jnp.tan(angles[0]) * (z + self.score(z, time, **kwargs))
            return z + (angles[1] - angles[0]) * velocity, None

        return jax.lax.scan(step, z, (times[:-1], times[1:]))[0]

    def _alpha_sigma(self, t):
        return self.noise_schedule.get_alpha_sigma(self.noise_schedule.get_log_snr(t, training=False))


def main():
    network, z = DiffusionModel(), jax.random.normal(jax.random.key(0), (NUM_SAMPLES, 2))
    mmd_score = MMDScore(references(), network.noise_schedule)
    return report(unguided=network.sample(z), guided=network.sample(z, guidance_function=mmd_score))


if __name__ == "__main__":
    main()
