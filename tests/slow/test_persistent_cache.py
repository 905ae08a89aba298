"""What JAX's persistent compilation cache keeps of runs, and that a bar changes no bit."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mmdjax.sd.tiny import write_tiny

FLOW = """
import jax, jax.numpy as jnp
from mmdjax import DiffusionModel
from mmdjax.diffeq import probability_flow
from mmdjax.schedules import RectifiedFlow
model = DiffusionModel(lambda p, x, level, c: p * x, RectifiedFlow(), (2,))
refs = jnp.array([[1.0, 0], [0, 1], [1, 1]])
how = {"model": model, "num_samples": 4}
print(jnp.isfinite(probability_flow(0.5, jax.random.key(0), refs, **how).x).all())
print(jnp.isnan(probability_flow(0.5, jax.random.key(0), refs, max_steps=2, **how).x).all())
"""


def run(words, folder, **more):
    """The process, and the names of the programs that the cache in a folder then holds."""
    environment = os.environ | more | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip
    done = subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)
    kept = {path.name.rpartition("-")[0].rpartition("-")[0] for path in folder.glob("*-cache")}
    return done, kept


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def refs(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("refs"), np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_quiet_runs_are_kept_and_have_the_same_bits(model, refs, tmp_path):
    words = ["-m", "mmdjax", "sample", model, "--refs", refs, "-n", 3, "--batch-size", 2, "--steps", 3, "--no-compare"]
    told = {"JAX_EXPLAIN_CACHE_MISSES": "1"}
    shown, kept = run([*words, "--out", tmp_path / "shown"], tmp_path / "cache-shown", **told)
    assert shown.returncode == 0
    assert "sampling: 100%" in shown.stderr
    assert "MISS for 'jit__sample'" in shown.stderr
    assert "jit_decode_whole" in kept
    assert "jit__sample" not in kept
    quiet, kept = run([*words, "--out", tmp_path / "quiet", "--quiet"], tmp_path / "cache-quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    assert "jit__sample" in kept
    again, _ = run([*words, "--out", tmp_path / "again", "--quiet"], tmp_path / "cache-quiet", **told)
    assert again.returncode == 0
    assert "MISS for 'jit__sample'" not in again.stderr  # found, not compiled
    files = {path.name: path.read_bytes() for path in (tmp_path / "shown").iterdir() if path.name != "run.json"}
    for other in ("quiet", "again"):
        folder = tmp_path / other
        assert files == {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


def test_adaptive_solvers_are_kept_without_their_checks(tmp_path):
    done, kept = run(["-c", FLOW], tmp_path / "checked")
    assert "RuntimeError" in done.stderr or "EquinoxRuntimeError" in done.stderr  # of max_steps
    assert "jit__solve" not in kept
    done, kept = run(["-c", FLOW], tmp_path / "unchecked", EQX_ON_ERROR="nan")
    assert done.stdout.split() == ["True", "True"], done.stderr
    assert "jit__solve" in kept
