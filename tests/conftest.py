"""What all tests share: programs that compile fast, and, where asked for, runtime type checks.

Nearly all of the tests' time is compilation, so XLA is told not to optimise; what depends on optimised code (scale 0 is
plain sampling bit for bit) runs in a process of its own. With MMDJAX_TYPES=1 beartype checks every annotation of mmdjax
while the tests run; CI does so in the slow ones.

To keep a new test cheap:

- Outside `jit`, each operation compiles for each shape and dtype, some 15 ms a time; `scan` and `cond` at each call.
  Take shapes that the file has already, or put the whole computation into one `jax.jit`.
- Pass numbers, kernels, schedules and samplers as arguments of one jitted function; closed over, they compile anew.
- `jax.jit(jax.value_and_grad(f))` is one program for a gradient and its differences; `jax.eval_shape` needs none.
- Draw values, not shapes. Take small blocks from `small_blocks` rather than thousands of rows.
- What still takes seconds is marked `slow`, or goes to tests/slow, with a quick case of the same truth left behind.
"""

import gc
import os
from pathlib import Path

os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

import jax
import pytest
from jaxtyping import install_import_hook

if os.environ.get("MMDJAX_TYPES", "0") != "0":
    install_import_hook("mmdjax", "beartype.beartype")

MAPS, MANY = Path("/proc/self/maps"), 45_000  # Linux gives a process 65,530 memory mappings; a program takes some


def pytest_collection_modifyitems(items):
    """Slow tests guide many samples by few references, for other reasons than the result: no error of theirs.

    What is said when, and when nothing is said, is for test_advice.py and the quick tests.
    """
    for item in items:
        slow = item.get_closest_marker("slow") or "slow" in item.path.parts
        if slow and item.path.name != "test_advice.py":
            item.add_marker(pytest.mark.filterwarnings("ignore::mmdjax.GuidanceWarning"))


def pytest_collection_finish(session):
    """What is imported by now stays: the collector of garbage need not look at it each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Between modules, drop compiled programs before there are too many for one process."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY:
        jax.clear_caches()
        gc.collect()
