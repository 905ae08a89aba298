"""The shipped digits and their denoiser: what they are, and how good."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from mmdjax import Energy, guided_sample, mmd2
from mmdjax.digits import DEFAULT_WEIGHTS, NULL_CLASS, load_digits, load_weights, save_weights, slant, splits, thicken


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_splits_are_the_seeded_permutation():
    (train, train_labels), (held_out, held_out_labels) = splits()
    assert train.shape == (1200, 8, 8, 1)
    assert held_out.shape == (597, 8, 8, 1)
    assert train.dtype == held_out.dtype == np.float32
    for images in (train, held_out):
        assert images.min() == -1
        assert images.max() == 1
        np.testing.assert_array_equal((images + 1) * 8, np.round((images + 1) * 8))  # 17 grey levels
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    order = np.random.RandomState(0).permutation(1797)
    np.testing.assert_array_equal(np.concatenate([train, held_out])[..., 0], sklearn.images[order] / 8 - 1)
    np.testing.assert_array_equal(np.concatenate([train_labels, held_out_labels]), sklearn.target[order])


def test_splits_are_copies():
    splits()[0][0][:] = 0
    assert splits()[0][0].min() == -1


def test_import_is_cheap_and_use_needs_no_sklearn():
    code = (
        "import sys, mmdjax.digits, mmdjax.training\n"
        "assert not {'flax', 'optax', 'tqdm', 'safetensors'} & set(sys.modules)\n"
        "mmdjax.digits.load_digits(), mmdjax.digits.splits()\n"
        "assert 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_two_loads_are_one_to_jit(digits):
    (model, params), (again, params_again) = digits, load_digits()
    assert jax.tree.structure(model) == jax.tree.structure(again)
    jax.tree.map(np.testing.assert_array_equal, params, params_again)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    traced = []

    @jax.jit
    def run(model, params, x):
        traced.append(1)
        return model.denoiser(params, x, model.schedule(0.5), None)

    run(model, params, jnp.zeros((2, 8, 8, 1)))
    run(again, params_again, jnp.zeros((2, 8, 8, 1)))
    assert len(traced) == 1


def test_weights_tell_where_they_came_from(tmp_path, digits):
    assert DEFAULT_WEIGHTS.stat().st_size < 2_000_000
    with safe_open(DEFAULT_WEIGHTS, "np") as file:
        metadata = file.metadata()
    assert {"script", "commit", "seed", "steps", "versions", "data"} <= set(metadata)
    save_weights(tmp_path / "copy.safetensors", digits[1], metadata)
    jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path / "copy.safetensors"), digits[1])


def test_no_condition_is_the_null_class(digits):
    model, params = digits
    x = jax.random.normal(jax.random.key(0), (10, 8, 8, 1))
    level = model.schedule(0.8)
    without = model.denoiser(params, x, level, None)
    np.testing.assert_array_equal(without, model.denoiser(params, x, level, jnp.full(10, NULL_CLASS)))
    assert float(jnp.abs(without - model.denoiser(params, x, level, jnp.arange(10))).mean()) > 0.05


def test_denoiser_is_the_image_at_the_clean_end(digits):
    model, params = digits
    images = jnp.asarray(splits()[1][0][:50])
    np.testing.assert_allclose(model.denoiser(params, images, model.schedule(0.0), None), images, atol=1e-6)
    # and near the mean of the training images at the noisy one, where x_t says nothing
    x = jax.random.normal(jax.random.key(1), images.shape)
    guess = model.denoiser(params, x, model.schedule(1.0), None).mean(0)
    assert float(jnp.abs(guess - splits()[0][0].mean(0)).mean()) < 0.05


def samples_of(digits, n, seed, cond=None):
    model, params = digits
    return np.asarray(guided_sample(params, jax.random.key(seed), None, model=model, num_samples=n, cond=cond).x)


def nearest(a, b):
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    d2 = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(d2.min(1).clip(0)), d2.argmin(1)


def energy(draws, held_out, estimator):
    distance = jax.jit(lambda a, b: mmd2(Energy(), a, b, estimator=estimator))
    return float(np.mean([distance(jnp.asarray(x), jnp.asarray(held_out)) for x in draws]))


@pytest.fixture(scope="module")
def draws(digits):
    return samples_of(digits, 2000, seed=0).reshape(10, 200, 8, 8, 1)


def training_draws():
    rows = np.random.default_rng(0)
    return [splits()[0][0][rows.choice(1200, 200, replace=False)] for _ in range(10)]


def test_samples_stay_as_near_to_unseen_digits_as_they_were(draws):
    # A guard against getting worse, not a statement of quality: .0247 over eight seeds, standard deviation .0025.
    assert energy(draws, splits()[1][0], "u") <= 0.033


@pytest.mark.xfail(strict=True, reason="energy .025 against .003 for training images; see the comment")
def test_samples_are_as_near_to_unseen_digits_as_training_images_are(draws):
    # Fifty steps of DDIM(eta=1) with the exact posterior mean of the training images, which copies them, give .010: no
    # network meets this with the default sampler. For the training images the ten draws leave a standard error of .004.
    held_out = splits()[1][0]
    assert energy(draws, held_out, "u") <= 1.5 * energy(training_draws(), held_out, "u")


def test_samples_are_not_copies_of_training_images(draws):
    (train, _), (held_out, _) = splits()
    distance = nearest(draws.reshape(-1, 8, 8, 1), train)[0].mean()
    assert distance >= 0.8 * nearest(held_out, train)[0].mean()


def test_samples_have_their_class(digits):
    (train, train_labels), _ = splits()
    labels = jnp.arange(200) % 10
    _, index = nearest(samples_of(digits, 200, seed=1, cond=labels), train)
    assert (train_labels[index] == labels).mean() > 0.9


def test_pens():
    images = splits()[1][0][:20]
    for style in (thicken, slant):
        out = style(images)
        assert out.dtype == np.float32
        assert out.min() >= -1
        assert out.max() <= 1
        np.testing.assert_array_equal(style(jnp.asarray(images)), out)
        np.testing.assert_array_equal(style(images, 0.0), images)
    assert (thicken(images) >= images).all()
    # leaning to the left is leaning to the right in a mirror
    np.testing.assert_allclose(slant(images, -0.4), slant(images[:, :, ::-1], 0.4)[:, :, ::-1], atol=1e-6)
