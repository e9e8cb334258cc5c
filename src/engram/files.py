"""Files that are written whole or not at all.

What is new is written beside its target, flushed to the disk, and only then renamed over it: a process that
is killed, or a disk that is full, leaves what was there before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from engram.errors import EngramError


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write one file whole or not at all; text as UTF-8. Missing parent directories are made.

    Raises EngramError when the system refuses the write; a file that was there stays as it was.
    """
    target = Path(path)
    fresh = _sibling(target, "new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(fresh, target)
        _flush(target.parent)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """A directory to fill; it takes the place of `target` when the block ends without an exception.

    Otherwise it is removed and `target` stays as it was. Raises EngramError when the system refuses a write.
    """
    goal = Path(target)
    fresh = _sibling(goal, "new")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        _flush_tree(fresh)
        replace_directory(fresh, goal)
    except OSError as error:
        raise _refused(goal, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def replace_directory(fresh: Path, target: Path) -> None:
    """Rename the complete directory `fresh` to `target`, on the same disk; what `target` was is removed last.

    Two renames, because no portable call swaps directories: a machine that stops between them leaves the old
    directory beside the target, as `.NAME.old-…`. Raises OSError, with the old directory back in its place.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file, not a directory")
    old = _sibling(target, "old")
    existed = target.exists()
    if existed:
        os.rename(target, old)
    try:
        os.rename(fresh, target)
    except OSError:
        if existed:
            os.rename(old, target)
        raise
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sibling(target: Path, what: str) -> Path:
    target = target.absolute()
    return target.with_name(f".{target.name}.{what}-{uuid4().hex[:12]}")


def _refused(target: Path, error: OSError) -> EngramError:
    reason = error.strerror or str(error)
    return EngramError(f"could not write {target}: {reason}. What was there before is unchanged.")


def _flush_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _flush(path)
    _flush(directory)


def _flush(path: Path) -> None:
    """Ask the system to put a file, or a directory's list of names, on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
