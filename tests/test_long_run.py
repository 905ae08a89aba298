"""Long runs: what is on disk is what one uninterrupted run makes, whatever happened in between."""

import errno
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmdjax import (
    DDIM,
    IMQ,
    Cosine,
    DiffusionModel,
    Heun,
    Memory,
    MMDGuidance,
    Particles,
    Product,
    guided_sample,
    runs,
)
from mmdjax.checkpoint import CheckpointError
from mmdjax.runs import SavedSamples, load_samples, sample_many
from mmdjax.sampling import sample_with
from mmdjax.schedules import VPLinear, uniform_times


def shrink(params, x, level, cond):
    """The denoiser of Gaussian data of mean `params`."""
    return params + level.alpha * (x - level.alpha * params) / (level.alpha**2 + level.sigma**2)


MODEL = DiffusionModel(shrink, VPLinear(), (3,))
REFS = 0.3 * jax.random.normal(jax.random.key(1), (6, 3)) + 1
KEY = jax.random.key(7)
SETTINGS = {"model": MODEL, "num_samples": 14, "batch_size": 4, "memory": 8, "num_steps": 4}
BATCHES = 4


def run(out, params=0.5, key=KEY, refs=REFS, **changes):
    return sample_many(params, key, refs, out=out, **{**SETTINGS, **changes})


def arrays(out, names=("x", "mmd2", "shift_norm")):
    """Every array of every batch, as bytes."""
    samples = load_samples(out)
    return [samples.batch(i)[name].tobytes() for i in range(len(samples.rows)) for name in names]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run(out)
    return out


def stop_after(batches):
    """An `each` that raises once as many batches are on disk."""

    def each(start, x):
        if start // SETTINGS["batch_size"] + 1 == batches:
            raise KeyboardInterrupt

    return each


def test_batches_are_those_of_a_loop_of_ones_own(whole):
    made, memory = [], 8
    for i in range(BATCHES):
        settings = {"model": MODEL, "num_samples": 4, "num_steps": 4}
        batch = guided_sample(0.5, jax.random.fold_in(KEY, i), REFS, memory=memory, **settings)
        memory = batch.memory
        made.append(batch.x)
    expected = np.concatenate(made)[:14]
    samples = load_samples(whole)
    np.testing.assert_array_equal(np.asarray(samples), expected)
    assert len(samples) == 14
    np.testing.assert_array_equal(samples[5], expected[5])
    np.testing.assert_array_equal(samples[-1], expected[-1])
    for rows in (slice(3, 9), slice(4, 8), slice(None, None, 3), slice(12, 2, -4), slice(5, 5), slice(-3, None)):
        np.testing.assert_array_equal(samples[rows], expected[rows])
    np.testing.assert_array_equal(list(samples), expected)
    with pytest.raises(IndexError):
        samples[14]
    assert sorted(path.name for path in whole.iterdir()) == [
        *(f"batch-0000{i}.safetensors" for i in range(BATCHES)), "manifest.json",
    ]  # fmt: skip


def test_samples_are_indexed_as_an_array_of_them(whole):
    samples, expected = load_samples(whole), np.asarray(load_samples(whole))
    for rows in (
        np.int64(5), np.int32(-2), np.uint8(13), [3, 0, 13, 3], np.array([-1, 2]), np.array([[0, 5], [9, 1]]), [],
        np.arange(14) % 3 == 0, [True] + [False] * 13, jnp.array([4, 8]), slice(None, None, -1), slice(20, 30),
        slice(-100, 100), slice(2, 10, 50), np.zeros(14, bool),
    ):  # fmt: skip
        found, wanted = samples[rows], expected[np.asarray(rows, int) if isinstance(rows, list) and not rows else rows]
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(list(reversed(samples)), expected[::-1])
    for rows in (14, -15, np.int64(14), [0, 14], np.array([-15])):
        with pytest.raises(IndexError, match=r"there is no sample -?1\d; there are 14 samples"):
            samples[rows]
    with pytest.raises(IndexError, match=r"has shape \(3,\); there are 14 samples"):
        samples[np.ones(3, bool)]
    for rows in (True, 1.0, "x", None, ..., (3, 0), np.ones(2), np.bool_(True)):
        with pytest.raises(TypeError, match=r"samples are indexed by .*; give an integer"):
            samples[rows]
    copied = np.array(samples)
    copied[:] = 0  # not the file
    assert np.asarray(samples, np.float64).dtype == np.float64
    np.testing.assert_array_equal(samples[:], expected)


