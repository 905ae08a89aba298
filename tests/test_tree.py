"""Components as pytrees: what is compared, hashed, compiled for and checked."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax import IMQ, RBF, MMDGuidance, Particles, Polynomial, Sum
from mmdjax.tree import Function, Method, as_component, by_value, is_concrete, pytree, replace, static, strong


@pytree
class Part:
    number: Any = 1.0
    choice: str = static(default="a")

    def __post_init__(self):
        if is_concrete(self.number) and self.number == 0:
            raise ValueError("number is 0")


def avals(tree):
    return [jax.typeof(jnp.asarray(leaf)) for leaf in jax.tree.leaves(tree)]


def test_equality_and_hash_are_by_value():
    assert Part(2, "b") == Part(2.0, "b")
    assert hash(Part(2, "b")) == hash(Part(2.0, "b"))
    assert Part(2) != Part(3)
    assert Part(2) != Part(2, "b")
    assert RBF(1.0) != IMQ(1.0)
    assert MMDGuidance(kernel=IMQ(1)) == MMDGuidance(kernel=IMQ(1.0))


def test_components_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RBF(1.0).bandwidth = 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        del Part().number


def test_numbers_are_leaves_and_choices_are_structure():
    assert jax.tree.leaves(Part(3, "b")) == [3.0]
    assert jax.tree.structure(Part(3, "b")) == jax.tree.structure(Part(4, "b"))
    assert jax.tree.structure(Part(3, "b")) != jax.tree.structure(Part(3, "a"))
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(Sum(RBF(1.0)))] == [
        ".kernels[0].bandwidth",
        ".weights[0]",
    ]
    assert jax.tree.leaves(Polynomial(3, 0.5)) == [0.5]


def test_an_int_is_the_float():
    for one, other in ((Part(1), Part(1.0)), (RBF((1, (2, 3))), RBF((1.0, (2.0, 3.0)))), (Sum(RBF(1)), Sum(RBF(1.0)))):
        assert avals(one) == avals(other)
        assert jax.tree.structure(one) == jax.tree.structure(other)
    assert Part(True).number is True  # a choice written as a number is left alone
    double = jax.jit(lambda part: 2 * part.number)
    assert double(Part(1)) == double(Part(1.0)) == 2
    assert double._cache_size() == 1


def test_flattening_round_trips_without_running_checks():
    part = Part(3, "b")
    leaves, structure = jax.tree.flatten(part)
    assert jax.tree.unflatten(structure, leaves) == part
    assert jax.tree.unflatten(structure, [0]).number == 0  # the constructor would refuse it
    assert jax.tree.unflatten(structure, [None]).number is None
    marker = object()
    assert jax.tree.map(lambda _: marker, RBF(1.0)).bandwidth is marker
    with pytest.raises(ValueError, match="number is 0"):
        Part(0)


def test_components_pass_through_jit_vmap_and_grad():
    parts = jax.vmap(Part)(jnp.arange(1.0, 4.0))
    assert jax.vmap(lambda p: p.number**2)(parts).tolist() == [1, 4, 9]
    assert jax.grad(lambda p: p.number**2)(Part(3.0)) == Part(6.0)
    assert jax.jit(lambda x: Part(x, "b"))(2.0).choice == "b"


def test_help_shows_the_fields():
    assert [f.name for f in dataclasses.fields(RBF)] == ["bandwidth"]
    assert repr(RBF(1)) == "RBF(bandwidth=1.0)"


def test_replace_changes_fields_and_runs_no_checks():
    assert replace(Part(3, "b"), number=4.0) == Part(4.0, "b")
    assert replace(Part(3), number=0.0).number == 0.0
    p = Particles(jnp.zeros((2, 1)), cond=jnp.ones(2))
    assert replace(p, x=None).cond is p.cond
    with pytest.raises(TypeError, match="wieght"):
        replace(p, wieght=jnp.ones(2))


# --- functions ----------------------------------------------------------------------------------------------------


def test_methods_of_equal_linen_modules_are_one_function():
    one, other = nn.Dense(3), nn.Dense(3)
    assert one.apply != other.apply  # hence the unwrapping
    assert by_value(one.apply) == by_value(other.apply)
    assert hash(by_value(one.apply)) == hash(by_value(other.apply))
    assert by_value(one.apply) != by_value(nn.Dense(4).apply)
    assert by_value(one.apply) != by_value(one.init)
    params = one.init(jax.random.key(0), jnp.ones((1, 2)))
    run = jax.jit(lambda apply, params, x: apply(params, x))
    x = jnp.ones((5, 2))
    np.testing.assert_allclose(run(by_value(one.apply), params, x), one.apply(params, x), rtol=1e-6)  # jit fuses
    run(by_value(other.apply), params, x)
    assert run._cache_size() == 1


def test_other_callables_pass_through():
    class Unhashable:
        __hash__ = None

        def call(self):
            return 1

    method = Unhashable().call
    assert by_value(method) is method
    assert by_value(jnp.sin) is jnp.sin
    assert as_component(jnp.sin) == Function(jnp.sin)
    assert as_component(jnp.sin)(0.0) == 0.0
    assert as_component(nn.Dense(3).apply).function == Method(nn.Dense.apply, nn.Dense(3))
    part = Part(2)
    assert as_component(part) is part
    assert jax.tree.leaves(Function(jnp.sin)) == jax.tree.leaves(by_value(nn.Dense(3).apply)) == []
    partial = jax.tree_util.Partial(jnp.add, 1.0)
    assert as_component(partial) is partial  # its numbers stay leaves
    assert as_component(functools.partial(jnp.add, 1.0))(2.0) == 3.0


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, np.float64(1), np.float32(1), jnp.asarray(1.0), jnp.float32(1)])
def test_strong_numbers_are_one_kind(scale):
    for leaf in (strong(scale), jax.jit(strong)(scale)):
        assert (leaf.dtype, leaf.weak_type, leaf.shape) == (jnp.float32, False, ())
        assert leaf == 1


def test_strong_keeps_labels_keys_and_booleans():
    key = jax.random.key(0)
    tree = strong(
        {"key": key, "keys": jax.random.split(key), "label": jnp.arange(3), "yes": True, "half": jnp.ones(2, "f2")}
    )
    assert tree["key"].dtype == tree["keys"].dtype == key.dtype
    assert tree["label"].dtype == jnp.int32
    assert tree["yes"].dtype == bool
    assert tree["half"].dtype == jnp.float16
    with jax.enable_x64(True):
        assert strong(1.0).dtype == jnp.float64
    for count in (1, np.int32(1), jnp.asarray(1)):  # a denoiser of one's own may index with it
        assert (strong(count).dtype, strong(count).weak_type) == (jnp.int32, False)


def test_is_concrete():
    assert is_concrete((1.0, jnp.ones(2), np.ones(2), None))
    seen = []
    jax.jit(lambda x: seen.append((is_concrete(x), is_concrete({"a": 1.0, "b": x}), is_concrete(jnp.pi))))(1.0)
    assert seen == [(False, False, True)]
