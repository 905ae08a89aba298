"""What the README says was measured, and the claim behind it holds."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from mmdjax import Memory, guided_sample
from mmdjax.metrics import energy_distance

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import alignment  # noqa: E402  # a script, found through the line above


def test_readme_has_the_measured_table():
    tasks = json.loads((ROOT / "benchmarks" / "results" / "alignment.json").read_text())["tasks"]
    assert alignment.markdown(tasks) in (ROOT / "README.md").read_text()


def test_untouched_default_beats_the_authors_rule_on_the_ring():
    """As in the benchmark, on seeds that it does not report."""
    table = alignment.measure(alignment.ring(), range(10, 12))
    mean = {name: np.mean(row["energy"]) for name, row in table.items()}
    assert mean["MMDGuidance()"] < mean[alignment.best_alpha(table)] < mean["unguided"]
    assert np.mean(table["MMDGuidance()"]["ratio"]) > 0.7  # no copying of references


def test_one_sample_at_a_time_aligns_with_memory():
    """96 samples one by one: alone each falls on the same references; around a memory they spread as a batch does."""
    ring, nothing, energies = alignment.ring(), Memory.empty(96, (2,)), []

    @jax.jit
    def one_more(key, refs, memory):
        return guided_sample(None, key, refs, model=ring.model, num_samples=1, memory=memory)

    for seed in range(3):
        refs, _, rest = ring.draw(seed)
        whole = guided_sample(None, jax.random.key(seed), refs, model=ring.model, num_samples=96).x
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
