"""MMD² of the samples alone at each condition."""

import jax
import numpy as np
import pytest

from mmdjax import RBF, Delta, Energy, Particles, Product, mmd2
from mmdjax._points import blocks
from mmdjax.conditional import mmd2_by_condition

DRAW = np.random.default_rng(0)
X, Y = DRAW.normal(size=(7, 2)).astype(np.float32), DRAW.normal(size=(9, 2)).astype(np.float32) + 0.5
OURS, THEIRS = np.array([0, 0, 0, 1, 1, 2, 3]), np.array([0, 0, 1, 1, 1, 1, 2, 2, 4])
BY_LABEL = Product(x=RBF(1.0), cond=Delta())


@jax.jit
def both(kernel, p, q):
    """MMD² at each condition, and of the pairs."""
    return mmd2_by_condition(kernel, p, q), mmd2(kernel, p, q, estimator="u")


def dense(gram, x, y, estimator="u"):
    """MMD² of arrays."""
    own = []
    for v in (x, y):
        k, n = gram(v, v), len(v)
        own.append((k.sum() - np.trace(k)) / (n * (n - 1)) if estimator == "u" else k.mean())
    return own[0] + own[1] - 2 * gram(x, y).mean()


def distance(a, b):
    return np.linalg.norm(np.float64(a)[:, None] - np.float64(b)[None], axis=-1)


def rbf(a, b):
    return np.exp(-(distance(a, b) ** 2) / 2)


def of_labels(labels, gram=rbf, **how):
    """The mean over labels, each by its share of X."""
    parts = [dense(gram, X[label == OURS], Y[label == THEIRS], **how) for label in labels]
    return np.average(parts, weights=[(label == OURS).sum() for label in labels])


@pytest.mark.parametrize("in_blocks", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("estimator", "known"), [("u", [0, 1]), ("v", [0, 1, 2])])
def test_is_the_mean_of_the_labels(estimator, known, in_blocks, monkeypatch):
    """Of those that enough points of both sets have; label 3 has none of Y."""
    if in_blocks:  # of 32 rows, and some twice
        monkeypatch.setattr(blocks, "PLAIN", 64)
        monkeypatch.setattr(blocks, "CACHED", 64)
        x, ours, y, theirs = (np.concatenate([v] * 6) for v in (X, OURS, Y, THEIRS))
        weights = [np.repeat([1.0, 0.0], [len(v), 5 * len(v)]) for v in (X, Y)]
        p, q = Particles(x, ours, weights[0]), Particles(y, theirs, weights[1])
    else:
        p, q = Particles(X, OURS), Particles(Y, THEIRS)
    found = mmd2_by_condition(BY_LABEL, p, q, estimator=estimator)
    assert float(found) == pytest.approx(of_labels(known, estimator=estimator), rel=1e-4)


def test_energy_distance_of_the_labels():
    found = mmd2_by_condition(Product(x=Energy(), cond=Delta()), Particles(X, OURS), Particles(Y, THEIRS))
    assert float(found) == pytest.approx(of_labels([0, 1], lambda a, b: -distance(a, b)), rel=1e-4)


def test_shares_of_the_conditions_do_not_count():
    """Where both sets are alike at each condition it is near 0, and MMD² of the pairs is not."""
    cond = np.repeat([0, 1], [240, 80])
    x = np.float32(DRAW.normal(size=(640, 2)) + 3 * np.concatenate([cond, 1 - cond])[:, None])
    p, q = Particles(x[:320], cond), Particles(x[320:], 1 - cond)
    found, of_pairs = both(BY_LABEL, p, q)
    assert abs(float(found)) < 0.02
    assert float(of_pairs) > 0.05


def test_one_condition_is_mmd2():
    found = mmd2_by_condition(BY_LABEL, Particles(X, 0 * OURS), Particles(Y, 0 * THEIRS))
    assert float(found) == pytest.approx(dense(rbf, X, Y), rel=1e-4)
    plain, expected = both(RBF(1.0), X, Y)
    assert plain == expected


def test_conditions_that_are_alike_lend_each_other_points():
    """Each sample has a condition of its own: unknown where these are far apart, known where they are near."""
    own = lambda spread: (Particles(X, spread * np.arange(7.0)), Particles(Y, spread * np.arange(9.0)))
    kernel = Product(x=RBF(1.0), cond=RBF(1.0))
    assert np.isnan(mmd2_by_condition(kernel, *own(9.0)))
    assert float(mmd2_by_condition(kernel, *own(1e-3))) == pytest.approx(dense(rbf, X, Y), abs=1e-3)
