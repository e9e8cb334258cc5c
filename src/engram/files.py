"""Files that are written whole or not at all.

What is new is written beside its target, flushed to the disk, and only then renamed over it: a process that
is killed, or a disk that is full, leaves what was there before. A directory that is written here holds a list of its
files' digests (`SHA256SUMS`, which `sha256sum -c` reads too), so that damage is found when they are read again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from engram.errors import EngramError

SUMS = "SHA256SUMS"
LEFT = re.compile(r"\.(?P<name>.+)\.(?P<what>new|old)-[0-9a-f]{12}")  # what a killed process leaves behind


def write_atomic(path: str | Path, data: bytes | str, mode: int = 0o666) -> None:
    """Write one file whole or not at all; text as UTF-8. Missing parent directories are made. `mode`: who may read and
    write it, less what the process's mask takes away.

    Raises EngramError when the system refuses the write; a file that was there stays as it was.
    """
    target = Path(path)
    fresh = _sibling(target, "new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(fresh, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(fresh, target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        with suppress(OSError):
            fresh.unlink()
    _confirm(target)


@contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """A directory to fill; it takes the place of `target` when the block ends without an exception, with the digests
    of its files in `SHA256SUMS`.

    Otherwise it is removed and `target` stays as it was. Raises EngramError when the system refuses a write.
    """
    goal = Path(target)
    fresh = _sibling(goal, "new")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        _write_sums(fresh, _files(fresh))
        _flush_tree(fresh)
        replace_directory(fresh, goal)
    except OSError as error:
        raise _refused(goal, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def refuse_existing(target: str | Path, option: str = "--out") -> None:
    """EngramError if something stands there (what a command writes replaces nothing), or if nothing could be written
    there: before the work, not after it."""
    goal = Path(target)
    if goal.exists():
        raise EngramError(f"{target} exists; choose another {option}")
    home = next(parent for parent in goal.absolute().parents if parent.exists())
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        why = "must not be written to" if home.is_dir() else "is no directory"
        raise EngramError(f"{target} cannot be written, because {home} {why}; choose another {option}")


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
    except BaseException:
        if existed and not target.exists():
            os.rename(old, target)
        raise
    _confirm(target)
    shutil.rmtree(old, ignore_errors=True)


def sum_files(directory: str | Path, names: Iterable[str]) -> None:
    """Write the digests of these files of a directory into its `SHA256SUMS`; others that it lists stay in it."""
    folder = Path(directory)
    known = _sums(folder) if (folder / SUMS).exists() else {}
    write_atomic(folder / SUMS, _lines({**known, **{name: sha256(folder / name) for name in names}}))


def check_sums(directory: str | Path, *names: str) -> None:
    """Compare the files that `SHA256SUMS` of a directory lists (or those of them that are named) with it; without such
    a list there is nothing to compare. EngramError names a file that was changed. Cost: one read of every file."""
    folder = Path(directory)
    if not (folder / SUMS).exists():
        return
    for name, wanted in _sums(folder).items():
        if names and name not in names:
            continue
        if not (folder / name).is_file():
            raise EngramError(f"{folder / name} is missing; {SUMS} beside it lists it")
        if sha256(folder / name) != wanted:
            raise EngramError(
                f"{folder / name} was changed since it was written: {SUMS} beside it lists another digest; bring back "
                f"the file, or delete {SUMS} if you changed it on purpose"
            )


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sweep(paths: Iterable[Path]) -> None:
    """Delete those of the paths that a killed process left half-written; an old directory that nothing has taken the
    place of yet stays."""
    for path in paths:
        found = LEFT.fullmatch(path.name)
        if found is None:
            continue
        name = found["name"]  # of what it was to be, which may be half-written itself
        if found["what"] == "new" or LEFT.fullmatch(name) or path.with_name(name).exists():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != SUMS)


def _write_sums(folder: Path, names: list[str]) -> None:
    if names:
        (folder / SUMS).write_text(_lines({name: sha256(folder / name) for name in names}), encoding="utf-8")


def _lines(sums: Mapping[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def _sums(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").split("\n")
        return {name: digest for digest, name in (line.split("  ") for line in lines if line)}
    except (OSError, ValueError) as error:
        raise EngramError(f"{folder / SUMS} cannot be read: {error}") from error


def _sibling(target: Path, what: str) -> Path:
    target = target.absolute()
    return target.with_name(f".{target.name}.{what}-{uuid4().hex[:12]}")


def _refused(target: Path, error: OSError) -> EngramError:
    reason = error.strerror or str(error)
    return EngramError(f"could not write {target}: {reason}. What was there before is unchanged.")


def _confirm(target: Path) -> None:
    """Put the new name on the disk; where that fails the file is there, and may be gone after a power cut."""
    try:
        _flush(target.absolute().parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise EngramError(f"{target} was written, but the disk did not confirm it: {reason}. Run it again.") from error


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