def test_a_run_without_its_first_batch_has_no_samples(whole, tmp_path):
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "batch-00000.safetensors").unlink()
    samples = load_samples(tmp_path, partial=True)
    assert len(samples) == 0
    assert list(samples) == []
    for found in (np.asarray(samples), samples[:], samples[3:9:2], samples[[]], samples[np.zeros(0, bool)]):
        assert found.shape == (0, 3)
        assert found.dtype == np.float32
    with pytest.raises(IndexError, match="there is no sample 0; there are 0 samples"):
        samples[0]


@pytest.mark.parametrize("batches", [1, 3])
def test_resumed_is_uninterrupted(whole, tmp_path, batches):
    with pytest.raises(KeyboardInterrupt) as caught:
        run(tmp_path, each=stop_after(batches))
    (note,) = caught.value.__notes__
    assert f"{4 * batches} of 14 samples are in {tmp_path}; repeat the call to resume the run" in note
    with pytest.raises(ValueError, match=f"lacks {BATCHES - batches} of 4 batches, the first is {batches}"):
        load_samples(tmp_path)
    assert len(load_samples(tmp_path, partial=True)) == 4 * batches
    seen = []
    run(tmp_path, each=lambda start, x: seen.append((start, x.shape)))
    assert seen == [(0, (4, 3)), (4, (4, 3)), (8, (4, 3)), (12, (2, 3))]
    assert arrays(tmp_path) == arrays(whole)


