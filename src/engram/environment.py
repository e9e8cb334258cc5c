"""Heavy or optional libraries, imported late, with an error that says what to do when they cannot be."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType

from engram.errors import EngramError

# They import torchvision wherever it is installed, and fail with errors that do not name it.
_TORCHVISION_USERS = ("transformers", "peft", "diffusers")


def require(name: str, extra: str | None = None) -> ModuleType:
    """Import a library by name; `extra` is the extra of engram that brings it.

    Raises EngramError when it is missing, with the command that installs it, and when a broken torchvision
    would make it fail later.
    """
    if name.partition(".")[0] in _TORCHVISION_USERS:
        check_torchvision()
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        package = f"'engram[{extra}]'" if extra else name
        raise EngramError(f"{name} is not installed; it comes with: pip install {package}.") from error


def check_torchvision() -> None:
    """Raise EngramError when torchvision is installed but does not import.

    PyPI's torchvision beside a CPU build of torch is such a case.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except Exception as error:
        raise EngramError(
            f"torchvision {_version('torchvision')} does not import beside torch {_version('torch')} "
            f"({error}), which breaks transformers, peft and diffusers; engram does not need it: "
            "pip uninstall torchvision, or install the build that belongs to this torch."
        ) from error


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(version unknown)"
