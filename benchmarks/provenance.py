"""What a benchmark ran on, for its JSON."""

import platform
from importlib.metadata import version

import jax


def provenance() -> dict[str, str]:
    """Device, processor, Python and the versions that decide speed and numbers."""
    device = jax.devices()[0]
    packages = ("mmdjax", "jax", "jaxlib", "numpy", "optax", "flax")
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "processor": f"{platform.machine()}, {_cores()} cores",
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
