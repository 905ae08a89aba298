"""Descriptions: equal for what is equal, in another process too, and different where something is."""

import collections
import dataclasses
import enum
import functools
import itertools
import json
import operator
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from mmdjax import RBF, DiffusionModel, Memory, MMDGuidance, Particles, cfg, from_model
from mmdjax._files.fingerprint import array_bytes, arrays_hash, as_used, describe, differences, tree_hash
from mmdjax.schedules import Discrete, VPLinear


def scaled(by):
    return lambda params, x, t, cond: by * x if cond not in {"a", "b", "c", "d"} else x  # a set has no order


def model(by=2.0, scale=3.0, width=4, last=0.1):
    denoiser = cfg(from_model(nn.Dense(width).apply if width else scaled(by), "eps"), scale, jnp.zeros(2))
    return DiffusionModel(denoiser, Discrete(np.linspace(0.9, last, 5)), (3,))


class Scale:
    """A function that numpy reads as an array."""

    def __init__(self, by):
        self.by = by

    def __call__(self, params, x, t, cond):
        return self.by * x

    def __array__(self, dtype=None, copy=None):
        return np.zeros(2)


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
    "a mask": (np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 2], mask=[1, 0]), None),
    "names in an array": (np.zeros(2, "i4,f4"), np.zeros(2, [("a", "i4"), ("f1", "f4")]), None),
    "state beside an array": (Scale(1.0), Scale(2.0), ["by was 1.0 and is 2.0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_named(name):
    old, new, lines = CHANGES[name]
    found = differences(describe(old), describe(new))
    assert found
    assert lines is None or found == lines
    assert not differences(describe(old), describe(old))


def closed(value):
    return lambda p, x: (value, x)


def wrapped(function, by):
    @functools.wraps(function)
    def wrapper(*args):
        return by * function(*args)

    return wrapper


def attributed(by):
    def function(p, x):
        return function.by * x

    function.by = by
    return function


def mutual(both):
    def one(n):
        return other(n)

    if both:

        def other(n):
            return one(n)

    else:

        def other(n):
            return other(n)

    return one


def constant(by):
    class Local:
        factor = by

        def __call__(self, x):
            return self.factor * x

    return Local


def method(sign):
    class Local:
        if sign > 0:

            def __call__(self, x):
                return x + 1
        else:

            def __call__(self, x):
                return x - 1

    return Local


class Slots:
    __slots__ = ("__hidden", "a")

    def __init__(self, a, hidden=0):
        self.a, self.__hidden = a, hidden


class MoreSlots(Slots):
    __slots__ = ("b",)

    def __init__(self, a, b):
        super().__init__(a)
        self.b = b


class Held(Slots):  # slots and a dictionary
    def __init__(self, a, b):
        super().__init__(a)
        self.b = b

    def method(self, x):
        return x


class Updated:
    def __init__(self, function, by):
        functools.update_wrapper(self, function)
        self.by = by

    def __call__(self, x):
        return self.by * x


class Colour(enum.Enum):
    RED, BLUE = 1, 2


class OwnDict(dict):
    by = 1


@dataclasses.dataclass
class Named:
    name: str
    parent: int = 0


@jax.tree_util.register_pytree_node_class
class Node:
    def __init__(self, child, choice):
        self.child, self.choice = child, choice

    def tree_flatten(self):
        return (self.child,), self.choice

    @classmethod
    def tree_unflatten(cls, choice, children):
        return cls(*children, choice)


class Net(nn.Module):
    width: int = 3

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.width)(x)


def with_attribute(value, by):
    value.by = by
    return value


def plain(x):
    return x


STATES = {  # two makers each, of what differs in state alone
    "a wrapper's closure": (lambda: wrapped(plain, 1), lambda: wrapped(plain, 2)),
    "a wrapper and none": (lambda: wrapped(plain, 1), lambda: plain),
    "an inner wrapper": (lambda: wrapped(wrapped(plain, 1), 3), lambda: wrapped(wrapped(plain, 2), 3)),
    "around a jitted function": (lambda: wrapped(jax.jit(plain), 1), lambda: wrapped(jax.jit(plain), 2)),
    "around a partial": (
        lambda: wrapped(functools.partial(plain, 1), 1),
        lambda: wrapped(functools.partial(plain, 1), 2),
    ),
    "around a method": (lambda: wrapped(Held(1, 2).method, 1), lambda: wrapped(Held(1, 3).method, 1)),
    "update_wrapper": (lambda: Updated(plain, 1), lambda: Updated(plain, 2)),
    "vmap": (lambda: jax.vmap(plain, in_axes=0), lambda: jax.vmap(plain, in_axes=1)),
    "grad": (lambda: jax.grad(plain), lambda: plain),
    "jit": (lambda: jax.jit(closed(1)), lambda: jax.jit(closed(2))),
    "jit of a method": (lambda: jax.jit(Held(1, 2).method), lambda: jax.jit(Held(1, 3).method)),
    "slots": (lambda: Slots(1), lambda: Slots(2)),
    "private slots": (lambda: Slots(1, 1), lambda: Slots(1, 2)),
    "inherited slots": (lambda: MoreSlots(1, 2), lambda: MoreSlots(3, 2)),
    "slots beside a dictionary": (lambda: Held(1, 2), lambda: Held(3, 2)),
    "*x": (lambda: eval("lambda p, x: x"), lambda: eval("lambda p, *x: x")),
    "**x": (lambda: eval("lambda p, *x: x"), lambda: eval("lambda p, **x: x")),
    "keyword only": (lambda: eval("lambda p, x: x"), lambda: eval("lambda p, *, x: x")),
    "attributes of a function": (lambda: attributed(1), lambda: attributed(2)),
    "of a partial": (
        lambda: with_attribute(functools.partial(plain), 1),
        lambda: with_attribute(functools.partial(plain), 2),
    ),
    "of a dictionary": (lambda: with_attribute(OwnDict(a=1), 2), lambda: with_attribute(OwnDict(a=1), 3)),
    "of a dataclass": (lambda: with_attribute(Named("a"), 1), lambda: with_attribute(Named("a"), 2)),
    "NaN": (lambda: closed(float("nan")), lambda: closed(1.0)),
    "-0.0": (lambda: closed(-0.0), lambda: closed(0.0)),
    "complex": (lambda: closed(1j), lambda: closed(2j)),
    "complex NaN": (lambda: closed(complex("nan")), lambda: closed(1j)),
    "large": (lambda: closed(10**40), lambda: closed(10**40 + 1)),
    "NaN in an array": (lambda: np.array([np.nan, 1]), lambda: np.array([np.nan, 2])),
    "array of objects": (lambda: np.array([{1: 2}, None]), lambda: np.array([{1: 3}, None])),
    "date": (lambda: np.datetime64("2020-01-01"), lambda: np.datetime64("2020-01-02")),
    "closure in a closure": (lambda: closed(closed(closed(1))), lambda: closed(closed(closed(2)))),
    "mutual recursion": (lambda: mutual(True), lambda: mutual(False)),
    "a class's constant": (lambda: constant(1), lambda: constant(2)),
    "an object's class's constant": (lambda: constant(1)(), lambda: constant(2)()),
    "code of a method": (lambda: method(1)(), lambda: method(-1)()),
    "fields of these names": (lambda: Named("a", 1), lambda: Named("b", 2)),
    "pytree with a choice": (lambda: Node(1.0, "a"), lambda: Node(1.0, "b")),
    "keys 1 and '1'": (lambda: {1: 0, "1": 1}, lambda: {1: 1, "1": 0}),
    "key 1 or '1'": (lambda: {1: 0}, lambda: {"1": 0}),
    "set of 1 or '1'": (lambda: {1, 2}, lambda: {"1", "2"}),
    "set of text": (lambda: {"a", "b", "c"}, lambda: {"a", "b", "d"}),
    "range": (lambda: range(3), lambda: range(4)),
    "slice": (lambda: slice(3), lambda: slice(4)),
    "enumeration": (lambda: Colour.RED, lambda: Colour.BLUE),
    "bytearray": (lambda: bytearray(b"x at 0x1"), lambda: bytearray(b"x at 0x2")),
    "memoryview": (lambda: memoryview(b"a"), lambda: memoryview(b"b")),
    "path": (lambda: pathlib.Path("a"), lambda: pathlib.Path("b")),
    "deque": (lambda: collections.deque([1], 3), lambda: collections.deque([1], 4)),
    "pattern": (lambda: re.compile("a" * 300 + "b"), lambda: re.compile("a" * 300 + "c")),
    "random numbers": (lambda: np.random.default_rng(1), lambda: np.random.default_rng(2)),
    "random numbers of Python": (lambda: random.Random(1), lambda: random.Random(2)),
    "operator": (lambda: operator.itemgetter(1), lambda: operator.itemgetter(2)),
    "method in C": (lambda: {"a": 1}.get, lambda: {"a": 2}.get),
    "iterator": (lambda: itertools.count(1), lambda: itertools.count(2)),
    "type of an array": (lambda: closed(np.float32), lambda: closed(np.float64)),
    "code object": (lambda: plain.__code__, lambda: closed.__code__),
}


@pytest.mark.parametrize("name", STATES)
def test_state_is_told_and_can_be_read_back(name):
    one, other = STATES[name]
    read = json.loads(json.dumps(describe(one())))
    assert read == describe(one())
    assert differences(read, describe(one())) == []
    assert differences(read, describe(other()))


def test_what_has_no_state_to_see_is_named_by_its_type():
    for value in ((i for i in range(3)), threading.Lock(), object()):
        told = describe(closed(value))
        assert told["closure"]["value"]["is"] == f"{type(value).__module__}.{type(value).__qualname__}"
        assert json.loads(json.dumps(told)) == told


def test_use_changes_nothing():
    """What an object remembers of having been used is no part of it."""

    class Remembers:
        @functools.cached_property
        def table(self):
            return np.ones(3)

    value, path, jitted = Remembers(), pathlib.Path("a") / "b", jax.jit(plain)
    before = describe([value, path, jitted])
    assert hash(path) + len(str(path)) + value.table.sum() + jitted(1.0) is not None
    assert describe([value, path, jitted]) == before
    assert describe(functools.lru_cache(plain)) == describe(jax.jit(plain)) == describe(plain)


def test_methods_of_linen_modules_of_ones_own_are_told():
    told = describe(Net())
    assert set(told) == {"is", "width", "class"}
    assert set(told["class"]) == {"Net.__call__"}
    assert "class" not in describe(nn.Dense(3))


def test_values_as_jax_uses_them():
    given = {"x": np.arange(3.0), "n": np.arange(3), "a": 0.1, "b": np.float32(0.1), "k": jax.random.key(0), "f": plain}
    used = as_used(given)
    assert used["x"].dtype == np.float32
    assert used["n"].dtype == np.int32
    assert used["a"] == used["b"] == 0.1
    assert used["f"] is plain
    assert tree_hash(given["x"], used=True) == tree_hash(jnp.arange(3.0))
    assert describe(np.arange(3, dtype=">i4")) == describe(np.arange(3, dtype="<i4"))


def test_less_was_told():
    """Descriptions of an earlier version: what they say is compared, and nothing else."""
    new = describe({"f": wrapped(plain, 2.0), "c": constant(1), "n": float("nan"), "r": mutual(True)})
    old = json.loads(json.dumps(new))
    del old["f"]["wrappers"], old["f"]["parameters"]
    old |= {"c": old["c"]["is"], "n": float("nan")}
    old["r"]["closure"]["other"]["closure"]["one"] = "itself"
    assert differences(old, new)
    assert differences(old, new, told=True) == []
    old["f"]["code"] = ""
    assert differences(old, new, told=True) == ["f was another function"]


def test_a_function_that_closes_over_itself():
    def outer():
        def recursive(n):
            return recursive(n - 1) if n else 0

        return recursive

    assert describe(outer()) == describe(outer())


def everything():
    made = {name: one() for name, (one, _) in STATES.items()}
    return describe({"model": model(), "paper": MMDGuidance.paper(), "net": Net(), **made})


def test_described_alike_in_another_process():
    code = "import json, test_identity as t; print(json.dumps(t.everything()))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); {code}"],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert json.loads(done.stdout) == everything()


def test_hashes_tell_names_types_and_shapes_apart():
    x = np.arange(6.0)
    trees = [{"a": x}, {"b": x}, {"a": x.astype(np.float32)}, {"a": x.reshape(2, 3)}, {"a": x[:5], "b": x[5:]}, [x]]
    assert len({tree_hash(tree) for tree in trees}) == len(trees)
    assert arrays_hash({"a": x, "b": x + 1}) == arrays_hash({"b": x + 1, "a": x})
    assert arrays_hash({"a": x}, "said") != arrays_hash({"a": x})
    assert arrays_hash({"a": x[::2]}) == arrays_hash({"a": x[::2].copy()})
    assert b"".join(map(bytes, array_bytes({"a": np.float32(1)}))) == b"a float32 ()" + np.float32(1).tobytes()
