"""References read from a file give what they give in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax import (
    IMQ,
    RBF,
    DiffusionModel,
    Energy,
    Mapped,
    MMDGuidance,
    Particles,
    Polynomial,
    Sum,
    from_model,
    guide_denoiser,
    guided_sample,
    mmd2,
)
from mmdjax._points import blocks
from mmdjax._points.streaming import HostReferences
from mmdjax.compression import coreset, nystroem, random_features
from mmdjax.guidance import bound as bound_module
from mmdjax.guidance.bound import bind
from mmdjax.kernels import as_kernel
from mmdjax.schedules import RectifiedFlow, VPLinear

M, D = 3000, 2048  # 25 MB: many blocks


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("refs") / "refs.npy"
    rows = (np.random.default_rng(0).normal(size=(M, D)) + 1).astype(np.float16)
    np.save(path, rows)
    return HostReferences(np.load(path, mmap_mode="r")), jnp.asarray(rows, jnp.float32)


@pytest.mark.parametrize("kernel", [IMQ(60.0), Energy(), Polynomial()])
def test_streamed_is_in_memory(kernel, stored):
    """Gradient, its derivative by the batch, and MMD²."""
    z = jnp.asarray(np.random.default_rng(1).normal(size=(8, D)), jnp.float32)
    coef = jnp.full(M, 1 / M)

    def results(refs):
        def pull(z):
            return kernel.gradient(Particles(z), Particles(refs), coef)[0]

        return pull(z), jax.grad(lambda z: (pull(z) ** 2).sum())(z), mmd2(kernel, z, refs)

    for found, expected in zip(*map(jax.jit(results), stored), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * jnp.abs(expected).max())


def test_guided_sampling_from_a_file(stored):
    model = DiffusionModel(from_model(lambda params, x, t, cond: params * x, "x0"), RectifiedFlow(), (D,))
    found, expected = (
        guided_sample(0.5, jax.random.key(0), refs, model=model, num_samples=4, num_steps=2) for refs in stored
    )
    np.testing.assert_allclose(found.x, expected.x, atol=1e-4)
    np.testing.assert_allclose(found.trace.mmd2, expected.trace.mmd2, atol=1e-5)
    with pytest.raises(ValueError, match="adds noise to the references"):
        guided_sample(0.5, jax.random.key(0), stored[0], model=model, num_samples=4, guidance=MMDGuidance(at="sample"))


def test_the_device_holds_a_block(stored):
    """Beside the batch, the program needs far less than the references' 25 MB in float32."""
    z = jax.ShapeDtypeStruct((8, D), jnp.float32)

    def pull(z, refs):
        return IMQ(60.0).gradient(Particles(z), Particles(refs), jnp.full(M, 1 / M))[0]

    temporary = jax.jit(pull).lower(z, stored[0]).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 16e6


class Counted:
    """An array of which each reading is noted: how many rows."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, []

    def __getitem__(self, index):
        self.read.append(len(index))
        return self.array[index]

    def times(self):
        """How often all rows have been read since the last call, or how many rows, if not all equally often."""
        total, self.read = sum(self.read), []
        return total / self.shape[0]


KERNELS = {  # and inner steps, precondition
    "default": (IMQ(2.0), 3, None),
    "two terms": (Sum(IMQ(2.0), RBF(3.0)), 3, None),
    "shrunk": (IMQ(2.0), 2, "shrunk"),
    "mass": (IMQ(2.0), 3, "mass"),
    "of features": (Mapped(jnp.tanh, RBF(1.0)), 2, "length"),
    "a function": (as_kernel(lambda a, b: jnp.exp(-((a.x[:, None] - b.x[None]) ** 2).sum(-1))), 2, "none"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_each_inner_step_reads_the_references_once(name, monkeypatch):
    """And the preparation of all steps reads them once, and so does the trace."""
    kernel, steps, precondition = KERNELS[name]
    array = np.random.default_rng(4).normal(size=(120, 6)).astype(np.float32)
    x = jnp.asarray(array[:5] + np.float32([[1.0], [1e-4], [0.1], [0.0], [2.0]]))  # some as good as references
    guidance = MMDGuidance(kernel, inner_steps=steps, precondition=precondition)
    step = jax.jit(lambda bound: bound.denoised(x, bound.init(x), 0.5, VPLinear()(0.2)))
    plain = bind(guidance, kernel, Particles(jnp.asarray(array)))
    expected, state = step(plain)
    assert jnp.abs(expected - x).max() > 1e-2
    counted = Counted(array)
    in_memory = step(bind(guidance, kernel, Particles(HostReferences(counted))))[0]
    np.testing.assert_allclose(in_memory, expected, rtol=1e-5, atol=1e-6)
    assert counted.times() <= 3  # as few rows are no more than a block: its own term, its spread, and for all steps
    monkeypatch.setattr(blocks, "PLAIN", 256)
    monkeypatch.setattr(blocks, "CACHED", 256)
    monkeypatch.setattr(bound_module, "PLAIN", 256)
    jax.clear_caches()
    refs = Particles(HostReferences(counted))
    bound = jax.block_until_ready(bind(guidance, kernel, refs, seen=plain.seen))  # small blocks look at fewer
    counted.times()
    found, found_state = jax.block_until_ready(step(bound))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # float32 sums of other lengths
    np.testing.assert_allclose(found_state.mmd2, state.mmd2, rtol=1e-4, atol=1e-5)
    prepares = precondition in (None, "shrunk")
    assert counted.times() == steps + prepares + 1
    jax.clear_caches()


def test_what_cannot_be_references():
    with pytest.raises(ValueError, match="at least one row"):
        HostReferences(np.zeros((0, 2)))
    with pytest.raises(ValueError, match="int64"):
        HostReferences(np.zeros((2, 2), np.int64))


def test_closed_over_in_jit():
    """More rows than a bandwidth is taken from, inside a `jit` of the user's own: from the host, and a plain array."""
    array = np.random.default_rng(2).normal(size=(2500, 3)).astype(np.float32)
    denoiser = lambda params, x, level, cond: level.alpha * x
    x, level = jnp.ones((4, 3)), VPLinear()(0.5)

    def moved(refs):
        return jax.jit(lambda x: guide_denoiser(denoiser, MMDGuidance(IMQ(1.0)), refs)(None, x, level, None))(x)

    np.testing.assert_allclose(moved(HostReferences(array)), moved(array), rtol=1e-5)  # float32, other blocks


def test_compressed():
    """Each compression of references on the host is that of the same references in memory; a coreset is in memory."""
    array = np.random.default_rng(3).normal(size=(60, 3)).astype(np.float32)
    host, kernel = HostReferences(array), RBF(1.0)
    few, same = coreset(kernel, host, 7), coreset(kernel, array, 7)
    assert isinstance(few.particles.x, jax.Array)
    np.testing.assert_array_equal(few.particles.x, same.particles.x)
    errors = [float(nystroem(kernel, refs, same.particles).error) for refs in (host, array)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    features = [random_features(kernel, jax.random.key(0), refs, 5).frequencies for refs in (host, array)]
    np.testing.assert_array_equal(*features)
