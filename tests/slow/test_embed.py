"""examples/embed: guidance in the ways in which other packages' pipelines are cut, against `guided_sample` itself."""

import functools
import sys
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmdjax import DDIM, DiffusionModel, Level, MMDGuidance, from_model, guide_denoiser, guided_sample
from mmdjax.schedules import RectifiedFlow, VPLinear

sys.path.append(str(Path(__file__).parents[2] / "examples" / "embed"))
import denoise_fn
import one_at_a_time
import packed_latents
import projection
import score_guidance
import velocity_network
from world import GIVEN, NUM_SAMPLES, NUM_STEPS, references, x0_hat

KEY, TIMES = jax.random.key(0), jnp.linspace(1.0, 0.0, NUM_STEPS + 1)
NOISE = jax.random.normal(jax.random.key(3), (NUM_SAMPLES, 2))


def whole(denoiser, schedule, x_init, **settings):
    """`guided_sample` by the same steps from the same noise."""
    model, settings = DiffusionModel(denoiser, schedule, x_init.shape[1:]), {"times": TIMES} | settings
    return guided_sample(None, KEY, references(), model=model, num_samples=len(x_init), x_init=x_init,
                         sampler=DDIM(), **settings).x  # fmt: skip


def assert_equal(one, other):
    """To rounding, which samples between two modes multiply."""
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "module", [denoise_fn, projection, velocity_network, packed_latents, score_guidance, one_at_a_time]
)
def test_runs_as_a_script(module, capsys):
    """Unguided samples are far from the target, guided ones are not."""
    energy = module.main()
    assert energy["guided"] < 0.02 < 0.3 < energy["unguided"], energy
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_denoise_fn():
    sigmas = jnp.geomspace(20.0, 0.01, NUM_STEPS + 1)
    transform = denoise_fn.MMDTransform(references(), 20.0)
    sampler = denoise_fn.OdeSampler((2,), lambda x, sigma, cond: x0_hat(x, 1.0, sigma), sigmas, (transform,))
    made = sampler.generate(NUM_SAMPLES, KEY)
    x_init = 20.0 * jax.random.normal(KEY, (NUM_SAMPLES, 2))
    denoiser = lambda params, x, level, cond: x0_hat(x, 1.0, level.sigma)
    schedule, times = lambda t: Level(t, jnp.ones_like(t), 20 * t), jnp.minimum(sigmas / 20, 1.0)
    assert_equal(whole(denoiser, schedule, x_init, times=times), made)


def test_projection():
    """After classifier-free guidance, with a time [batch, 1]; samples at several times raise."""
    process = projection.RectifiedFlowProcess()
    project = projection.MMDProjectionFn(guide=guide_denoiser(GIVEN, MMDGuidance(), references()), process=process)
    guided = projection.GuidedDiffusionInferenceFn(base_inference_fn=projection.network, projection_fn=project)
    label = {"label": jnp.arange(NUM_SAMPLES) / NUM_SAMPLES}

    def denoiser(params, x, level, cond):
        return (1 + 0.1 * 1.5 * label["label"])[:, None] * x0_hat(x, level.alpha, level.sigma)

    assert_equal(whole(denoiser, RectifiedFlow(), NOISE), projection.sample(guided, NOISE, label, TIMES))
    several = jnp.linspace(0.2, 0.8, NUM_SAMPLES)[:, None]
    with pytest.raises(ValueError, match=r"level.t has values from 0.2 to 0.8; .* one level for the batch"):
        guided(time=several, xt=NOISE, conditioning=label)
    assert np.isnan(jax.jit(lambda time: guided(time=time, xt=NOISE, conditioning=label))(several)["velocity"]).all()


def test_velocity_network():
    """The mixture is guided, not the network: else the sampler's classifier-free guidance extrapolates the shift."""
    net, y, scale = velocity_network.SiTInterface(nnx.Rngs(0)), jnp.arange(NUM_SAMPLES) % 4, 1.5
    net.eval()
    guided = velocity_network.Guided(net, references(), guidance_scale=scale)

    def denoiser(params, x, level, cond):
        return (1 + scale * 0.1 * y)[:, None] * x0_hat(x, level.alpha, level.sigma)

    made = velocity_network.euler(guided, NOISE, TIMES, y=y)
    assert_equal(whole(denoiser, RectifiedFlow(), NOISE), made)
    t = jnp.full(NUM_SAMPLES, 0.3)
    x0 = NOISE - 0.3 * guided.pred(NOISE, t, y=y)
    np.testing.assert_allclose(guided.score(NOISE, t, y=y), (0.7 * x0 - NOISE) / 0.3**2, rtol=1e-4, atol=1e-3)
    # the trap: a guided net under the sampler's own mixture, with the plain net as g_net
    around, x, step = velocity_network.Guided(net, references()), NOISE, jnp.array([0.5, 0.4])
    shift = 0.1 * (net.pred(x, jnp.full(len(x), 0.5), y=y) - around.pred(x, jnp.full(len(x), 0.5), y=y))
    plain = velocity_network.euler(net, x, step, guidance_scale=scale, y=y)
    trapped = velocity_network.euler(around, x, step, g_net=net, guidance_scale=scale, y=y)
    np.testing.assert_allclose(trapped - plain, scale * shift, rtol=1e-3, atol=1e-4)


