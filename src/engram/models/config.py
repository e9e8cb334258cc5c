"""Objects that know how they were made: the constructor's arguments, defaults included, as plain data."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engram.errors import EngramError
from engram.models import hub


@dataclass(frozen=True)
class _Part:
    """Stands for an argument that is an object: its description is read from the attribute of its name."""

    kind: str


class Configured:
    """Mixin: `config` is a JSON-able dict with which the class makes an equal object again.

    Arguments are bound by the signature of the outermost constructor, so a subclass that calls
    `super().__init__` is described by its own arguments. An argument that is itself Configured, a
    transformers model, or a sequence of such, has to be kept in the attribute of its own name, and is
    described as it is now: {"class": NAME, **config}. Sequences become lists. The initial weights are no part
    of it.
    """

    _given: dict[str, Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]

    @property
    def config(self) -> Any:
        """The arguments by name. Raises EngramError, naming the argument, for one that is no plain data."""
        return {key: value for key, value in self.describe().items() if key != "class"}

    def describe(self) -> dict[str, Any]:
        """`config`, and the name of the class under "class"."""
        given = self.__dict__.get("_given", {}).items()
        return {"class": type(self).__name__, **{name: self._described(name, value) for name, value in given}}

    def _described(self, name: str, value: Any) -> Any:
        if not isinstance(value, _Part):
            return copy.deepcopy(value)
        place = f"the argument {name!r} of {type(self).__name__}"
        if not hasattr(self, name):
            raise EngramError(f"{place} (a {value.kind}) cannot be described: keep it as self.{name}.")
        return _description(getattr(self, name), place)


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(init)

    @wraps(init)
    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        if "_given" not in self.__dict__:
            self.__dict__["_given"] = _arguments(signature, (self, *args), kwargs)
        init(self, *args, **kwargs)

    return recorded


def _arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    given = dict(list(bound.arguments.items())[1:])
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(parameter.name))
    return {name: _plain(value) for name, value in given.items()}


def _plain(value: Any) -> Any:
    """Plain data as JSON would give it back; a `_Part` for anything else."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return _whole(value, {str(key): _plain(item) for key, item in value.items()})
    if isinstance(value, Sequence | range | set | frozenset):
        return _whole(value, [_plain(item) for item in value])
    return _Part(type(value).__name__)


def _whole(value: Any, plain: Any) -> Any:
    items = plain.values() if isinstance(plain, dict) else plain
    return _Part(type(value).__name__) if any(isinstance(item, _Part) for item in items) else plain


def _description(value: Any, place: str) -> Any:
    if isinstance(value, Configured):
        return value.describe()
    if hub.is_transformers(value):
        return hub.describe(value)
    if isinstance(value, nn.ModuleList | list | tuple):
        return [_description(item, place) for item in value]
    plain = _plain(value)
    if isinstance(plain, _Part):
        raise EngramError(f"{place} is a {plain.kind}, which no config can hold; derive it from Configured.")
    return plain
