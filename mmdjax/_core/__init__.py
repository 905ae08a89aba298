"""Numbers with the right derivatives, JAX's modes, progress bars, optional packages."""
