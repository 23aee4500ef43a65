"""One owner of a run directory: the process that writes it holds a lock, which the system lets go when it dies.

with hold("runs/ipo-md"):
    ...

owner    held by the process that writes the run; its id, its host and the time since, as JSON
"""

import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import orjson

from fastpref.data import files
from fastpref.method.errors import OwnerError, RunWarning

NAME = "owner"


@contextmanager
def hold(run_dir: Path | str | None, name: str = NAME) -> Iterator[None]:
    """Own a run directory while the block runs; a second owner is refused, of this process or another.

    The lock is the kernel's: a killed process leaves none behind, whatever the file says. Every kind of run takes it,
    and removes what the owner before left half-written.

    Args:
      run_dir: the directory, made if need be; None, for a run that writes nothing, owns nothing.
      name: of the file that is held; another for what is owned by itself, such as the log of judgements.

    Raises:
      OwnerError: another run owns the directory; the message names its process and host.
      OSError: the directory cannot be made or written to; the message names the path.

    Warns:
      RunWarning: the file system has no locks, so that nothing keeps a second process away.
    """
    if run_dir is None:
        yield
        return
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OwnerError(
                f"A run directory must have one owner, but {folder} is held by {_holder(lock)}. "
                "Wait for it, stop it, or choose another run_dir."
            ) from None
        except OSError as error:  # some network file systems
            warnings.warn(
                f"{folder} must have one owner, but its file system has no locks ({error.strerror}). "
                "Let no second process write to it.",
                RunWarning,
                stacklevel=4,
            )
        files.tidy(folder)
        since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        _sign(lock, {"process": os.getpid(), "host": socket.gethostname(), "since": since})
        try:
            yield
        finally:
            _sign(lock, {})
    finally:
        os.close(lock)


def _sign(lock: int, owner: Mapping[str, int | str]) -> None:
    with suppress(OSError):  # on a full disk the lock holds without a name
        os.ftruncate(lock, 0)
        os.pwrite(lock, orjson.dumps(owner) + b"\n", 0)


def _holder(lock: int) -> str:
    """The owner, as it signed."""
    try:
        signed = orjson.loads(os.pread(lock, 4096, 0))
        return f"process {signed['process']} on host {signed['host']} since {signed['since']}"
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return "a process that has left no name"
