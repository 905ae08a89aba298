"""One run a folder: a lock that the kernel releases when its process ends, however it ends."""

import contextlib
import errno
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not told apart there
    fcntl = None

NAME = ".lock"


class FolderLock:
    """A folder held by this process; made by `locked`."""

    def __init__(self, path: Path, file: int):
        self.path, self.file = path, file

    def check(self) -> None:
        """Raise FileNotFoundError where the folder was removed or replaced since: what is written now would be lost."""
        if not _is(self.path, self.file):
            folder = self.path.parent
            raise FileNotFoundError(errno.ENOENT, "the folder was removed or replaced while in use", str(folder))


@contextlib.contextmanager
def locked(folder: str | Path, name: str = NAME) -> Iterator[FolderLock]:
    """Hold a folder, made where there is none, until the block ends.

    The lock is `flock` on a file in it: the kernel releases it when the process ends, killed or not, so that a file
    left behind is no lock.

    Raises:
      BlockingIOError: another process holds it; the message names the process.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp()
      >>> with locked(folder):
      ...     os.listdir(folder)
      ['.lock']
      >>> os.listdir(folder)
      []
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    file = _acquire(path)
    try:
        yield FolderLock(path, file)
    finally:
        with contextlib.suppress(OSError):  # the folder may have become read-only, or be gone
            if _is(path, file):
                path.unlink()
        os.close(file)


def _acquire(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is(path, file):  # its holder removed it between opening and locking
                os.close(file)
                continue
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except BlockingIOError:
            holder = os.read(file, 200).decode(errors="replace") or "another process"
            os.close(file)
            message = f"{holder} is at work in this folder; wait for it to end, or give another folder"
            raise BlockingIOError(errno.EWOULDBLOCK, message, str(path.parent)) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                os.close(file)
                raise
            warnings.warn(f"{path.parent} lies on a file system without locks; start no second run in it", stacklevel=4)
        return file


def _is(path: Path, file: int) -> bool:
    try:
        there, mine = path.stat(), os.fstat(file)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)
