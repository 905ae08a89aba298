"""Files and folders that appear under their name only once they are whole."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to: moved to `path` when the block ends, removed when it fails.

    Example:
      >>> import tempfile
      >>> target = Path(tempfile.mkdtemp()) / "new" / "a.txt"
      >>> with written_whole(target) as partial:
      ...     _ = partial.write_text("all of it")
      >>> target.read_text()
      'all of it'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut may keep the name and lose the bytes
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # the error that led here says more
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_written_whole(path: str | Path) -> Iterator[Path]:
    """A folder beside `path` to write into: moved to `path`, which is empty or missing, when the block ends, removed
    when it fails.

    Example:
      >>> target = Path(tempfile.mkdtemp()) / "new" / "folder"
      >>> with folder_written_whole(target) as partial:
      ...     _ = (partial / "a.txt").write_text("all of it")
      >>> [path.name for path in target.iterdir()]
      ['a.txt']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as private:
        partial = Path(private) / path.name  # the temporary folder itself is closed to others
        partial.mkdir()
        yield partial
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()
        os.replace(partial, path)


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write an object as indented JSON."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
