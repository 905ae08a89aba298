"""What a result was made with: device, processor and versions, as they affect numbers and speed."""

import os
import platform
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
