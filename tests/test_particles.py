"""Weighted point sets."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from mmdjax import Particles
from mmdjax._points.particles import as_particles, check_points, flat, per_sample, wide_dtype, widen


def test_weights_are_normalised():
    x = jnp.zeros((4, 2))
    np.testing.assert_allclose(Particles(x).probabilities(), [0.25] * 4)
    np.testing.assert_allclose(Particles(x, weight=[1, 3, 0, 4]).probabilities(), [1 / 8, 3 / 8, 0, 1 / 2], rtol=1e-6)
    assert Particles(x, weight=jnp.zeros(4)).probabilities().tolist() == [0.0] * 4  # an empty memory, not NaN
    gradient = jax.grad(lambda w: Particles(x, weight=w).probabilities()[0])(jnp.array([1.0, 3.0, 0.0, 4.0]))
    np.testing.assert_allclose(gradient, [7 / 64, -1 / 64, -1 / 64, -1 / 64], rtol=1e-6)  # of w_0 / Σ w


def test_points_as_particles():
    x = np.zeros((3, 2))
    assert as_particles(x).x is x
    p = Particles(x)
    assert as_particles(p) is p
    assert as_particles({"a": x, "b": x}).n == 3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32, jnp.uint8, bool])
def test_computing_is_at_least_in_float32(dtype):
    x = jnp.ones((2, 3), dtype)
    assert wide_dtype(x) == flat(x).dtype == Particles(x).probabilities().dtype == jnp.float32
    with jax.enable_x64(True):
        assert wide_dtype(x) == jnp.float32
        assert wide_dtype({"a": x, "b": jnp.ones(2)}) == jnp.float64


def test_widen_leaves_all_but_half_precision_alone():
    wide = widen(Particles(jnp.ones((2, 3), jnp.bfloat16), {"label": jnp.arange(2), "text": jnp.ones(2, "f2")}))
    assert (wide.x.dtype, wide.cond["label"].dtype, wide.cond["text"].dtype) == (jnp.float32, jnp.int32, jnp.float32)
    assert wide.weight is None


def test_flat_keeps_each_number_of_each_sample():
    tree = {"a": jnp.arange(12.0).reshape(3, 2, 2), "b": jnp.array([7, 8, 9])}
    assert flat(tree)[1].tolist() == [4, 5, 6, 7, 8]
    assert flat(jnp.arange(3.0)).shape == (3, 1)


def test_per_sample_lines_up_with_the_first_axis():
    x = jnp.ones((2, 3, 4))
    assert (per_sample(jnp.array([2.0, 5.0]), x) * x)[:, 0, 0].tolist() == [2, 5]
    assert per_sample(3.0, x).shape == ()


X = np.ones((3, 2), np.float32)
BAD = [
    (Particles(None), ValueError, "refs is None; give an array"),
    (Particles({}), ValueError, "refs has no arrays"),
    (Particles(X[:0]), ValueError, r"refs is empty \(shape \(0, 2\)\)"),
    (Particles(X, cond=np.ones((4, 2))), ValueError, r"\(3, 2\).*\(4, 2\)"),
    (Particles(X, weight=np.ones(2)), ValueError, r"\(3, 2\).*\(2,\)"),
    (Particles({"a": X, "b": X[:2]}), ValueError, r"\(3, 2\).*\(2, 2\)"),
    (Particles(np.float32(1)), ValueError, "one row for each sample"),
    (Particles(np.array([[0.0], [np.nan], [np.inf]])), ValueError, r"rows \[1, 2\]"),
    (Particles(np.array([[0.0], [np.nan]], ml_dtypes.bfloat16)), ValueError, r"rows \[1\]"),
    (Particles(np.full((30, 1), np.nan)), ValueError, r"rows \[0, 1, .*30 in all"),
    (Particles(X, cond=np.array([0.0, 1.0, np.nan])), ValueError, r"refs.cond is NaN or infinite in rows \[2\]"),
    (Particles(X, weight=np.array([1.0, -1.0, 1.0])), ValueError, "non-negative"),
    (Particles(X, weight=np.zeros(3)), ValueError, "not all zero"),
    (Particles(X, weight=np.array([1.0, np.nan, 1.0])), ValueError, "finite"),
    (Particles(X.astype(np.uint8)), TypeError, "uint8.*127.5"),
]


@pytest.mark.parametrize(("points", "error", "message"), BAD)
def test_bad_points_are_named(points, error, message):
    with pytest.raises(error, match=message):
        check_points("refs", points, floats=True)


def test_good_points_pass():
    check_points(
        "refs", Particles(X, cond={"label": np.arange(3), "text": np.ones((3, 7))}, weight=np.array([0, 1, 2]))
    )
    check_points("labels", Particles(np.arange(3)))
    jax.jit(lambda x: check_points("refs", Particles(x)))(np.full((2, 2), np.nan))  # traced values are not looked at
    with pytest.raises(ValueError, match="one row for each sample"):
        jax.jit(lambda x, w: check_points("refs", Particles(x, weight=w)))(X, np.ones(2))  # shapes are


def test_values_that_squares_cannot_hold_are_named():
    for x, message in (
        (np.float32([[1.0, 2.0], [1e20, 0.0]]), r"refs has values up to 1e\+20 in rows \[1\], so far apart .*scale"),
        (np.full((2, 4000), 2e17, np.float32), "squared distances overflow in float32"),
    ):
        with pytest.raises(ValueError, match=message):
            check_points("refs", Particles(x))
        check_points("refs", Particles(np.vstack([x, X[:1, :1] + 0 * x[:1]]), weight=np.array([0] * len(x) + [1])))
    with jax.enable_x64(True):
        check_points("refs", Particles(np.array([[1e20], [0.0]])))  # float64 holds them
    with pytest.raises(ValueError, match=r"weight is at most 1e-39, which float32 cannot hold"):
        check_points("refs", Particles(X, weight=np.full(3, 1e-39)))
    check_points("refs", Particles(X, weight=np.full(3, 60_000, np.float16)))  # their sum is no float16


class Foreign:
    """What numpy reads: torch tensors and pandas frames."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        if self.array is None:
            raise RuntimeError("can't convert cuda:0 device type tensor to numpy")
        return self.array


