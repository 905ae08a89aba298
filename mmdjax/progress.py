"""A progress bar that a compiled loop can drive."""

from typing import Any


class Bar:
    """A bar that opens at the first step and closes at the last; `jax.debug.callback` gives it the index of each.

    Args:
      total: number of steps.
      label: shown before the bar.
    """

    def __init__(self, total: int, label: str):
        self.total, self.label, self.bar = total, label, None

    def __call__(self, index: Any) -> None:
        from tqdm.auto import tqdm

        if self.bar is None or int(index) == 0:
            if self.bar is not None:
                self.bar.close()
            self.bar = tqdm(total=self.total, desc=self.label)
        self.bar.update(1)
        if int(index) == self.total - 1:
            self.bar.close()
            self.bar = None