def test_a_finished_run_makes_nothing(whole, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    monkeypatch.setattr(runs, "sample_with", lambda *args, **kwargs: pytest.fail("made a batch"))
    assert len(run(whole)) == 14
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_published_memory_is_read_back(tmp_path):
    """The authors' memory holds samples as they were before their last shift, and forgets when it is full."""
    how = {"guidance": MMDGuidance.paper(alpha=0.05), "memory": 3, "batch_size": 1, "num_samples": 9}
    run(tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", each=stop_after(2), **how)
    run(tmp_path / "cut", **how)
    names = ("x", "mmd2", "remembered")
    assert arrays(tmp_path / "cut", names) == arrays(tmp_path / "whole", names)


def test_published_memory_with_conditions_and_a_cut_last_batch(tmp_path):
    how = {"guidance": MMDGuidance.paper(alpha=0.05), "memory": 3, "cond": LABELS}
    run(tmp_path, **how)
    before = arrays(tmp_path, ("x", "mmd2", "remembered"))
    assert len(run(tmp_path, **how)) == 14
    (tmp_path / "batch-00002.safetensors").unlink()
    run(tmp_path, **how)
    assert arrays(tmp_path, ("x", "mmd2", "remembered")) == before
    settings = {"model": MODEL, "num_samples": 4, "num_steps": 4, "guidance": how["guidance"], "cond": LABELS[:4]}
    made = guided_sample(0.5, jax.random.fold_in(KEY, 0), REFS, memory=3, **settings).memory
    read = runs._remember(
        Memory.empty(3, (3,), LABELS), load_samples(tmp_path).batch(0), LABELS[:4], 4, how["guidance"], True
    )
    jax.tree.map(np.testing.assert_array_equal, read, made)  # in the same slots: sums over them round alike


def test_conditions_and_a_memory_to_begin_with(tmp_path):
    cond = jax.random.normal(jax.random.key(3), (14, 2))
    kernel = Product(x=IMQ(1.0), cond=Cosine())
    before = Memory.empty(8, (3,), cond).push(Particles(REFS[:3], cond[:3]))
    how = {"cond": cond, "guidance": MMDGuidance(kernel=kernel), "memory": before, "refs": Particles(REFS, cond[:6])}
    run(tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", each=stop_after(2), **how)
    run(tmp_path / "cut", **how)
    assert arrays(tmp_path / "cut") == arrays(tmp_path / "whole")
    with pytest.raises(FileExistsError, match=r"cond was another float32\[14, 2\]"):
        run(tmp_path / "cut", **{**how, "cond": cond + 1})


DAMAGES = {
    "a bit of the data": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    "a bit of the header": lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
    "cut off": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "the rows that it claims": lambda data: data.replace(b'"rows":"4:8"', b'"rows":"0:4"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_batch_is_found_and_made_again(whole, tmp_path, damage, monkeypatch):
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "batch-00001.safetensors"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert path.read_bytes() != (whole / path.name).read_bytes()
    with pytest.raises(CheckpointError, match=r"batch-00001\.safetensors is missing or damaged"):
        load_samples(tmp_path)[5]
    made = []
    monkeypatch.setattr(runs, "sample_with", lambda *a, **k: made.append(1) or sample_with(*a, **k))
    run(tmp_path)
    assert len(made) == 1  # around the same memory, so that the batches after it stay what they are
    assert path.read_bytes() == (whole / path.name).read_bytes()


def test_a_batch_of_another_place_or_run_is_not_taken(whole, tmp_path):
    run(tmp_path / "mine")
    run(tmp_path / "other", params=0.6)
    path = tmp_path / "mine" / "batch-00001.safetensors"
    path.write_bytes((whole / "batch-00002.safetensors").read_bytes())
    run(tmp_path / "mine")
    assert arrays(tmp_path / "mine") == arrays(whole)
    path.write_bytes((tmp_path / "other" / path.name).read_bytes())
    with pytest.raises(FileExistsError, match=r"batch-00001\.safetensors is of another run"):
        run(tmp_path / "mine")


def test_damaged_manifest_is_written_anew(whole, tmp_path):
    run(tmp_path)
    manifest = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(manifest[:100])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_samples(tmp_path)
    with pytest.raises(FileExistsError, match="of another run"):  # nothing is overwritten without the manifest either
        run(tmp_path, num_steps=5)
    (tmp_path / "manifest.json").write_text(manifest[:100])
    run(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == manifest
    assert arrays(tmp_path) == arrays(whole)


GRID = np.array([1.0, 0.6, 0.0])
OTHER = {
    "params differ": {"params": 0.6},
    "refs was another float32[6, 3]": {"refs": REFS.at[0].add(1e-3)},
    "refs was float32[6, 3] and is float32[5, 3]": {"refs": REFS[:5]},
    "refs was mmdjax.Particles and is None": {"refs": None},
    "guidance.scale was 1.0 and is 0.5": {"guidance": MMDGuidance(scale=0.5)},
    "sampler.eta was 1.0 and is 0.0": {"sampler": DDIM(eta=0.0)},
    "sampler was mmdjax.DDIM and is mmdjax.Heun": {"sampler": Heun()},
    "steps was 4 and is 5": {"num_steps": 5},
    "steps was 4 and is 2": {"times": [1.0, 0.5, 0.0]},
    "steps was 4 and is a grid of 2 steps from t = 1 to 0": {"times": GRID},
    "key was threefry2x32 [0, 7] and is threefry2x32 [0, 8]": {"key": jax.random.key(8)},
    "batch_size was 4 and is 5": {"batch_size": 5},
    "num_samples was 14 and is 15": {"num_samples": 15},
    "memory was 8 and is None": {"memory": None},
    "model.schedule": {"model": DiffusionModel(shrink, VPLinear(0.2), (3,))},
    "model.denoiser.function was another function: test_long_run.shrink, now test_long_run.<lambda>": {
        "model": DiffusionModel(lambda params, x, level, cond: x, VPLinear(), (3,))
    },
}


@pytest.mark.parametrize("says", OTHER)
def test_other_settings_are_refused_by_name(whole, says):
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    with pytest.raises(FileExistsError) as caught:
        run(whole, **OTHER[says])
    assert "holds a run of other settings; nothing was changed" in str(caught.value)
    assert says in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_two_grids_of_ones_own_are_told_apart(tmp_path):
    how = {"refs": None, "memory": None, "num_samples": 1, "times": GRID}
    run(tmp_path, **how)
    run(tmp_path, **{**how, "times": GRID.tolist()})
    with pytest.raises(FileExistsError, match=r"\n  steps was another grid of 2 steps from t = 1 to 0$"):
        run(tmp_path, **{**how, "times": [1.0, 0.7, 0.0]})


def test_what_a_wrapper_closes_over_defines_a_run(tmp_path):
    """Not two models in one folder."""

    def scaled(by):
        @functools.wraps(shrink)
        def wrapper(params, x, level, cond):
            return by * shrink(params, x, level, cond)

        return DiffusionModel(wrapper, VPLinear(), (3,))

    how = {"refs": None, "memory": None, "num_samples": 4}
    run(tmp_path, model=scaled(0.5), **how)
    run(tmp_path, model=scaled(0.5), **how)
    with pytest.raises(FileExistsError, match=r"wrappers\[0\]\.closure\.by was 0\.5 and is 0\.9"):
        run(tmp_path, model=scaled(0.9), **how)


PLAIN = lambda params, x, level, cond: level.alpha * x
FIRST = {  # a run that the version of the first format made
    "params": {"w": np.ones(2)}, "refs": np.arange(18).reshape(6, 3) / 8, "num_steps": 2, "memory": 8,
    "model": DiffusionModel(PLAIN, VPLinear(), (3,)),
}  # fmt: skip
LABELS = np.arange(14) % 3
EQUAL = {
    "labels in int64 and int32": ({**FIRST, "cond": LABELS.astype(np.int64)}, {**FIRST, "cond": jnp.asarray(LABELS)}),
    "references in float64 and float32": ({"refs": np.asarray(REFS, np.float64)}, {"refs": REFS}),
    "parameters": ({"params": np.float64(0.5)}, {"params": jnp.float32(0.5)}),
    "a number's types": ({"guidance": MMDGuidance(scale=1 / 3)}, {"guidance": MMDGuidance(scale=np.float32(1 / 3))}),
    "equal weights": ({}, {"refs": Particles(REFS, weight=np.full(6, 2.0))}),
    "the default grid": ({}, {"times": uniform_times(4)}),
    "the default grid as a list": ({}, {"times": [1, 0.75, 0.5, 0.25, 0]}),
    "an empty memory": ({}, {"memory": Memory.empty(8, (3,))}),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_settings_resume(name, tmp_path):
    """However they are given: whatever the first call leaves to the second one has the same bits."""
    one, other = EQUAL[name]
    run(tmp_path, **one)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "batch-00001.safetensors").unlink()
    run(tmp_path, **other)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


FIRST_FORMAT = {  # what the version of the first format wrote, and the hash by which its batches name it
    "definition": {
        "format": "mmdjax run 1", "num_samples": 6, "batch_size": 4, "steps": 2, "memory": 8,
        "key": "threefry2x32 [0, 7]",
        "params": "sha256 b07a95fc61f2d1076ff2706931bb7631783442fcd95f4132d56d0d00335a3d8a",
        "refs": {"is": "mmdjax.particles.Particles", "x": None, "cond": None, "weight": None},
        "cond": "int64[6] sha256 ede135f68cfdfbc6932a8ce4a65d166eee37320eaf55b94ebd929975842341f1",
        "model": {
            "is": "mmdjax.denoisers.DiffusionModel",
            "denoiser": {
                "is": "mmdjax.tree.Function",
                "function": {
                    "is": "test_long_run.<lambda>",
                    "code": "72fb779ac93147b719258722029e7418da7899b5f92729b3c5f1a9ff04b4d9c2",
                    "closure": {},
                    "defaults": [None, None],
                },
            },
            "schedule": {"is": "mmdjax.schedules.VPLinear", "beta_min": 0.1, "beta_max": 20.0},
            "shape": [3],
        },
        "guidance": {
            "is": "mmdjax.guidance.MMDGuidance", "kernel": None, "scale": 1.0, "at": "denoised", "estimator": "u",
            "inner_steps": None, "precondition": None, "transform": None, "window": [0.0, 1.0], "published": False,
        },
        "sampler": {"is": "mmdjax.samplers.DDIM", "eta": 1.0},
        "versions": {"mmdjax": "0.1.0", "jax": "0.10.2", "jaxlib": "0.10.2", "python": "3.11"},
        "numerics": {"enable_x64": False, "default_matmul_precision": None, "threefry_partitionable": True},
    },
    "float64": (
        "float64[6, 3] sha256 2f17f9677f9ff7e1177d2ecd071b08afece32ebc557fa110aff871450a26b86c",
        "9848cdbe6b9f5b967f0411a7e2fcd6a64c1d15d44793ac982c3f29c118c53245",
    ),
    "float32": (
        "float32[6, 3] sha256 221a6109b3e555bece3cf1fe759c0aa92543eeab3fc88dbedbd488a13643cf04",
        "fd26f48bf78d0dd53b98480652a612f4ca7a22562655a6a1a1abf7f958192e16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_run_of_the_first_format_resumes(dtype, tmp_path):
    definition = json.loads(json.dumps(FIRST_FORMAT["definition"]))
    definition["refs"]["x"], name = FIRST_FORMAT[dtype]
    assert SavedSamples(tmp_path, definition).id == name
    made = runs.provenance()  # what follows from where the tests run
    definition["versions"] = {key: made[key] for key in ("mmdjax", "jax", "jaxlib")} | {
        "python": ".".join(platform.python_version_tuple()[:2])
    }
    code = PLAIN.__code__
    seen = [code.co_code.hex(), [repr(constant) for constant in code.co_consts], code.co_names, code.co_varnames]
    definition["model"]["denoiser"]["function"]["code"] = hashlib.sha256(repr(seen).encode()).hexdigest()
    definition["numerics"] |= {key: getattr(jax.config, f"jax_{key}") for key in definition["numerics"]}
    made_with = made | {"devices": 1}
    (tmp_path / "manifest.json").write_text(json.dumps({"definition": definition, "made_with": made_with}))
    how = FIRST | {"refs": FIRST["refs"].astype(dtype), "cond": np.arange(6) % 3, "num_samples": 6}

    def batch(i, memory, cond):
        how = {"model": FIRST["model"], "num_samples": 4, "num_steps": 2, "memory": memory, "cond": cond}
        return guided_sample(FIRST["params"], jax.random.fold_in(KEY, i), FIRST["refs"], **how)

    first = batch(0, 8, np.array([0, 1, 2, 0]))
    expected = np.concatenate([first.x, batch(1, first.memory, np.array([1, 2, 0, 1])).x[:2]])
    arrays = {"x": first.x, "mmd2": first.trace.mmd2, "shift_norm": first.trace.shift_norm}
    SavedSamples(tmp_path, definition).write(0, jax.tree.map(np.asarray, arrays))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    samples = run(tmp_path, **how)
    assert {path: path.read_bytes() for path in before} == before
    np.testing.assert_array_equal(np.asarray(samples), expected)
    np.testing.assert_array_equal(np.asarray(load_samples(tmp_path)), expected)
    with pytest.raises(FileExistsError, match=r"\n  params differ$"):
        run(tmp_path, **how | {"params": {"w": np.zeros(2)}})


def test_other_versions_are_refused_and_other_devices_said(whole, tmp_path, monkeypatch):
    run(tmp_path)
    provenance = runs.provenance
    monkeypatch.setattr(runs, "provenance", lambda: provenance() | {"jax": "0.0.1"})
    with pytest.raises(FileExistsError, match=r"versions.jax was .* and is 0.0.1"):
        run(tmp_path)
    monkeypatch.setattr(runs, "provenance", lambda: provenance() | {"device": "tpu: v9"})
    with pytest.warns(UserWarning, match="1 × cpu: cpu, and this is 1 × tpu: v9: the samples agree .* to rounding"):
        run(tmp_path)


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match=r"holds thesis.txt but no run; nothing was overwritten"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(FileNotFoundError, match="give the folder that sample_many wrote"):
        load_samples(tmp_path)


def test_mistakes_leave_no_folder(tmp_path):
    out = tmp_path / "out"
    for changes, text in (
        ({"num_samples": 0}, "num_samples is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"cond": jnp.zeros((4, 2))}, r"cond has shape \(4, 2\); it needs one row for each of the 14 samples"),
        ({"refs": jnp.zeros((6, 2))}, r"refs have shape \(6, 2\)"),
        ({"memory": 0}, "memory is 0"),
    ):
        with pytest.raises(ValueError, match=text):
            run(out, **changes)
    assert not out.exists()
    out.write_text("notes")
    for wrong in (out, None):
        with pytest.raises(NotADirectoryError, match="which is not a folder; give one, or a path that does not exist"):
            run(wrong)
    assert out.read_text() == "notes"


def test_a_run_without_a_batch_takes_other_settings(tmp_path):
    with pytest.raises(ValueError, match="times must decrease"):
        run(tmp_path, times=[0.0, 1.0])
    assert len(run(tmp_path)) == 14


def test_what_is_not_finite_is_not_kept(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"samples \[0, 1, 2, 3\] are not finite, and their batch was not kept"
    ):
        run(tmp_path, params=jnp.nan, refs=None)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_bars_tell_the_time_left(tmp_path, capfd):
    run(tmp_path, progress=True)
    assert "samples: 100%" in capfd.readouterr().err


# --- faults ---


def fill(monkeypatch, from_write):
    """A disk that is full from the given call of fsync on."""
    calls, fsync = [], os.fsync

    def full(file):
        calls.append(file)
        if len(calls) >= from_write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("from_write", [1, 3])
def test_full_disk(whole, tmp_path, monkeypatch, from_write):
    with monkeypatch.context() as patch:
        fill(patch, from_write)
        with pytest.raises(OSError, match=r"No space left on device; .*repeat the call") as caught:
            run(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.glob("*.part"))
    run(tmp_path)
    assert arrays(tmp_path) == arrays(whole)


def test_folder_that_vanishes(whole, tmp_path):
    out = tmp_path / "out"

    def each(start, x):
        if start == 4:
            out.rename(tmp_path / "elsewhere")

    with pytest.raises(FileNotFoundError, match="the folder was removed or replaced while in use") as caught:
        run(out, each=each)
    assert "nothing of the run is left there; repeat the call to begin it again" in str(caught.value)
    assert not out.exists()
    run(tmp_path / "elsewhere")
    assert arrays(tmp_path / "elsewhere") == arrays(whole)
    run(out)
    assert arrays(out) == arrays(whole)


@pytest.fixture
def unprivileged():
    """From its call on a user whom permissions bind; root is not bound."""
    before = os.geteuid()
    yield lambda: os.seteuid(65534) if before == 0 else None
    os.seteuid(before)


def test_folder_that_becomes_read_only(whole, unprivileged):
    expected, _ = arrays(whole), unprivileged()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"

        def each(start, x):
            if start == 4:
                out.chmod(0o555)

        with pytest.raises(PermissionError, match=r"Permission denied; 8 of 14 samples are in .*; repeat the call"):
            run(out, each=each)
        with pytest.raises(PermissionError):
            run(out)
        out.chmod(0o755)
        run(out)
        assert arrays(out) == expected


def test_second_run_in_one_folder_refuses(tmp_path):
    def each(start, x):
        if start == 4:
            with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on .* is at work in this folder"):
                run(tmp_path)

    run(tmp_path, each=each)


CHILD = """
import sys
sys.path.insert(0, sys.argv[2])
import test_long_run
test_long_run.run(sys.argv[1], each=lambda start, x: print(start, flush=True))
"""


def child(out):
    command = [sys.executable, "-c", CHILD, str(out), str(Path(__file__).parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_run_goes_on_in_another_process(whole, tmp_path):
    """kill -9 after the second batch; a lock that it leaves is none. The bits are those of this process."""
    with child(tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "4":
                process.kill()
                break
    assert process.returncode == -9
    assert (tmp_path / ".lock").exists()
    run(tmp_path)
    assert arrays(tmp_path) == arrays(whole)
    assert not (tmp_path / ".lock").exists()


@pytest.mark.slow
def test_sharded_run_resumes_bit_for_bit():
    """The batch over four devices; the same samples on one, to rounding."""
    code = f"""
import sys, tempfile, warnings
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_long_run import *
mesh = jax.make_mesh((4,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("n"))
folders = [Path(tempfile.mkdtemp()) for _ in range(3)]
run(folders[0], sharding=sharding)
try:
    run(folders[1], sharding=sharding, each=stop_after(2))
except KeyboardInterrupt:
    run(folders[1], sharding=sharding)
assert arrays(folders[0]) == arrays(folders[1])
run(folders[2])
np.testing.assert_allclose(load_samples(folders[2])[:], load_samples(folders[0])[:], rtol=1e-4, atol=1e-5)
(folders[2] / "batch-00001.safetensors").unlink()
with pytest.warns(UserWarning, match="begun on 1 × cpu: cpu, and this is 4 × cpu: cpu"):
    run(folders[2], sharding=sharding)
np.testing.assert_allclose(load_samples(folders[2])[:], load_samples(folders[0])[:], rtol=1e-4, atol=1e-5)
"""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags}, check=False
    )
    assert done.returncode == 0, done.stderr


def test_manifest_says_what_defines_the_run(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["definition"]["num_samples"] == 14
    assert manifest["definition"]["sampler"] == {"is": "mmdjax.DDIM", "eta": 1.0}
    assert manifest["made_with"]["devices"] == 1