def test_packed_latents():
    """Unguided it is the fused loop; guided, the guidance of latents that are not packed; and the shift of times."""
    transformer, ids = packed_latents.FluxTransformer2DModel(), jnp.zeros((4, 3))
    rows = {"encoder_hidden_states": (7, 8), "pooled_projections": (8,), "txt_ids": (7, 3), "guidance": ()}
    cond = {name: jnp.ones((NUM_SAMPLES, *shape)) for name, shape in rows.items()}
    noise = jax.random.normal(KEY, (NUM_SAMPLES, 1, 4, 4))
    pack = lambda latents: packed_latents.pack_latents(latents, len(latents), 1, 4, 4)
    model = packed_latents.flux_model(transformer, ids, (4, 4), shift=1.5)
    settings = {"num_samples": NUM_SAMPLES, "times": TIMES, "sampler": DDIM()}
    run = lambda refs: guided_sample({}, KEY, refs, model=model, cond=cond, x_init=pack(noise), **settings).x

    sigmas = model.schedule(TIMES).sigma
    np.testing.assert_allclose(sigmas[1:-1], 1.5 / (1.5 + (1 / TIMES[1:-1] - 1)), rtol=1e-5)
    all_ids = jnp.broadcast_to(ids, (NUM_SAMPLES, 4, 3))
    fused = packed_latents.generate(transformer, {}, pack(noise), sigmas[:-1], sigmas[1:], img_ids=all_ids, **cond)
    assert_equal(run(None), fused)

    def unpacked(params, x, level, cond):
        return packed_latents.as_latents(x0_hat(x[:, 0, 0, :2] * 1.0, level.alpha, level.sigma))

    refs = packed_latents.as_latents(references())
    flat = DiffusionModel(unpacked, RectifiedFlow(1.5), (1, 4, 4))
    made = guided_sample({}, KEY, refs, model=flat, x_init=noise, **settings).x
    assert_equal(pack(made)[:, 0, :2], run(pack(refs))[:, 0, :2])


def test_score_guidance():
    """The score with the function added is that of a guided x̂0; time is a number, or [n, 1]."""
    network, time = score_guidance.DiffusionModel(), 0.4
    mmd_score = score_guidance.MMDScore(references(), network.noise_schedule)
    alpha, sigma = network._alpha_sigma(time)
    guided = guide_denoiser(lambda params, x, level, cond: x0_hat(x, alpha, sigma), MMDGuidance(), references())
    x0 = guided(None, NOISE, Level(time, alpha, sigma), None)
    for when in (time, jnp.full((NUM_SAMPLES, 1), time)):
        found = network.score(NOISE, when, guidance_function=mmd_score)
        assert_equal(found, (alpha * x0 - NOISE) / sigma**2)


def test_one_at_a_time():
    """The samples of all calls are those of one solve with the batch as its state."""
    model = one_at_a_time.ScoreModel(jnp.asarray(one_at_a_time.RING.means), 0.35**2)
    keys = jax.random.split(KEY, NUM_SAMPLES)
    joined = one_at_a_time.guided_score(model, 8.0, references())
    call = functools.partial(one_at_a_time.single_sample_fn, joined, lambda t: t, (2,), 0.2, 8.0)
    made = jax.vmap(call, axis_name="batch")(keys)
    together = one_at_a_time.guided_score(model, 8.0, references(), axis_name=None)

    def drift(t, y, args):
        level = Level(t / 8, jnp.exp(-0.5 * t), jnp.sqrt(-jnp.expm1(-t)))
        return -0.5 * (y + together(y, level))

    y1 = jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
    solved = diffrax.diffeqsolve(diffrax.ODETerm(drift), diffrax.Tsit5(), 8.0, 0.01, -0.2, y1).ys[0]
    assert_equal(solved, made)


def test_nnx_with_dropout_and_batch_norm():
    """The README's recipe for NNX: parameters alone are differentiated; the rest (statistics, keys) stays."""

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(3, 16, rngs=rngs), nnx.Linear(16, 2, rngs=rngs)
            self.norm, self.dropout = nnx.BatchNorm(16, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, t, cond):
            hidden = self.norm(self.first(jnp.concatenate([x, t[:, None]], axis=1)))
            return self.last(self.dropout(nnx.relu(hidden)))

    net = Network(nnx.Rngs(0))
    net(NOISE, jnp.ones(NUM_SAMPLES), None)  # moves the statistics
    net.eval()
    graphdef, params, rest = nnx.split(net, nnx.Param, ...)
    apply = lambda params, x, t, cond: nnx.merge(graphdef, params, rest)(x, t, cond)
    assert any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(rest))
    model = DiffusionModel(from_model(apply, "eps"), VPLinear(), (2,))
    t = jnp.full(NUM_SAMPLES, 0.3)
    np.testing.assert_array_equal(apply(params, NOISE, t, None), net(NOISE, t, None))

    def spread(params):
        made = guided_sample(params, KEY, references(), model=model, num_samples=8, num_steps=4, checks=False)
        return (made.x**2).mean()

    slopes = jax.tree.leaves(jax.grad(spread)(params))
    assert all(np.isfinite(slope).all() for slope in slopes)
    assert any(np.abs(slope).max() > 1e-6 for slope in slopes)
    made = guided_sample(params, KEY, references(), model=model, num_samples=8, num_steps=4, checks=True)
    assert np.isfinite(made.x).all()
