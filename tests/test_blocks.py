"""Blocks of rows: each row and each pair once, and singular values without squaring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax import Particles
from mmdjax._points import blocks
from mmdjax._points.blocks import num_blocks, rows, sum_across, sum_within, triangle

BLOCK = 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", BLOCK)


@pytest.mark.parametrize("n", [1, BLOCK, BLOCK + 1, 3 * BLOCK - 1])
def test_each_row_is_fresh_once(n):
    parts = [rows(n, i) for i in range(num_blocks(n))]
    fresh = np.concatenate([np.asarray(block.index)[np.asarray(block.fresh)] for block in parts])
    np.testing.assert_array_equal(fresh, np.arange(n))
    assert {block.index.shape for block in parts} == {parts[0].index.shape}
    x = jnp.arange(n)
    for block in parts:
        np.testing.assert_array_equal(block.of(x), block.index)
        np.testing.assert_array_equal(block.put(x, -block.of(x))[block.index], -block.index)


@pytest.mark.parametrize("self_pairs", [True, False])
def test_each_pair_is_summed_once(self_pairs):
    """With k(x, y) = xy all sums are products of sums; whole numbers, so exact."""
    n, m = 2 * BLOCK + 3, BLOCK + 1
    x, y = (Particles(jnp.arange(k)[:, None] % 5 - 2.0) for k in (n, m))
    u, v = (jnp.arange(k) % 3.0 for k in (n, m))

    def gram(a, b, *, same=False):
        return a.x @ b.x.T

    def form(k, u, v):
        return u @ k @ v

    across = jax.jit(lambda: sum_across(gram, form, x, y, u, v))()
    within = jax.jit(lambda: sum_within(gram, form, x, u, self_pairs=self_pairs))()
    assert across == (u @ x.x * (v @ y.x)).item()
    assert within == ((u @ x.x) ** 2 - (0 if self_pairs else ((u[:, None] * x.x) ** 2).sum())).item()


@pytest.mark.parametrize("n", [3, 50, 2 * BLOCK + 7])
def test_triangle_keeps_small_singular_values(n):
    """From 1 to 1e-5 in float32; those of the squared matrix would end at 3e-4."""
    rng = np.random.default_rng(0)
    a = np.linalg.qr(rng.normal(size=(n, min(n, 6))))[0] * np.logspace(0, -5, min(n, 6))
    a = (a @ np.linalg.qr(rng.normal(size=(6, 6)))[0][: min(n, 6)]).astype(np.float32)
    r = triangle(lambda i: jnp.asarray(a)[i], n, 6)
    assert r.shape == (min(n, 6), 6)
    exact = np.linalg.svd(np.float64(a), compute_uv=False)
    np.testing.assert_allclose(np.linalg.svd(np.float64(r), compute_uv=False), exact, rtol=0, atol=3e-7)
    assert exact[-1] < 2e-5 or n == 3
