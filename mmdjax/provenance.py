"""What a result was made with: device, processor and versions, as they affect numbers and speed."""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmdjax._files.atomic import write_json

PACKAGES = ("mmdjax", "jax", "jaxlib", "numpy", "optax", "flax")


def provenance() -> dict[str, str]:
    """Device, processor, Python and versions; starts JAX's backend.

    Example:
      >>> "jax" in provenance()
      True
    """
    import jax

    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "processor": f"{platform.machine()}, {_cores()} cores",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def training_origin(file: str | Path, **told: Any) -> dict[str, str]:
    """Where trained weights come from, as the strings that a safetensors header holds.

    Args:
      file: of the training script, `__file__`; the commit is that of the repository around it.
      told: what else there is to say: script, seed, steps, data, license.

    Example:
      >>> training_origin("train.py", seed=0, steps=100)["steps"]
      '100'
    """
    import jax

    git = ["git", "-C", str(Path(file).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # there is no git
        commit = ""
    return {
        "commit": commit or "unknown",
        **{name: str(value) for name, value in told.items()},
        "versions": ", ".join(f"{package} {_version(package)}" for package in ("jax", "flax", "optax")),
        "device": jax.devices()[0].device_kind,
    }


def write_report(path: str | Path, report: Mapping[str, Any]) -> None:
    """Write a result as indented JSON. The file appears under its name once it is whole; its folder is made.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "results" / "speed.json"
      >>> write_report(path, {**provenance(), "seconds": 1.2})
      >>> '"seconds": 1.2' in path.read_text()
      True
    """
    write_json(path, report)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a source tree on the path, say
        return "not installed"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
