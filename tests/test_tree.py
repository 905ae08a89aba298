"""Components as pytrees: what is compared, hashed, compiled for and checked."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax import (
    DDIM,
    IMQ,
    RBF,
    DiffusionModel,
    HostReferences,
    Mapped,
    Memory,
    MMDGuidance,
    Particles,
    Polynomial,
    Sum,
    from_model,
    guide_denoiser,
    guide_sampler,
)
from mmdjax.denoisers import FromModel
from mmdjax.kernels import NearestNeighbour
from mmdjax.sampling import Samples, Trace
from mmdjax.schedules import VPLinear
from mmdjax.suggest import Score, Suggestion
from mmdjax.tree import (
    Function,
    Method,
    as_arrays,
    as_component,
    by_value,
    is_concrete,
    pytree,
    replace,
    shown,
    static,
    strong,
)


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


def test_components_are_shown_in_a_line():
    model = DiffusionModel(lambda params, x, level, cond: x, VPLinear(), (2,))
    refs = np.zeros((3, 2), np.float32)
    memory = Memory.empty(5, (2,))
    large = {
        "Particles(x=float32[3, 2])": Particles(refs),
        "Particles(x=float32[3, 2], cond={'label': int64[3]})": Particles(refs, {"label": np.arange(3)}),
        "Memory(particles=Particles(x=float32[5, 2], weight=float32[5]), next=0)": memory,
        "DiffusionModel(denoiser=<lambda>, schedule=VPLinear(beta_min=0.1, beta_max=20.0), shape=(2,))": model,
        "FromModel(apply=Dense.apply, prediction='eps')": from_model(nn.Dense(2).apply),
        "FromModel(apply=shown, prediction='eps')": FromModel(shown, "eps"),
        "RBF(bandwidth=0.5)": RBF(jnp.float32(0.5)),
        "RBF(bandwidth=(1.0, None, NearestNeighbour(factor=2.0)))": RBF((1, None, NearestNeighbour())),
        "Mapped(fn=tanh, kernel=Polynomial(degree=3, offset=1.0))": Mapped(jnp.tanh, Polynomial()),
        "Samples(x=float32[3, 2], memory=None, trace=Trace(mmd2=float32[4], shift_norm=float32[4]))": Samples(
            jnp.zeros((3, 2)), None, Trace(jnp.zeros(4), jnp.zeros(4))
        ),
        "HostReferences(float32[3, 2])": HostReferences(refs),
        "MMDGuidance(kernel=None, scale=1.0, at='denoised', estimator='u', window=(0.0, 1.0), published=False)": (
            MMDGuidance()
        ),
    }
    for text, component in large.items():
        assert repr(component) == text
    guided = guide_sampler(DDIM(), MMDGuidance(kernel=IMQ(1.0)), refs)
    denoiser = guide_denoiser(lambda params, x, level, cond: x, MMDGuidance(kernel=IMQ(1.0)), refs)
    for component in (guided, denoiser, MMDGuidance.paper()):
        assert len(repr(component)) < 320
        assert "\n" not in repr(component)
    seen = []
    jax.jit(lambda x: seen.append(repr(RBF(x))))(1.0)
    assert seen == ["RBF(bandwidth=float32[])"]
    assert shown(list(range(100))) == "[0, 1, 2, 3, 4, 5, … 100 in all]"
    assert shown({"text": "a" * 200}) == "{'text': '" + "a" * 78 + "…}"
    assert shown(object()) == "<object>"
    assert shown(jax.random.key(0)) == "key<fry>[]"


def test_a_suggestion_is_shown_as_its_table():
    score = Score(MMDGuidance(), 0.1, 0.0, 0.01, 0.9, 0.8, "unguided")
    suggestion = Suggestion(MMDGuidance(), (score,), "Because.")
    assert repr(suggestion) == str(suggestion)
    assert len(repr(suggestion).splitlines()) == 3


def test_lists_and_foreign_arrays_are_arrays():
    class Tensor:
        """What numpy reads as it reads a torch tensor."""

        def __init__(self, values):
            self.values = values

        def __array__(self, dtype=None, copy=None):
            if self.values is None:
                raise RuntimeError("Can't call numpy() on Tensor that requires grad")
            return np.asarray(self.values)

    for given, expected in (
        ([3] * 4, np.full(4, 3)),
        ([[1, 2.5], [3, 4]], np.array([[1, 2.5], [3, 4]])),
        ((np.float32(1), 2), np.array([1.0, 2.0])),
        (Tensor([1.0, 2.0]), np.array([1.0, 2.0])),
    ):
        array = as_arrays("cond", given)
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype
    x = jnp.ones((2, 3))
    kept = {"text": x, "more": [x, np.ones(2)], "none": None, "label": 3}
    found = as_arrays("cond", {**kept, "listed": [1, 2]})
    assert found.pop("listed").tolist() == [1, 2]
    assert jax.tree.structure(found) == jax.tree.structure(kept)
    assert found["text"] is x
    for given, message in (
        (["a cat"] * 4, r"cond holds a str; give numbers, as arrays: .*encode_prompts"),
        ({"path": Path("a")}, r"cond holds a pathlib\..*Path; give numbers"),
        (Tensor(None), r"cond is a test_tree.Tensor that numpy does not read \(Can't call numpy"),
        (Tensor(["a"]), r"cond is a test_tree.Tensor of dtype <U1; give numbers"),
        ([[1], [1, 2]], r"cond is a list that numpy does not read"),
    ):
        with pytest.raises(TypeError, match=message):
            as_arrays("cond", given)


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
