"""The metrics against torch-fidelity, prdc, scikit-learn, SciPy and vendi-score, all in float64."""

import importlib
import sys
from unittest import mock

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from mmdjax import RBF, Cosine
from mmdjax.metrics import (
    density_coverage,
    energy_distance,
    frechet_distance,
    kid,
    nearest_neighbour_accuracy,
    nearest_ratio,
    precision_recall,
    rke,
    vendi,
)

torch = pytest.importorskip("torch", reason="parity needs torch")
prdc = pytest.importorskip("prdc", reason="parity needs prdc")
sklearn = pytest.importorskip("sklearn", reason="parity needs scikit-learn")
vendi_score = pytest.importorskip("vendi_score.vendi", reason="parity needs vendi-score")

from sklearn.metrics.pairwise import rbf_kernel  # noqa: E402
from sklearn.model_selection import LeaveOneOut, cross_val_predict  # noqa: E402
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors  # noqa: E402


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def fidelity(name):
    """A module of torch-fidelity. It imports torchvision, for pictures only and not for what is used here."""
    pictures = ("torchvision", *(f"torchvision.{part}" for part in ("datasets", "transforms", "transforms.functional")))
    with pytest.MonkeyPatch.context() as patch:
        for module in pictures:
            patch.setitem(sys.modules, module, mock.MagicMock())
        return importlib.import_module(f"torch_fidelity.{name}")


def features(n, m, d, seed=0):
    """Two sets that overlap, with decaying variances and other means."""
    rng = np.random.default_rng(seed)
    spectrum = 1 / np.arange(1, d + 1) ** 0.5
    x, y = rng.normal(size=(n, d)) * spectrum, rng.normal(size=(m, d)) * spectrum[::-1] ** 0.3 * spectrum**0.7
    return x + 0.2, y


def test_kid():
    x, y = features(300, 300, 64)
    theirs = fidelity("metric_kid").kid_features_to_metric(
        torch.tensor(x), torch.tensor(y), kid_subsets=1, kid_subset_size=300, verbose=False
    )
    value = float(kid(x, y).value)
    assert value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)
    with jax.enable_x64(False):
        single = float(kid(x.astype(np.float32), y.astype(np.float32)).value)
    assert single == pytest.approx(value, abs=1e-6)  # of kernel values of 1 to 2


@pytest.mark.parametrize(("n", "m"), [(3000, 2500), (100, 120)], ids=["full rank", "fewer than d"])
def test_frechet_distance(n, m):
    x, y = features(n, m, 256)
    metric = fidelity("metric_fid")
    statistics = [metric.fid_features_to_statistics(torch.tensor(v)) for v in (x, y)]
    theirs = metric.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    s_x, s_y = np.cov(x.T), np.cov(y.T)
    traces = np.trace(s_x) + np.trace(s_y)
    value = float(frechet_distance(x, y))
    # their eigenvalues of Σ_x Σ_y that are 0 come out at 1e-16, the roots of which are 1e-8 each
    assert value == pytest.approx(theirs, abs=1e-10 if n > 256 else 256 * 1e-8)
    if n > 256:
        root = scipy.linalg.sqrtm(s_x @ s_y)
        assert value == pytest.approx(((x.mean(0) - y.mean(0)) ** 2).sum() + traces - 2 * np.trace(root).real, rel=1e-9)
    with jax.enable_x64(False):
        single = float(frechet_distance(x.astype(np.float32), y.astype(np.float32)))
    assert single == pytest.approx(value, abs=1e-6 * traces)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_density_coverage(k):
    x, y = features(500, 700, 16)
    theirs = prdc.compute_prdc(real_features=y, fake_features=x, nearest_k=k)
    assert min(theirs.values()) > 0
    precision, recall = precision_recall(x, y, k=k)
    density, coverage = density_coverage(x, y, k=k)
    ours = {"precision": precision, "recall": recall, "density": density, "coverage": coverage}
    assert {name: float(value) for name, value in ours.items()} == pytest.approx(theirs, rel=1e-12)


def test_precision_recall_of_torch_fidelity():
    x, y = features(500, 700, 16)
    theirs = fidelity("metric_prc").prc_features_to_metric(torch.tensor(x), torch.tensor(y), verbose=False)
    precision, recall = precision_recall(x, y)
    assert (float(precision), float(recall)) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)


def test_nearest_neighbour_accuracy():
    x, y = features(200, 200, 16)
    pooled, label = np.concatenate([x, y]), np.repeat([0, 1], 200)
    guess = cross_val_predict(KNeighborsClassifier(1), pooled, label, cv=LeaveOneOut())
    assert float(nearest_neighbour_accuracy(x, y)) == pytest.approx((guess == label).mean(), rel=1e-12)


def test_nearest_ratio():
    x, y = features(200, 300, 16)
    refs, fresh = y[:100], y[100:]
    near = NearestNeighbors(n_neighbors=1).fit(refs)
    theirs = near.kneighbors(x)[0].mean() / near.kneighbors(fresh)[0].mean()
    assert float(nearest_ratio(x, refs, fresh)) == pytest.approx(theirs, rel=1e-10)


def test_energy_distance():
    x, y = features(200, 300, 1)
    theirs = scipy.stats.energy_distance(x[:, 0], y[:, 0]) ** 2  # SciPy takes the root
    assert float(energy_distance(x, y, estimator="v")) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0])
def test_vendi(order):
    x, _ = features(200, 1, 32)
    assert float(vendi(Cosine(), x, order=order)) == pytest.approx(vendi_score.score_dual(x, q=order), rel=1e-9)
    gram = rbf_kernel(x, gamma=1 / 8)
    entropy = vendi_score.entropy_q(scipy.linalg.eigvalsh(vendi_score.weight_K(gram)), q=order)
    assert float(vendi(RBF(2.0), x, order=order)) == pytest.approx(np.exp(entropy), rel=1e-9)


def test_rke():
    x, _ = features(200, 1, 32)
    spectrum = scipy.linalg.eigvalsh(vendi_score.weight_K(rbf_kernel(x, gamma=1 / 8)))
    assert float(rke(RBF(2.0), x)) == pytest.approx(np.exp(vendi_score.entropy_q(spectrum, q=2)), rel=1e-9)
