"""The ring of past samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax import RBF, Memory, Particles, mmd2


def samples(*values):
    return Particles(jnp.array(values, jnp.float32)[:, None])


def held(memory):
    weight = np.asarray(memory.particles.weight)
    assert set(weight.tolist()) <= {0.0, 1.0}
    return sorted(np.asarray(memory.particles.x)[weight > 0, 0].tolist())


@pytest.mark.parametrize("capacity", [1, 3, 4, 7])
@pytest.mark.parametrize("batches", [[1] * 9, [2, 2, 2, 2], [3, 1, 5, 2], [9], [4, 4, 11]])
def test_the_last_samples_are_held_in_a_ring(capacity, batches):
    memory, pushed = Memory.empty(capacity, (1,)), []
    for size in batches:
        new = list(range(len(pushed) + 1, len(pushed) + 1 + size))
        memory, pushed = memory.push(samples(*new)), pushed + new
        assert held(memory) == pushed[-capacity:]
        assert memory.count == min(len(pushed), capacity)
        assert memory.next == len(pushed) % capacity
    slots = np.asarray(memory.particles.x)[:, 0]
    for i in pushed[-capacity:]:
        assert slots[(i - 1) % capacity] == i  # the k-th sample lies in slot k mod capacity


def test_an_empty_memory_has_no_mass():
    memory = Memory.empty(3, (2, 2))
    assert memory.count == 0
    assert memory.particles.x.shape == (3, 2, 2)
    assert memory.particles.probabilities().tolist() == [0, 0, 0]
    half = memory.push(Particles(jnp.ones((1, 2, 2))))
    q = jnp.zeros((4, 2, 2))
    assert mmd2(RBF(1.0), half.particles, q) == mmd2(RBF(1.0), jnp.ones((1, 2, 2)), q)  # empty slots change nothing


def test_push_leaves_the_old_memory_alone():
    old = Memory.empty(2, (1,)).push(samples(1))
    old.push(samples(2, 3))
    assert held(old) == [1.0]


def test_conditions_travel_with_their_samples():
    cond = {"label": jnp.arange(1, 6), "text": jnp.arange(1.0, 6.0)[:, None] * jnp.ones(3)}
    memory = Memory.empty(3, (1,), cond).push(Particles(samples(1, 2, 3, 4, 5).x, cond))
    assert memory.particles.cond["label"].dtype == jnp.int32
    x = memory.particles.x[:, 0]
    np.testing.assert_array_equal(memory.particles.cond["label"], x)
    np.testing.assert_array_equal(memory.particles.cond["text"], x[:, None] * np.ones(3))


def test_samples_are_kept_in_the_memorys_type():
    memory = Memory.empty(2, (1,)).push(Particles(jnp.ones((1, 1), jnp.bfloat16)))
    assert memory.particles.x.dtype == jnp.float32
    assert held(memory) == [1.0]


def test_reset_as_the_published_code_does():
    # one sample at a time, 100 kept: lengths 1 … 100, then the last one and the new one, then on
    @jax.jit
    def push(memory, x):
        memory = memory.reset_when_full()
        before = memory.count
        return memory.push(Particles(x)), before

    memory, lengths, expected, published = Memory.empty(100, (1,)), [], [], []
    for i in range(250):
        if len(published) == 100:
            published = published[-1:]
        expected.append(len(published))
        memory, before = push(memory, jnp.full((1, 1), float(i)))
        published.append(float(i))
        lengths.append(int(before))
        if i % 33 == 0 or i in (99, 100, 101, 198, 199):
            assert held(memory) == published
    assert lengths == expected
    assert push._cache_size() == 1


def test_reset_leaves_a_memory_with_room_alone():
    memory = Memory.empty(3, (1,)).push(samples(1, 2))
    assert held(memory.reset_when_full()) == [1, 2]
    assert held(memory.push(samples(3)).reset_when_full()) == [3]
    assert held(memory.push(samples(3, 4)).reset_when_full()) == [4]
    assert held(Memory.empty(1, (1,)).push(samples(5)).reset_when_full()) == [5]


def test_push_compiles_once():
    push = jax.jit(lambda memory, new: memory.push(new))
    memory = Memory.empty(3, (1,))
    for value in range(8):  # through filling and wrapping round
        memory = push(memory, samples(value))
    assert push._cache_size() == 1
    assert held(memory) == [5, 6, 7]
    before = jax.tree.map(lambda leaf: (leaf.dtype, leaf.weak_type), Memory.empty(3, (1,)))
    assert jax.tree.map(lambda leaf: (leaf.dtype, leaf.weak_type), memory) == before


def test_push_is_differentiable():
    gradient = jax.grad(lambda x: (Memory.empty(2, (1,)).push(Particles(x)).particles.x ** 2).sum())
    assert gradient(samples(1, 2, 3).x)[:, 0].tolist() == [0, 4, 6]  # the first was overwritten


def test_capacity_must_be_positive():
    with pytest.raises(ValueError, match="memory is 0"):
        Memory.empty(0, (1,))
