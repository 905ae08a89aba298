"""What a result was made with: the device, the processor and the versions that decide numbers and speed."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a source tree on the path, say
        return "not installed"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
