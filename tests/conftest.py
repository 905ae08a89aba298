"""Runtime type checks: every annotation of mmdjax is checked by beartype while the tests run.

Compilation is most of the tests' time, so XLA is told not to optimise; what depends on optimised code (scale 0 is plain
sampling bit for bit) runs in a process of its own.
"""

import gc
import os
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("mmdjax", "beartype.beartype")

MAPS, MANY = Path("/proc/self/maps"), 25_000  # Linux gives a process 65,530 memory mappings; a program takes some


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Between modules, drop compiled programs before there are too many for one process."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY:
        jax.clear_caches()
        gc.collect()
