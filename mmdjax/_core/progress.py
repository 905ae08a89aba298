"""Progress bars: of loops on the host, and one that a compiled loop can drive."""

import functools
import warnings
from typing import Any


def progress_bar(iterable: Any = None, **how: Any) -> Any:
    """A bar of tqdm: a widget in notebooks that have ipywidgets, else a line of text on stderr.

    Args:
      iterable: what to go through; None: `update` moves the bar.
      how: settings of tqdm: `desc`, `total`, `unit`, `disable`.

    Example:
      >>> sum(progress_bar([1, 2], disable=True))
      3
    """
    return _tqdm()(iterable, **how)


@functools.cache
def _tqdm() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that ipywidgets is missing in a notebook: the line of text does
        from tqdm.auto import tqdm
    return tqdm


class Bar:
    """A bar that opens at the first step and closes at the last; `jax.debug.callback` gives it the index of each.

    JAX's persistent compilation cache keeps no program with such a call from the device to the host.

    Args:
      total: number of steps.
      label: shown before the bar.
    """

    def __init__(self, total: int, label: str):
        self.total, self.label, self.bar = total, label, None

    def __call__(self, index: Any) -> None:
        if self.bar is None or int(index) == 0:
            if self.bar is not None:
                self.bar.close()
            self.bar = progress_bar(total=self.total, desc=self.label)
        self.bar.update(1)
        if int(index) == self.total - 1:
            self.bar.close()
            self.bar = None
