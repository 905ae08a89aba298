"""A little of what `benchmarks/faults.py` does a thousand times, and what benchmarks/README.md says of it."""

import json
import random
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import sd_toys
from safetensors.numpy import save_file

from mmdjax import checkpoint
from mmdjax.checkpoint import CheckpointError, open_safetensors
from mmdjax.sd.files.places import open_file
from mmdjax.sd.models import load_models

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import faults  # noqa: E402  # scripts, found through the line above
import fuzz  # noqa: E402


@pytest.fixture(autouse=True)
def without_type_checks():
    """The errors are those that a user sees, not those of the type checker that only the tests have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_readme_has_the_measured_table():
    results = json.loads(faults.RESULTS.read_text())
    assert faults.markdown(results) in (ROOT / "benchmarks" / "README.md").read_text()
    assert {name: case["tried"] for name, case in results["cases"].items()} == faults.COUNTS


def test_damaged_files_are_refused_or_read_as_they_are(tmp_path):
    model = sd_toys.write_pipeline(tmp_path / "model") / "text_encoder"
    weights, config = model / "model.safetensors", model / "config.json"
    outcomes = {"loaded": 0, "refused": 0}
    for seed in range(60):
        rng = random.Random(seed)
        path, mutate = (weights, fuzz.mutate_safetensors) if seed % 3 else (config, fuzz.mutate_config)
        whole = path.read_bytes()
        path.write_bytes(mutate(whole, rng))
        try:
            load_models(model)
            outcomes["loaded"] += 1
            assert fuzz.agrees(weights)
        except (ValueError, OSError):
            outcomes["refused"] += 1
        path.write_bytes(whole)
    assert min(outcomes.values()) > 5  # neither is all of them


def test_what_compares_with_the_safetensors_library_can_tell(tmp_path, monkeypatch):
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"w": np.zeros(3)}, path)
    save_file({"w": np.ones(3)}, other)
    assert fuzz.agrees(path)
    monkeypatch.setattr(checkpoint, "open_safetensors", lambda _: open_safetensors(other))
    assert not fuzz.agrees(path)


def test_damaged_archives_are_refused_or_read(tmp_path):
    arrays, path = {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3)}, tmp_path / "model.ckpt"
    sound = fuzz.archive(arrays)
    path.write_bytes(sound)
    np.testing.assert_array_equal(open_file(path)["w"], arrays["w"])
    refused = 0
    for seed in range(60):
        path.write_bytes(fuzz.mutate_archive(sound, random.Random(seed)))
        try:
            dict(open_file(path))
        except CheckpointError:
            refused += 1
    assert 30 < refused < 60


def test_random_arguments_are_refused_or_give_what_is_documented():
    found = fuzz.api(40)
    assert found["failures"] == []
    assert min(found["outcomes"].values()) > 5  # of "result" and "refused"
