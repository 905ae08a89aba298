"""Descriptions: equal for what is equal, in another process too, and different where something is."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from mmdjax import RBF, DiffusionModel, Memory, MMDGuidance, Particles, cfg, from_model
from mmdjax.identity import array_bytes, arrays_hash, describe, differences, tree_hash
from mmdjax.schedules import Discrete, VPLinear


def scaled(by):
    return lambda params, x, t, cond: by * x if cond not in {"a", "b", "c", "d"} else x  # a set has no order


def model(by=2.0, scale=3.0, width=4, last=0.1):
    denoiser = cfg(from_model(nn.Dense(width).apply if width else scaled(by), "eps"), scale, jnp.zeros(2))
    return DiffusionModel(denoiser, Discrete(np.linspace(0.9, last, 5)), (3,))


def test_equal_values_made_apart_are_described_alike():
    for make in (
        model,
        lambda: model(width=None),
        lambda: MMDGuidance(kernel=RBF(None), transform=optax.chain(optax.clip(1.0), optax.trace(0.9))),
        MMDGuidance.paper,
        lambda: Particles(np.ones((2, 3)), {"a": jnp.zeros(2)}),
        lambda: Memory.empty(3, (2,)),
        lambda: functools.partial(scaled, by=jnp.ones(2)),
    ):
        assert describe(make()) == describe(make())
    assert describe(MMDGuidance(scale=1)) == describe(MMDGuidance(scale=jnp.float32(1)))
    assert describe(np.ones(3, np.float32)) == describe(jnp.ones(3))


CHANGES = {
    "a number": (MMDGuidance(scale=1.0), MMDGuidance(scale=2.0), ["scale was 1.0 and is 2.0"]),
    "a choice": (MMDGuidance(), MMDGuidance(at="sample"), ["at was denoised and is sample"]),
    "closed over": (scaled(1.0), scaled(2.0), ["closure.by was 1.0 and is 2.0"]),
    "closed over in a model": (model(width=None), model(3.0, width=None), None),
    "a module's field": (model(), model(width=5), None),
    "a number deep in a model": (model(), model(scale=4.0), ["denoiser.scale was 3.0 and is 4.0"]),
    "code": (lambda x: x + 1, lambda x: x + 2, None),
    "a name that code uses": (lambda x: x.min(), lambda x: x.max(), None),
    "a transform's number": (
        MMDGuidance(transform=optax.clip(1.0)),
        MMDGuidance(transform=optax.clip(2.0)),
        None,
    ),
    "a table": (model(), model(last=0.2), None),
    "one value of an array": (np.zeros(3), np.array([0, 0, 1.0]), None),
    "the type of an array": (np.zeros(3), np.zeros(3, np.float32), None),
    "the shape of an array": (np.zeros((2, 3)), np.zeros((3, 2)), None),
    "key": (jax.random.key(0), jax.random.key(1), [" was threefry2x32 [0, 0] and is threefry2x32 [0, 1]"]),
    "kind of key": (jax.random.key(0), jax.random.key(0, impl="rbg"), None),
    "none": (VPLinear(), None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_named(name):
    old, new, lines = CHANGES[name]
    found = differences(describe(old), describe(new))
    assert found
    assert lines is None or found == lines
    assert not differences(describe(old), describe(old))


def test_a_function_that_closes_over_itself():
    def outer():
        def recursive(n):
            return recursive(n - 1) if n else 0

        return recursive

    assert describe(outer()) == describe(outer())


def test_described_alike_in_another_process():
    code = "import test_identity as t; print(t.describe(t.model()), t.describe(t.MMDGuidance.paper()))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); {code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == f"{describe(model())} {describe(MMDGuidance.paper())}"


def test_hashes_tell_names_types_and_shapes_apart():
    x = np.arange(6.0)
    trees = [{"a": x}, {"b": x}, {"a": x.astype(np.float32)}, {"a": x.reshape(2, 3)}, {"a": x[:5], "b": x[5:]}, [x]]
    assert len({tree_hash(tree) for tree in trees}) == len(trees)
    assert arrays_hash({"a": x, "b": x + 1}) == arrays_hash({"b": x + 1, "a": x})
    assert arrays_hash({"a": x}, "said") != arrays_hash({"a": x})
    assert arrays_hash({"a": x[::2]}) == arrays_hash({"a": x[::2].copy()})
    assert b"".join(map(bytes, array_bytes({"a": np.float32(1)}))) == b"a float32 ()" + np.float32(1).tobytes()
