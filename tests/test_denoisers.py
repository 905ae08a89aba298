import dataclasses
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from mmdjax import IMQ, DiffusionModel, Level, MMDGuidance, cfg, from_model, guide_denoiser, guided_sample
from mmdjax.denoisers import PREDICTIONS, Clipped, Thresholded, prediction_from_x0, score, x0_from_prediction
from mmdjax.guidance.wrappers import steps_done
from mmdjax.schedules import DiscreteTime, ScaledLinear, VPLinear, uniform_times

LEVELS = {
    "vp": Level(0.5, 0.8, 0.6),
    "nearly_clean": Level(0.01, 0.999, 0.04),
    "ve": Level(0.5, 1.0, 7.0),
    "flow": Level(0.3, 0.7, 0.3),
    "training": Level(np.array([0.1, 0.5, 0.9]), np.array([0.98, 0.7, 0.1]), np.array([0.2, 0.7, 3.0])),
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


class Net(nn.Module):
    """Reads everything it is given; `width` tells modules apart."""

    width: int = 4

    @nn.compact
    def __call__(self, x, t, cond):
        h = nn.Dense(self.width)(x) + t[:, None] / 1000
        if cond is not None:
            h = h + nn.Embed(11, self.width)(cond)
        return nn.Dense(x.shape[-1])(nn.tanh(h))


def net_params():
    return Net().init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1), jnp.zeros(1, int))


# Predictions


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS.keys())
def test_every_prediction_gives_the_known_x0(prediction, level):
    with jax.enable_x64(True):
        x0, eps = normal(0, 3, 2, 5), normal(1, 3, 2, 5)
        alpha, sigma = (np.reshape(v, (-1, 1, 1)) for v in (level.alpha, level.sigma))
        x = alpha * x0 + sigma * eps
        # what each network is trained to say, by its definition
        said = {"x0": x0, "eps": eps, "score": -eps / sigma, "v": alpha * eps - sigma * x0, "flow": eps - x0}[
            prediction
        ]
        # float64 rounding, divided by α down to .1 or by σ² down to .0016
        np.testing.assert_allclose(x0_from_prediction(prediction, x, said, level), x0, rtol=0, atol=1e-12)
        np.testing.assert_allclose(prediction_from_x0(prediction, x, x0, level), said, rtol=0, atol=1e-11)
        denoiser = from_model(lambda params, x, t, cond: said, prediction)
        np.testing.assert_allclose(denoiser(None, x, level, None), x0, rtol=0, atol=1e-12)


def test_levels_of_a_batch_are_levels_of_its_rows():
    x, output, level = normal(0, 3, 4), normal(1, 3, 4), LEVELS["training"]
    for prediction in PREDICTIONS:
        together = x0_from_prediction(prediction, x, output, level)
        for i in range(3):
            row = jax.tree.map(lambda v, i=i: float(v[i]), level)
            alone = x0_from_prediction(prediction, x[i : i + 1], output[i : i + 1], row)
            np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-6)  # one rounding of float32


def test_pure_noise():
    # α = 0: eps and score say nothing of x0, v = −x0 and flow = ε − x0 all of it
    x0, eps, level = normal(0, 3, 2), normal(1, 3, 2), Level(1.0, 0.0, 1.0)
    for prediction, said in (("eps", eps), ("score", -eps), ("eps", x0)):
        assert np.isfinite(x0_from_prediction(prediction, eps, said, level)).all()
    np.testing.assert_array_equal(x0_from_prediction("v", eps, -x0, level), x0)
    np.testing.assert_allclose(x0_from_prediction("flow", eps, eps - x0, level), x0, atol=1e-6)  # float32 difference
    gradient = jax.grad(lambda alpha: x0_from_prediction("eps", eps, x0, Level(1.0, alpha, 1.0)).sum())(0.0)
    assert np.isfinite(gradient)


