"""What the README says was measured, and the claim behind it holds."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import toys

from mmdjax import Memory, guided_sample
from mmdjax.metrics import energy_distance
from mmdjax.particles import as_particles, flat

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import alignment  # noqa: E402  # scripts, found through the line above
import tasks  # noqa: E402


def test_readme_has_the_measured_table():
    table = json.loads((ROOT / "benchmarks" / "results" / "alignment.json").read_text())["tasks"]
    assert alignment.markdown(table) in (ROOT / "README.md").read_text()


def test_untouched_default_beats_the_authors_rule_on_the_ring():
    """As in the benchmark, on seeds that it does not report."""
    table = alignment.measure(tasks.ring(), range(10, 12))
    mean = {name: np.mean(row["energy"]) for name, row in table.items()}
    assert mean["MMDGuidance()"] < mean[alignment.best_alpha(table)] < mean["unguided"]
    assert np.mean(table["MMDGuidance()"]["ratio"]) > 0.7  # no copying of references


def test_one_sample_at_a_time_aligns_with_memory():
    """96 samples one by one: alone each falls on the same references; around a memory they spread as a batch does."""
    ring, nothing, energies = tasks.ring(), Memory.empty(96, (2,)), []

    @jax.jit
    def one_more(key, refs, memory):
        return guided_sample(ring.params, key, refs, model=ring.model, num_samples=1, memory=memory)

    for seed in range(3):
        refs, _, rest = ring.draw(seed)
        whole = guided_sample(ring.params, jax.random.key(seed), refs, model=ring.model, num_samples=96).x
        memory, alone = nothing, []
        for i in range(96):
            key = jax.random.fold_in(jax.random.key(seed), i)
            memory = one_more(key, refs, memory).memory
            alone.append(one_more(key, refs, nothing).x)
        made = whole, memory.particles.x, np.concatenate(alone)
        energies.append([float(energy_distance(x, rest)) for x in made])
    batch, remembered, forgetful = np.mean(energies, axis=0)
    assert remembered < 0.4 * forgetful
    assert remembered < batch + 0.05  # unguided is at .46


def test_tasks_draw_disjoint_sets_of_their_target():
    """No image or point twice among references, fresh and rest; classes and neighbourhoods are what the task says."""
    for make in tasks.TASKS:
        task = make()
        draw = [as_particles(part) for part in task.draw(0)]
        rows = np.concatenate([flat(part.x) for part in draw])
        assert len(np.unique(rows, axis=0)) == len(rows), task.name
        refs, fresh = draw[:2]
        assert refs.n == tasks.NUM_REFS
        assert refs.x.shape[1:] == fresh.x.shape[1:] == task.model.shape
        if task.proportions is not None:
            share = np.bincount(task.classify(refs.x), minlength=len(task.proportions)) / refs.n
            # a multinomial of 100 has a total variation of .08 ± .03 with seven modes
            assert 0.5 * np.abs(share - task.proportions).sum() < 0.16, task.name
        if task.centres is not None:
            assert abs((task.off_centre(draw[2].x) < 1).mean() - 0.99) < 0.01  # 4.5 binomial errors


def test_mixture_denoiser_is_exact():
    """Against the toys' mixture, whose closed form the tests of the samplers rest on."""
    task = tasks.mixture_16d()
    x = 3 * jax.random.normal(jax.random.key(0), (20, 16))
    exact = toys.Mixture(task.params.means, 0.5)
    for t in (0.9, 0.3, 0.02):
        level = task.model.schedule(t)
        np.testing.assert_allclose(
            task.model.denoise(task.params, x, level), exact(None, x, level), rtol=1e-4, atol=1e-4
        )