def test_foreign_arrays_are_read_as_numpy_does():
    points = as_particles(Particles(Foreign(X), cond={"label": Foreign(np.arange(3))}, weight=[1, 0, 2]))
    assert points.x is X
    assert points.cond["label"].tolist() == [0, 1, 2]
    assert isinstance(points.weight, np.ndarray)
    check_points("refs", points)
    assert as_particles({"a": X, "b": [X, Foreign(X)]}).x["b"][1] is X


PICTURE = Image.new("RGB", (2, 2))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (Foreign(None), "refs is a test_particles.Foreign that numpy cannot read .can't convert cuda"),
        (Foreign(np.array(["a", 1], object)), "which numpy reads as object"),
        ([PICTURE, PICTURE], r"refs holds a PIL.Image.*mmdjax\.sd\.pictures"),
        ("refs/a.png", r"refs holds a str.*mmdjax\.sd\.pictures"),
        ([Path("a.png")], r"refs holds a pathlib\..*mmdjax\.sd\.pictures"),
        ([3] * 32, r"refs holds the number 3 where an array is needed; give np\.asarray\(refs\)"),
        (Particles(X, cond=[3] * 3), r"refs.cond holds the number 3"),
        (np.array(["a", "b"]), "refs has dtype <U1"),
        (Particles(X, cond=np.array([None, 1, 2])), "refs.cond has dtype object"),
        (object(), "refs holds a object"),
    ],
)
def test_what_holds_no_numbers_is_named(points, message):
    with pytest.raises(TypeError, match=message):
        as_particles(points)