def test_clean_level_is_finite():
    x = normal(0, 3, 2)
    for prediction in PREDICTIONS:
        assert np.isfinite(prediction_from_x0(prediction, x, x, Level(0.0, 1.0, 0.0))).all()
    for prediction in ("eps", "score", "v", "flow"):  # nothing is left to remove
        np.testing.assert_array_equal(x0_from_prediction(prediction, x, 5 * x, Level(0.0, 1.0, 0.0)), x)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_output_comes_back_float32(prediction, dtype):
    x, level = normal(0, 3, 2), LEVELS["vp"]
    output = normal(1, 3, 2).astype(dtype)
    x0 = from_model(lambda params, x, t, cond: output, prediction)(None, x, level, None)
    assert x0.dtype == jnp.float32
    # the arithmetic is float32's too: the same as from the output widened first, to the last bit
    np.testing.assert_array_equal(x0, x0_from_prediction(prediction, x, output.astype(jnp.float32), level))


@pytest.mark.parametrize("time", [None, DiscreteTime(1000)])
def test_networks_see_time_in_the_precision_of_the_samples(time):
    denoiser = from_model(lambda params, x, t, cond: jnp.broadcast_to(t[:, None], x.shape), "x0", time)
    with jax.enable_x64(True):
        level = VPLinear()(1 / 3)
        for dtype in (np.float64, np.float32):
            expected = dtype(1 / 3 if time is None else 1000 / 3 - 1)
            seen = denoiser(None, jnp.zeros((2, 3), dtype), level, None)
            assert seen.dtype == dtype
            np.testing.assert_array_max_ulp(seen, np.full((2, 3), expected), 1)


