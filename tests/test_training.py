"""The denoising loss against closed forms, and `fit` against the posterior mean of a Gaussian."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmdjax import DiffusionModel, Level, Particles, from_model
from mmdjax.denoisers import PREDICTIONS, prediction_from_x0
from mmdjax.schedules import EDM, VE, Cosine, Discrete, RectifiedFlow, VPLinear, diffuse
from mmdjax.training import WEIGHTINGS, EDMLoss, Fitted, MinSNR, UniformTimes, denoising_loss, fit, snr

KEY = jax.random.key(0)
SCHEDULES = [
    VPLinear(),
    Cosine(),
    Discrete(np.linspace(0.95, 0.05, 20)),
    VE(0.01, 5.0),
    EDM(0.002, 10.0),
    RectifiedFlow(),
]
LEVEL = Level(jnp.array([0.2, 0.6]), jnp.array([0.9, 0.4]), jnp.array([0.5, 0.8]))  # not variance preserving


def constant(params, x, t, cond):
    return params + 0 * x


def model_of(apply=constant, prediction="x0", schedule=None, shape=(3,)):
    return DiffusionModel(from_model(apply, prediction), RectifiedFlow() if schedule is None else schedule, shape)


def at(t):
    return lambda key, n: jnp.full(n, t)


@pytest.mark.parametrize("prediction", sorted(WEIGHTINGS))
def test_weight_turns_the_error_of_x0_into_that_of_the_prediction(prediction):
    x0, x0_hat, x = jax.random.normal(KEY, (3, 2, 4))
    said, true = (prediction_from_x0(prediction, x, v, LEVEL) for v in (x0_hat, x0))
    weight = WEIGHTINGS[prediction](LEVEL)[:, None]
    np.testing.assert_allclose(weight * (x0_hat - x0) ** 2, (said - true) ** 2, rtol=1e-4)  # float32, one subtraction


@pytest.mark.parametrize("prediction", PREDICTIONS[:3])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_loss_is_the_mean_squared_error_of_the_prediction(prediction, schedule):
    # a network that says 0 at every input: the error is the mean square of its target
    model = model_of(lambda params, x, t, cond: jnp.zeros_like(x), prediction, schedule)
    x0, t = jax.random.normal(jax.random.key(1), (64, 3)), 0.7
    loss = denoising_loss(None, KEY, x0, model=model, weighting=prediction, times=at(t))
    level = jax.vmap(schedule)(jnp.full(64, t))
    x = diffuse(jax.random.split(KEY, 3)[1], x0, level)
    expected = jnp.mean(prediction_from_x0(prediction, x, x0, level) ** 2)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)  # float32


@pytest.mark.parametrize(
    ("weighting", "factor"),
    [
        ("x0", 1.0),
        ("eps", 1 / 9),  # α = 1/4, σ = 3/4
        ("v", (10 / 16 / 0.75) ** 2),
        ("flow", 16 / 9),
        (MinSNR(5.0), 1 / 9),
        (MinSNR(0.05), 0.05),
        (EDMLoss(0.5), (9 + 0.25) / (3 * 0.5) ** 2),  # s = σ/α = 3: (s² + σ_d²)/(s σ_d)²
        (lambda level: 7.0 + 0 * level.t, 7.0),
    ],
    ids=["x0", "eps", "v", "flow", "minsnr", "minsnr-capped", "edm", "function"],
)
def test_weighting_closed_form(weighting, factor):
    # x̂0 = 1 for x0 = 3: the squared error is 4 whatever the noise
    loss = denoising_loss(1.0, KEY, jnp.full((8, 3), 3.0), model=model_of(), weighting=weighting, times=at(0.75))
    np.testing.assert_allclose(loss, 4 * factor, rtol=1e-5)


def test_min_snr_meets_eps_and_x0_weights_at_its_ends():
    np.testing.assert_allclose(MinSNR(jnp.inf)(LEVEL), snr(LEVEL))
    np.testing.assert_allclose(MinSNR(1e-6)(LEVEL), 1e-6)


def test_times_are_uniform_and_evenly_spread():
    t = np.sort(UniformTimes(0.1)(KEY, 100))
    assert t[0] >= 0.1
    assert t[-1] <= 1
    np.testing.assert_allclose(np.diff(t), 0.9 / 100, rtol=1e-3)  # float32
    means = jax.vmap(lambda key: UniformTimes()(key, 4).mean())(jax.random.split(KEY, 400))
    np.testing.assert_allclose(means.mean(), 0.5005, atol=4 * means.std() / 20)  # 4 standard errors


def linear(params, x, t, cond):
    return params["a"] * x + params["b"]


@pytest.mark.parametrize("prediction", ["x0", pytest.param("eps", marks=pytest.mark.slow)])
def test_fit_finds_the_posterior_mean_of_a_gaussian(prediction):
    # x0 ~ N(m, s²), one level: E[x0|x] = m + α s² (x − α m) / (α² s² + σ²), linear in x for every prediction
    m, s, level = 1.5, 0.5, RectifiedFlow()(0.4)
    data = m + s * jax.random.normal(jax.random.key(3), (4000, 1))
    m, s = data.mean(), data.std()
    model = model_of(linear, prediction, shape=(1,))
    start = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    fitted = fit(
        start, KEY, data, model=model, num_steps=1500, batch_size=512, ema=0.99, times=at(0.4), weighting=prediction,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.05, 1500)), progress=False,
    )  # fmt: skip
    x = jnp.array([[-1.0], [0.5], [2.0]])
    gain = level.alpha * s**2 / (level.alpha**2 * s**2 + level.sigma**2)
    exact = m + gain * (x - level.alpha * m)
    # the noise of 1,500 minibatches of 512 at a decaying rate leaves about .005
    np.testing.assert_allclose(model.denoiser(fitted.ema_params, x, level, None), exact, atol=0.03)


def test_average_is_geometric():
    # the gradient of a linear loss is constant, so plain gradient descent gives params_k = params_0 − k/4
    def slope(params, x, level, cond):
        return x * 0 + jnp.sqrt(params)

    model = DiffusionModel(slope, RectifiedFlow(), (1,))  # ‖√p − 0‖² = p, gradient 1
    decay, steps = 0.8, 7
    fitted = fit(
        jnp.array(9.0), KEY, jnp.zeros((4, 1)), model=model, num_steps=steps, ema=decay, weighting="x0", chunk=3,
        optimizer=optax.sgd(0.25), progress=False,
    )  # fmt: skip
    path = 9.0 - 0.25 * np.arange(steps + 1)
    expected = decay**steps * path[0] + (1 - decay) * sum(decay ** (steps - k) * path[k] for k in range(1, steps + 1))
    np.testing.assert_allclose(fitted.params, path[-1], rtol=1e-5)
    np.testing.assert_allclose(fitted.ema_params, expected, rtol=1e-5)
    np.testing.assert_allclose(fitted.losses, path[:-1], rtol=1e-5)


def run(num_steps=6, seed=0, chunk=4, **kwargs):
    data = jax.random.normal(jax.random.key(5), (16, 3))
    start = {"a": jnp.zeros(()), "b": jnp.zeros(3)}
    kwargs = {"model": model_of(linear), "batch_size": 4, "progress": False} | kwargs
    return fit(start, jax.random.key(seed), data, num_steps=num_steps, chunk=chunk, **kwargs)


@pytest.mark.slow
def test_seed_reproduces_and_longer_runs_and_chunks_agree():
    first = run()
    assert isinstance(first, Fitted)
    np.testing.assert_array_equal(first.losses, run().losses)
    np.testing.assert_array_equal(first.losses, run(num_steps=9).losses[:6])
    np.testing.assert_array_equal(first.losses, run(chunk=2).losses)
    assert not np.allclose(first.losses, run(seed=1).losses)
    assert jax.tree.structure(first.params) == jax.tree.structure(first.ema_params)


def test_dropping_replaces_cond_at_its_rate():
    # x̂0 = cond, x0 = 0 and the null is 2: the x0 loss is 4 × the dropped share
    model = model_of(lambda params, x, t, cond: 0 * x + cond[:, None])
    x0, cond = jnp.zeros((20_000, 3)), jnp.zeros(20_000)

    def loss(rate):
        return denoising_loss(None, KEY, x0, cond, model=model, weighting="x0", null_cond=2.0, drop_cond=rate)

    assert float(loss(0.0)) == 0.0
    assert float(loss(1.0)) == 4.0
    np.testing.assert_allclose(loss(0.15) / 4, 0.15, atol=4 * np.sqrt(0.15 * 0.85 / 20_000))  # 4 standard errors


def test_dropping_takes_a_whole_sample_of_a_tree_and_keeps_its_dtypes():
    seen = []

    def apply(params, x, t, cond):
        seen.append(cond)
        return x

    cond = {"label": jnp.arange(1, 9), "text": jnp.ones((8, 5, 2))}
    null = {"label": 0, "text": np.zeros((5, 2))}
    denoising_loss(None, KEY, jnp.zeros((8, 3)), cond, model=model_of(apply), null_cond=null, drop_cond=0.5)
    assert seen[0]["label"].dtype == cond["label"].dtype
    np.testing.assert_array_equal(seen[0]["text"].mean((1, 2)), seen[0]["label"] > 0)


def test_weights_of_the_data_decide_what_is_drawn():
    data = Particles(jnp.array([[1.0], [5.0]]), weight=jnp.array([0.0, 3.0]))
    fitted = fit(
        jnp.zeros(()), KEY, data, model=model_of(shape=(1,)), num_steps=300, weighting="x0", optimizer=optax.adam(0.1),
        progress=False,
    )  # fmt: skip
    np.testing.assert_allclose(fitted.params, 5.0, atol=0.01)


def test_augment_changes_the_batch():
    def double(key, batch):
        return Particles(2 * batch.x, batch.cond)

    fitted = fit(
        jnp.zeros(()), KEY, jnp.ones((4, 1)), model=model_of(shape=(1,)), num_steps=300, weighting="x0",
        optimizer=optax.adam(0.1), augment=double, progress=False,
    )  # fmt: skip
    np.testing.assert_allclose(fitted.params, 2.0, atol=0.01)


def test_bar_moves(capsys):
    run(progress=True)
    assert "6/6" in capsys.readouterr().err


def bad(message, error=ValueError, **kwargs):
    return pytest.param(error, message, kwargs, id=next(COUNT).__str__() + message[:12])


COUNT = itertools.count()


@pytest.mark.parametrize(
    ("error", "message", "kwargs"),
    [
        bad(r"num_steps is 0; give an integer", num_steps=0),
        bad(r"batch_size is -1", batch_size=-1),
        bad(r"chunk is 0", chunk=0),
        bad(r"ema is 1.0; give a decay in \[0, 1\)", ema=1.0),
        bad(r"drop_cond is 1.5; it is a probability", drop_cond=1.5),
        bad(r"cond is None and null_cond None; give both", drop_cond=0.1),
        bad(r"data has shape \(16, 3\) but the model is of shape \(4,\)", model=model_of(shape=(4,))),
        bad(
            r"the loss is nan at step 0; lower the learning rate",
            FloatingPointError,
            weighting=lambda level: jnp.nan * level.t,
        ),
    ],
)
def test_bad_numbers_name_value_and_remedy(error, message, kwargs):
    with pytest.raises(error, match=message):
        run(**kwargs)


def test_bad_data_and_params():
    model = model_of(linear)
    start = {"a": jnp.zeros(()), "b": jnp.zeros(3)}
    with pytest.raises(ValueError, match=r"data is NaN or infinite in rows \[1\]"):
        fit(start, KEY, jnp.zeros((2, 3)).at[1].set(jnp.nan), model=model, num_steps=1)
    with pytest.raises(TypeError, match="data has dtype uint8"):
        fit(start, KEY, jnp.zeros((2, 3), jnp.uint8), model=model, num_steps=1)
    with pytest.raises(TypeError, match=r"jax.random.key\(seed\)"):
        fit(start, jax.random.PRNGKey(0), jnp.zeros((2, 3)), model=model, num_steps=1)
    with pytest.raises(ValueError, match=r"params must be a pytree of float arrays; the dtypes are \['int32'"):
        fit({"a": jnp.zeros((), jnp.int32)}, KEY, jnp.zeros((2, 3)), model=model, num_steps=1)
    with pytest.raises(ValueError, match=r"cond has shape \(3,\); it needs one row for each of the 2"):
        denoising_loss(start, KEY, jnp.zeros((2, 3)), jnp.zeros(3), model=model)
    with pytest.raises(ValueError, match="weighting is 'snr'; choose of"):
        denoising_loss(start, KEY, jnp.zeros((2, 3)), model=model, weighting="snr")


def checkpointed(path, num_steps, **settings):
    data = Particles(jax.random.normal(KEY, (16, 3)))
    settings = {"optimizer": optax.adam(0.05), "chunk": 4, "progress": False} | settings
    return fit(jnp.zeros(3), KEY, data, model=model_of(), num_steps=num_steps, checkpoint=path, **settings)


def test_stopped_training_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("mmdjax.training.SECONDS", 0)
    whole = checkpointed(None, 20)
    calls = iter(range(3))  # two checkpoints are written, then the process dies
    real = np.concatenate

    def dies(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr("mmdjax.training.np.concatenate", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpointed(tmp_path / "training", 20)
    monkeypatch.setattr("mmdjax.training.np.concatenate", real)
    resumed = checkpointed(tmp_path / "training", 20)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [path.name for path in tmp_path.iterdir()] == ["training"]


def test_more_steps_train_on_from_the_checkpoint(tmp_path):
    checkpointed(tmp_path / "training", 8)
    np.testing.assert_array_equal(checkpointed(tmp_path / "training", 12).params, checkpointed(None, 12).params)


def test_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "training"
    checkpointed(path, 4)
    kept = path.read_bytes()
    with pytest.raises(FileExistsError, match="batch_size was 128 and is 64"):
        checkpointed(path, 4, batch_size=64)
    with pytest.raises(FileExistsError, match="optimizer"):
        checkpointed(path, 4, optimizer=optax.adam(0.1))
    assert path.read_bytes() == kept
    path.write_text("notes")
    with pytest.raises(FileExistsError, match="holds no training"):
        checkpointed(path, 4)
    assert path.read_text() == "notes"


def test_checkpoint_with_fewer_steps_than_done_is_refused(tmp_path):
    checkpointed(tmp_path / "training", 8)
    with pytest.raises(FileExistsError, match=r"8 steps, num_steps is 4"):
        checkpointed(tmp_path / "training", 4)
