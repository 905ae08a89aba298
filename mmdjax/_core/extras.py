"""Optional packages, imported where they are first needed."""

import importlib
import importlib.util
from typing import Any


def optional(module: str, extra: str, purpose: str) -> Any:
    """A module of a package that one of mmdjax's extras installs.

    Args:
      module: such as "matplotlib.figure".
      extra: such as "plots".
      purpose: what it is for, "to …".
    Raises:
      ImportError: it cannot be imported; the message says what installs it.

    Example:
      >>> optional("no_such_package.part", "plots", "to draw figures")
      Traceback (most recent call last):
      ImportError: to draw figures, install no_such_package (...): pip install "mmdjax[plots]"
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        message = f'{purpose}, install {package} ({error}): pip install "mmdjax[{extra}]"'
        raise ImportError(message, name=package) from error


def installed(package: str) -> bool:
    """Whether a package can be found; it is not imported.

    Example:
      >>> installed("numpy"), installed("no_such_package")
      (True, False)
    """
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it is None in sys.modules, or has no specification: imported by hand
        return False
