"""`MMDGuidance.paper` is the published loop, step for step, on the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax import DDPM, DiffusionModel, MMDGuidance, from_model, guided_sample
from mmdjax.schedules import DiscreteTime, ScaledLinear, discrete_times

SHAPE, SIZE = (2, 2, 3), 12
MEAN, VARIANCE = 0.4, 0.6
SCHEDULE = ScaledLinear(0.0015, 0.0195)
TABLE = SCHEDULE.alphas_cumprod
ALPHA = 0.02


def gaussian_eps(params, x, t, cond):
    """The exact ε of N(MEAN, VARIANCE I), from the model's index."""
    # a copy: JAX keeps the float64 constant that a trace under enable_x64 makes of one array object
    table = jnp.asarray(TABLE.copy())[jnp.round(t[0]).astype(int)]
    return jnp.sqrt(1 - table) * (x - jnp.sqrt(table) * MEAN) / (table * VARIANCE + 1 - table)


MODEL = DiffusionModel(from_model(gaussian_eps, "eps", DiscreteTime(1000)), SCHEDULE, SHAPE)


def published_gradient(refs, generated):
    """The closed form for the last row of `generated`: biased MMD² with (aᵀb/D + 1)³."""
    y = generated[-1]
    among = 3 * (generated @ y / SIZE + 1) ** 2 @ generated / (len(generated) ** 2 * SIZE)
    across = 3 * (refs @ y / SIZE + 1) ** 2 @ refs / (len(generated) * len(refs) * SIZE)
    return 2 * (among - across)


def published_loop(refs, noises, capacity):
    """The authors' algorithm in float64 NumPy; `noises` gives (x_T, z_999 … z_0) for each sample."""
    memory, samples, lengths = None, [], []
    for start, steps in noises:
        if memory is not None and len(memory) == capacity:
            memory = memory[-1:]
        x = start
        for k, i in enumerate(range(999, -1, -1)):
            bar, previous = TABLE[i], TABLE[i - 1] if i else 1.0
            beta = 1 - bar / previous
            eps = np.sqrt(1 - bar) * (x - np.sqrt(bar) * MEAN) / (bar * VARIANCE + 1 - bar)
            x0 = (x - np.sqrt(1 - bar) * eps) / np.sqrt(bar)
            mean = (np.sqrt(previous) * beta * x0 + np.sqrt(bar / previous) * (1 - previous) * x) / (1 - bar)
            x = mean + np.sqrt(beta * (1 - previous) / (1 - bar)) * steps[k] * (i > 0)
            shift = 0.0
            if memory is not None:
                g = published_gradient(refs, np.concatenate([memory, x[None]]))
                shift = ALPHA * np.linalg.norm(x) * g / (np.linalg.norm(g) + 1e-5)
            if i == 0:
                memory = x[None] if memory is None else np.concatenate([memory, x[None]])
            x = x - shift
        samples.append(x)
        lengths.append(len(memory))
    return np.stack(samples), memory, lengths


def test_published_loop_on_a_1000_step_trace():
    with jax.enable_x64(True):
        refs = np.random.default_rng(0).normal(1.0, 0.3, (20, SIZE))
        capacity, keys = 3, jax.random.split(jax.random.key(0), 6)
        noises, samples, memory = [], [], capacity
        for key in keys:
            key_init, key_steps = jax.random.split(key)
            draw = lambda k: np.asarray(jax.random.normal(k, (1, *SHAPE), jnp.float64)).reshape(SIZE)
            step_keys = jax.vmap(lambda i, key_steps=key_steps: jax.random.fold_in(key_steps, i))(jnp.arange(1000))
            zs = jax.vmap(lambda k: jax.random.normal(k, (1, *SHAPE), jnp.float64))(step_keys)
            noises.append((draw(key_init), np.asarray(zs).reshape(1000, SIZE)))
            out = guided_sample(
                None,
                key,
                jnp.asarray(refs.reshape(-1, *SHAPE)),
                model=MODEL,
                num_samples=1,
                guidance=MMDGuidance.paper(ALPHA),
                sampler=DDPM(),
                times=discrete_times(1000, 1000),
                memory=memory,
            )
            memory = out.memory
            samples.append(np.asarray(out.x).reshape(SIZE))
        expected, held, lengths = published_loop(refs, noises, capacity)
        assert lengths == [1, 2, 3, 2, 3, 2]
        assert int(memory.count) == 2
        kept = np.asarray(memory.particles.x)[np.asarray(memory.particles.weight) > 0].reshape(-1, SIZE)
    # a thousand float64 steps; the trust ratio's rounding is the largest term
    np.testing.assert_allclose(np.stack(samples), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.sort(kept, axis=0), np.sort(held, axis=0), rtol=1e-9, atol=1e-9)


def check_first_sample():
    """The same bits, as XLA optimises for users: run in a process of its own in test_sampling."""
    refs = jnp.ones((5, *SHAPE))
    settings = {"model": MODEL, "num_samples": 1, "sampler": DDPM(), "num_steps": 20}
    plain = guided_sample(None, jax.random.key(3), None, **settings)
    first = guided_sample(None, jax.random.key(3), refs, **settings, guidance=MMDGuidance.paper(0.1), memory=100)
    np.testing.assert_array_equal(first.x, plain.x)


def test_memory_lengths_of_the_published_reset():
    refs = jnp.ones((5, *SHAPE))

    @jax.jit
    def one(key, memory):
        return guided_sample(
            None, key, refs, model=MODEL, num_samples=1, guidance=MMDGuidance.paper(), num_steps=1, memory=memory
        ).memory

    memory, lengths = one(jax.random.key(0), guided_memory()), [1]
    for i in range(1, 103):
        memory = one(jax.random.key(i), memory)
        lengths.append(int(memory.count))
    # 1 … 100; then the reset leaves one, to which the new sample is added
    assert lengths == [*range(1, 101), 2, 3, 4]


def guided_memory():
    """An empty memory of the published size."""
    from mmdjax import Memory

    return Memory.empty(100, SHAPE)


@pytest.mark.parametrize("num_samples", [5, pytest.param(2, marks=pytest.mark.slow)])
def test_joint_form_moves_each_sample_by_its_own_norm(num_samples):
    """Without memory: displacement α ‖x‖ ‖g‖/(‖g‖ + 1e-5) for every sample of the batch."""
    from toys import shift_direction

    from mmdjax._points.particles import Particles
    from mmdjax.guidance.bound import bind

    with jax.enable_x64(True):
        guidance = MMDGuidance.paper(0.05)
        x = jax.random.normal(jax.random.key(0), (num_samples, SIZE), jnp.float64)
        refs = Particles(jax.random.normal(jax.random.key(1), (9, SIZE), jnp.float64) + 1)
        bound = bind(guidance, guidance.kernel, refs)
        level = SCHEDULE(0.5)
        moved, _ = bound.after_step(jax.random.key(2), x, bound.init(x), 0.0, level, level)
        g = shift_direction(guidance.kernel, Particles(x), refs, None, estimator="v", precondition="raw")
        last = published_gradient(np.asarray(refs.x), np.asarray(x))
        norms = np.linalg.norm(x, axis=1), np.linalg.norm(g, axis=1)
        displacement = np.linalg.norm(x - moved, axis=1)
        g = np.asarray(g)
    np.testing.assert_allclose(g[-1], last, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(displacement, 0.05 * norms[0] * norms[1] / (norms[1] + 1e-5), rtol=1e-12)