@pytest.mark.parametrize("num_steps", [1, 3, 7, 10, 50, 1000, 200_000])
def test_windows_part_the_steps_between_them(num_steps):
    """Each step k/N of a grid is in one of two windows that meet at an edge j/N, the one that starts there."""
    edges = sorted({0, 1, num_steps // 3, num_steps // 2, num_steps})
    steps = np.unique([*edges, 0, num_steps - 1]) if num_steps > 1000 else np.arange(num_steps + 1)
    grids = steps / num_steps, 1 - uniform_times(num_steps).astype(np.float32)[steps]  # of a loop, and 1 − t
    for fraction in (np.asarray(steps_done(jnp.asarray(g, jnp.float32))) for g in grids):
        for j in edges:
            met = fraction >= np.float32(j / num_steps)
            if num_steps < 100_000:
                expected = steps >= j if j < num_steps else np.zeros(len(steps), bool)
                np.testing.assert_array_equal(met, expected)
        assert (fraction < 1).all()  # the window's end


@pytest.mark.parametrize("t", [0.0, 1e-5, *(pytest.param(t, marks=pytest.mark.slow) for t in (1e-8, 2e-5))])
def test_a_window_to_the_end_has_the_clean_end_in_it(t):
    refs = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    x = jnp.asarray(refs[:3] + 0.3)
    plain = from_model(lambda params, x, t, cond: x, "x0")

    def moved(window):
        guidance = MMDGuidance(IMQ(1.0), window=window)
        return np.abs(guide_denoiser(plain, guidance, refs)(None, x, VPLinear()(t), None) - x).max()

    assert moved((0.0, 1.0)) > 0.01
    assert moved((0.5, 1.0)) > 0.01
    assert moved((0.0, 0.99)) == 0


def test_wrong_output_shape_raises():
    two_channels = from_model(lambda params, x, t, cond: jnp.concatenate([x, x], axis=-1), "eps")  # learned variance
    with pytest.raises(ValueError, match=r"shape \(3, 4\) for x of shape \(3, 2\)"):
        two_channels(None, normal(0, 3, 2), LEVELS["vp"], None)
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):  # would broadcast
        from_model(lambda params, x, t, cond: x[:1], "x0")(None, normal(0, 3, 2), LEVELS["vp"], None)


def test_unknown_prediction_raises():
    x = normal(0, 3, 2)
    for function in (x0_from_prediction, prediction_from_x0):
        with pytest.raises(ValueError, match="prediction is 'epsilon'"):
            function("epsilon", x, x, LEVELS["vp"])
    plain = inspect.unwrap(from_model)  # as users have it, without the run-time type check
    with pytest.raises(ValueError, match="prediction is 'epsilon'"):
        plain(lambda params, x, t, cond: x, "epsilon")
    with pytest.raises(TypeError, match="apply must be a function, not float"):
        plain(3.0)
    with pytest.raises(TypeError, match="time must be a function, not int"):
        plain(lambda params, x, t, cond: x, time=1000)


# Networks


def test_the_network_is_told_its_time():
    times = []

    def apply(params, x, t, cond):
        times.append(t)
        return x

    x = normal(0, 3, 2)
    from_model(apply)(None, x, Level(0.25, 0.9, 0.4), None)
    from_model(apply, time=lambda t: 1000 * t)(None, x, Level(0.25, 0.9, 0.4), None)
    from_model(apply, time=DiscreteTime(1000))(None, x, ScaledLinear()(0.731), None)
    from_model(apply)(None, x, LEVELS["training"], None)
    for found, expected in zip(times, (0.25, 250, 730, [0.1, 0.5, 0.9]), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, np.broadcast_to(np.float32(expected), 3))


def test_score_of_a_gaussian():
    with jax.enable_x64(True):
        world = toys.Gaussian(mean=np.array([0.7, -1.2]), var=np.array([0.3, 2.0]))
        x = normal(0, 5, 2)
        for name in ("vp", "nearly_clean", "ve", "flow"):
            # float64, divided by σ² down to .0016
            np.testing.assert_allclose(score(world, None, x, LEVELS[name]), world.score(x, LEVELS[name]), atol=1e-11)


@pytest.mark.slow
def test_score_of_a_mixture_is_the_gradient_of_its_log_density():
    with jax.enable_x64(True):
        world, x = toys.ring(), 3 * normal(0, 20, 2)
        for name in ("vp", "nearly_clean", "ve"):
            gradient = jax.grad(lambda x, name=name: world.log_density(x, LEVELS[name]).sum())(x)
            np.testing.assert_allclose(score(world, None, x, LEVELS[name]), gradient, rtol=1e-8, atol=1e-10)  # as above


def test_equal_modules_make_equal_denoisers():
    one, two, other = (from_model(Net(width=w).apply, "eps", DiscreteTime(1000)) for w in (4, 4, 5))
    assert one == two
    assert hash(one) == hash(two)
    assert one != other
    assert one != from_model(Net().apply, "v", DiscreteTime(1000))
    assert one != from_model(Net().apply, "eps", DiscreteTime(100))
    assert one != from_model(Net().apply, "eps")


def test_equal_modules_compile_once():
    count = 0

    @jax.jit
    def denoise(denoiser, params, x, level):
        nonlocal count
        count += 1
        return denoiser(params, x, level, None)

    x, params = normal(0, 3, 2), net_params()
    first = denoise(from_model(Net().apply, "eps", DiscreteTime(1000)), params, x, LEVELS["vp"])
    again = denoise(from_model(Net().apply, "eps", DiscreteTime(1000)), params, x, LEVELS["vp"])
    np.testing.assert_array_equal(first, again)
    assert count == 1
    denoise(from_model(Net().apply, "v", DiscreteTime(1000)), params, x, LEVELS["vp"])
    assert count == 2


# Classifier-free guidance


def conditional(params, x, level, cond):
    """Linear in its condition, so that the right answer is known."""
    return jnp.tanh(x) * level.alpha + cond["shift"] + cond["label"][:, None].astype(x.dtype)


def condition(n):
    return {"shift": normal(2, n, 2), "label": jnp.arange(n) % 3}


NULL = {"shift": np.array([0.5, -0.5], np.float32), "label": 7}


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_cfg(scale):
    x, level = normal(0, 3, 2), LEVELS["vp"]
    null = {"shift": jnp.tile(NULL["shift"], (3, 1)), "label": jnp.full(3, 7)}
    with_cond, without = conditional(None, x, level, condition(3)), conditional(None, x, level, null)
    guided = cfg(conditional, scale, NULL)
    expected = {0.0: without, 1.0: with_cond}.get(scale, 7.5 * with_cond - 6.5 * without)
    # float32 numbers near 10, times 7.5
    np.testing.assert_allclose(guided(None, x, level, condition(3)), expected, rtol=1e-5, atol=1e-5)
    # no condition: the empty one alone, whatever the scale
    np.testing.assert_allclose(guided(None, x, level, None), without, rtol=1e-6)


def test_cfg_of_a_batch_of_levels():
    x, n = normal(0, 3, 2), 3

    def denoiser(params, x, level, cond):
        return level.alpha[:, None] * x + cond[:, None]

    level = LEVELS["training"]
    guided = cfg(denoiser, 3.0, 1.0)(None, x, level, jnp.arange(n, dtype=jnp.float32))
    expected = level.alpha[:, None] * x + 1 + 3 * (np.arange(n)[:, None] - 1)
    np.testing.assert_allclose(guided, expected, rtol=1e-6, atol=1e-6)  # float32


def test_cfg_is_the_same_rule_on_x0_eps_and_v():
    x, level, cond = normal(0, 3, 2), LEVELS["vp"], jnp.array([0, 1, 2])
    params = net_params()
    for prediction in ("eps", "v", "x0"):
        guided = cfg(from_model(Net().apply, prediction), 7.5, 10)(params, x, level, cond)
        t = jnp.full(3, 0.5)
        said, said_null = (Net().apply(params, x, t, c) for c in (cond, jnp.full(3, 10)))
        expected = x0_from_prediction(prediction, x, said_null + 7.5 * (said - said_null), level)
        np.testing.assert_allclose(guided, expected, rtol=1e-4, atol=1e-5)  # float32, times 7.5


def test_cfg_calls_the_network_once_with_twice_the_batch():
    seen = []

    def apply(params, x, t, cond):
        seen.append((x, t, cond))
        return x

    x, cond = normal(0, 3, 2), condition(3)
    cfg(from_model(apply), 7.5, NULL)(None, x, LEVELS["vp"], cond)
    ((x_seen, t, cond_seen),) = seen
    np.testing.assert_array_equal(x_seen, jnp.concatenate([x, x]))
    np.testing.assert_array_equal(t, jnp.full(6, 0.5))
    np.testing.assert_array_equal(cond_seen["shift"], jnp.concatenate([cond["shift"], jnp.tile(NULL["shift"], (3, 1))]))
    np.testing.assert_array_equal(cond_seen["label"], [0, 1, 2, 7, 7, 7])
    assert cond_seen["label"].dtype == cond["label"].dtype
    seen.clear()
    cfg(from_model(apply), 7.5, NULL)(None, x, LEVELS["vp"], None)
    assert [s[0].shape for s in seen] == [(3, 2)]


@pytest.mark.parametrize("null", [10, np.int32(10), np.array(10)])
def test_an_empty_label_stays_an_integer(null):
    # nn.Embed refuses floats; numbers of components become floats under jit
    model = DiffusionModel(cfg(from_model(Net().apply), 7.5, null), VPLinear(), (2,))
    free, empty = (
        guided_sample(net_params(), jax.random.key(0), None, model=model, num_samples=2, cond=cond, num_steps=2).x
        for cond in (None, jnp.array([10, 10]))
    )
    np.testing.assert_allclose(free, empty, rtol=1e-4, atol=1e-5)  # one batch or two of them, float32


def test_a_new_cfg_scale_compiles_nothing():
    count = 0

    def apply(params, x, t, cond):
        nonlocal count
        count += 1  # traces
        return x * cond[:, None]

    def sample(scale, null, schedule):
        model = DiffusionModel(cfg(from_model(apply), scale, null), schedule, (2,))
        cond = jnp.array([0.5, 1.5])
        return guided_sample(None, jax.random.key(0), None, model=model, num_samples=2, cond=cond, num_steps=2).x

    first = sample(7.5, 0.0, VPLinear())
    traces = count
    others = [sample(1.0, 0.0, VPLinear()), sample(1, 1.0, VPLinear()), sample(7.5, 0.0, VPLinear(0.2, 15))]
    assert count == traces
    assert all(not np.array_equal(first, other) for other in others)  # and yet the numbers are used


def test_cfg_scale_can_be_mapped_and_differentiated():
    x, level = normal(0, 3, 2), LEVELS["vp"]

    def guided(scale):
        return cfg(conditional, scale, NULL)(None, x, level, condition(3))

    many = jax.vmap(guided)(jnp.array([0.0, 1.0]))
    slope = jax.jacfwd(guided)(2.0)
    np.testing.assert_allclose(slope, many[1] - many[0], rtol=1e-5, atol=1e-5)  # float32


# Clipping


def test_clipped():
    x = 3 * normal(0, 5, 4)
    identity = from_model(lambda params, x, t, cond: x, "x0")
    np.testing.assert_array_equal(Clipped(identity)(None, x, LEVELS["vp"], None), np.clip(x, -1, 1))
    np.testing.assert_array_equal(Clipped(identity, low=0, high=2)(None, x, LEVELS["vp"], None), np.clip(x, 0, 2))
    inside = Clipped(lambda params, x, level, cond: x * cond)  # a plain function serves
    np.testing.assert_array_equal(inside(None, x, LEVELS["vp"], 0.1), np.clip(0.1 * x, -1, 1))


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995])
def test_thresholded(quantile):
    x = np.asarray(normal(0, 5, 4, 3)) * np.array([0.1, 0.5, 1, 3, 10]).reshape(-1, 1, 1)
    found = Thresholded(lambda params, x, level, cond: x, quantile)(None, jnp.asarray(x), LEVELS["vp"], None)
    expected = np.empty_like(x)
    for i, sample in enumerate(x):  # Saharia et al. 2022, section 2.3, a sample at a time
        s = max(1.0, np.quantile(np.abs(sample), quantile))
        expected[i] = np.clip(sample, -s, s) / s
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # interpolated quantile in float32
    assert (np.abs(found) <= 1).all()


