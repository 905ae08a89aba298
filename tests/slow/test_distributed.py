"""Sharded sampling: 8 simulated devices, and 2 and 4 real processes joined over loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import sharded

from mmdjax import load_samples
from mmdjax.distributed import batch_mesh, batch_sharding, initialize, shard_params

SCRIPT = Path(__file__).with_name("sharded.py")
FLAGS = "--xla_backend_optimization_level=0"


def start(name, *args, devices=1):
    environment = os.environ | {
        "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(SCRIPT.parents[2]),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, str(SCRIPT), name, *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process, timeout=600):
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output


def stop(processes):
    for process in processes:
        process.kill()
        process.communicate()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    "name",
    ["agree", "counts", "transformations", "joined", "sent", "flops", "transformer", "placed", "resumes", "metrics"],
)
def test_8_devices(name):
    finish(start(name, *(sharded.CASES if name == "agree" else ()), devices=8))


@pytest.mark.parametrize("size", [2, 4])
def test_processes_agree_with_one(size, tmp_path):
    port = free_port()
    processes = [start("process", rank, size, port, tmp_path) for rank in range(size)]
    for process in processes:
        finish(process)
    parts = [np.load(tmp_path / f"{rank}.npz") for rank in range(size)]
    np.testing.assert_array_equal(np.concatenate([part["index"] for part in parts]), np.arange(sharded.N))
    first = sharded.sample(memory=10)
    alone = sharded.sample(memory=first.memory, key=1)
    rows = np.concatenate([part["rows"] for part in parts])
    sharded.assert_equal((np.asarray(alone.x), np.asarray(alone.trace.mmd2)), (rows, parts[-1]["mmd2"]))


@pytest.mark.parametrize("victim", [0, 2])
def test_killed_process_ends_the_others(victim):
    port = free_port()
    processes = [start("process_without_end", rank, 4, port) for rank in range(4)]
    try:
        for process in processes:
            while (line := process.stdout.readline()).strip() != "1":  # past compilation, in the midst of a run
                assert line, process.wait()
        processes[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        for process in processes:
            output, _ = process.communicate(timeout=60)
            assert process.returncode != 0
            if process is not processes[victim]:
                assert "another task died" in output
        assert time.monotonic() - killed < 60
    finally:
        stop(processes)


def test_long_run_of_processes(tmp_path):
    """Each writes its share of the batches; after one is killed, the same four calls make what is lacking."""
    names = [f"batch-{i:05d}.safetensors" for i in range(10)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def begin(out):
        port = free_port()
        return [start("many", rank, 4, port, out) for rank in range(4)]

    for process in begin(whole):
        finish(process)
    processes = begin(killed)
    try:
        while (line := processes[2].stdout.readline()).strip() != "32":  # has written batch 2, the first of its own
            assert line, processes[2].wait()
        processes[2].send_signal(signal.SIGKILL)
        for process in processes:
            process.communicate(timeout=60)
            assert process.returncode != 0
    finally:
        stop(processes)
    made = {path.name: path.stat().st_mtime_ns for path in killed.glob("batch-*.safetensors")}
    assert names[2] in made
    assert len(made) < len(names)
    for process in begin(killed):
        finish(process)
    assert {name: (killed / name).stat().st_mtime_ns for name in made} == made  # those were not made again
    assert [(killed / name).read_bytes() for name in names] == [(whole / name).read_bytes() for name in names]
    assert len(load_samples(killed)) == sharded.RUN
    alone = sharded.run(sharded.REFS, sharded.PARAMS, tmp_path / "alone")
    sharded.assert_equal(np.asarray(alone), np.asarray(load_samples(killed)))


def test_bad_input():
    mesh = batch_mesh(jax.devices()[:1], axis="data")
    with pytest.raises(ValueError, match="axis is 'batch', but the mesh has 'data'"):
        batch_sharding(mesh)
    with pytest.raises(ValueError, match="axis is 'model'"):
        shard_params({}, mesh, "model")
    with pytest.raises(ValueError, match="num_processes and process_id are not given"):
        initialize("127.0.0.1:1")
    with pytest.raises(ValueError, match="coordinator_address is not given"):
        initialize(num_processes=1, process_id=0)
