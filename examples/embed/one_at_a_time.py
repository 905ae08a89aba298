"""A score model for one sample, solved one sample at a time under `jax.vmap`: Equinox and diffrax.

`single_sample_fn` is that of Equinox's example "Generative score-based diffusion" (Equinox 0.13, diffrax 0.7), guided.
Two things are new: the score passes through a guided x̂0, and `jax.vmap` names its axis, so that the samples of all
calls are guided together. Without the name each would be guided as if it were the whole batch. The steps must be the
same for all samples: diffrax's default, a constant step, is. They end before t = 0, where the score of x̂0 is 0/0.

    python examples/embed/one_at_a_time.py
"""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from world import NUM_SAMPLES, NUM_STEPS, RING, references, report

from mmdjax import Level, MMDGuidance, guide_denoiser
from mmdjax.denoisers import from_model, score


def guided_score(model, t1, refs, guidance=MMDGuidance(), axis_name="batch"):
    """model(t, y) for one sample, as a denoiser of rows, guided."""
    rows = lambda params, x, t, cond: jax.vmap(model)(t, x)
    denoiser = from_model(rows, "score", time=lambda t: t * t1)
    return functools.partial(score, guide_denoiser(denoiser, guidance, refs, axis_name=axis_name), None)


@eqx.filter_jit
def single_sample_fn(score, int_beta, data_shape, dt0, t1, key):
    def drift(t, y, args):
        _, beta = jax.jvp(int_beta, (t,), (jnp.ones_like(t),))
        level = Level(t / t1, jnp.exp(-0.5 * int_beta(t)), jnp.sqrt(-jnp.expm1(-int_beta(t))))
        return -0.5 * beta * (y + score(y[None], level)[0])

    y1 = jax.random.normal(key, data_shape)
    term, solver = diffrax.ODETerm(drift), diffrax.Tsit5()
    return diffrax.diffeqsolve(term, solver, t1, 0.01, -dt0, y1).ys[0]


# --- a stand-in for a trained model -----------------------------------------------------------------------------------


class ScoreModel(eqx.Module):
    """The exact score of a mixture, in place of a trained network: model(t, y), y one sample."""

    means: jax.Array
    variance: jax.Array

    def __call__(self, t, y):
        alpha2 = jnp.exp(-t)  # int_beta(t) = t
        variance, apart = alpha2 * self.variance + 1 - alpha2, jnp.sqrt(alpha2) * self.means - y
        return jax.nn.softmax(-(apart**2).sum(1) / (2 * variance)) @ apart / variance


def main():
    model, t1 = ScoreModel(jnp.asarray(RING.means), jnp.exp(2 * jnp.float32(RING.log_stds[0]))), 8.0
    keys = jax.random.split(jax.random.key(0), NUM_SAMPLES)
    plain = lambda y, level: jax.vmap(functools.partial(model, t1 * level.t))(y)
    guided = guided_score(model, t1, references())
    made = {}
    for name, score_fn in {"unguided": plain, "guided": guided}.items():
        sample_fn = functools.partial(single_sample_fn, score_fn, lambda t: t, (2,), t1 / NUM_STEPS / 2, t1)
        made[name] = jax.vmap(sample_fn, axis_name="batch")(keys)
    return report(**made)


if __name__ == "__main__":
    main()
