"""Runtime type checks: every annotation of mmdjax is checked by beartype while the tests run.

Compilation is most of the tests' time, so XLA is told not to optimise; what depends on optimised code (scale 0 is plain
sampling bit for bit) runs in a process of its own.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from jaxtyping import install_import_hook

install_import_hook("mmdjax", "beartype.beartype")