# Models


def test_model_is_checked():
    def denoiser(params, x, level, cond):
        return x

    with pytest.raises(TypeError, match="denoiser must be callable, not float"):
        DiffusionModel(0.5, VPLinear(), (2,))
    with pytest.raises(TypeError, match="schedule must be callable, not str"):
        DiffusionModel(denoiser, "cosine", (2,))
    with pytest.raises(TypeError, match="integer sizes"):
        DiffusionModel(denoiser, VPLinear(), (2.5,))
    with pytest.raises(ValueError, match="at least 1"):
        DiffusionModel(denoiser, VPLinear(), (0, 2))
    assert DiffusionModel(denoiser, VPLinear(), np.array([8, 8])).shape == (8, 8)
    assert DiffusionModel(denoiser, VPLinear(), [8, 8]).shape == (8, 8)
    assert DiffusionModel(denoiser, VPLinear(), 3).shape == (3,)
    with pytest.raises(dataclasses.FrozenInstanceError):
        DiffusionModel(denoiser, VPLinear(), 3).shape = (4,)


def test_model_passes_through_jit():
    model = DiffusionModel(cfg(from_model(Net().apply), 7.5, 10), ScaledLinear(), (2,))
    through = jax.jit(lambda model: model)(model)
    assert through.shape == (2,)
    assert jax.tree.structure(through) == jax.tree.structure(model)
    np.testing.assert_array_equal(through.schedule.alphas_cumprod, model.schedule.alphas_cumprod.astype(np.float32))
    x, params, cond = normal(0, 3, 2), net_params(), jnp.array([0, 1, 2])

    def denoise(model):
        return model.denoiser(params, x, model.schedule(0.5), cond)

    closed = jax.jit(lambda: denoise(model))()
    np.testing.assert_allclose(jax.jit(denoise)(model), closed, rtol=1e-5, atol=1e-6)  # constants fold differently
    np.testing.assert_allclose(denoise(through), closed, rtol=1e-5, atol=1e-6)


def test_plain_functions_are_wrapped():
    def denoiser(params, x, level, cond):
        return params * x

    def schedule(t):
        return Level(t, 1.0, 80.0 * t)

    model = DiffusionModel(denoiser, schedule, (2,))
    assert jax.tree.leaves(model) == []
    assert model == DiffusionModel(denoiser, schedule, [2])
    assert hash(model) == hash(DiffusionModel(denoiser, schedule, [2]))
    x = normal(0, 3, 2)
    np.testing.assert_array_equal(jax.jit(lambda m: m.denoiser(0.5, x, m.schedule(0.5), None))(model), 0.5 * x)
    assert float(model.schedule(0.5).sigma) == 40.0
