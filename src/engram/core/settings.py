"""Methods as plain data and back: the fields of a method are its config, its command line and its help."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from engram.errors import EngramError, at_least, unknown

PLAIN = ("engram.engine", "engram.data")  # where dataclasses are settings of methods, and no methods
# The least that makes sense, of settings that are called so, or x_epochs, x_lr, …
LEAST = {"epochs": 0, "batch_size": 1, "lr": 0, "buffer": 0, "oracles": 0}


def settings(method: Any) -> dict[str, Any]:
    """The constructor's arguments of a method, as they are."""
    return {field.name: getattr(method, field.name) for field in dataclasses.fields(method) if field.init}


def describe(method: Any) -> dict[str, Any]:
    """A method as plain data: {"name": "keep.NMC", setting: value, …}; `make` turns it back into an equal one.

    A module among the settings is described by what `models.pack` calls its config; its weights are not part of it.
    """
    return {"name": name_of(method), **{key: _plain(value) for key, value in settings(method).items()}}


def name_of(method: Any) -> str:
    """`wing.Class`, the name in the catalogue."""
    cls = method if isinstance(method, type) else type(method)
    parts = cls.__module__.split(".")
    return f"{parts[1]}.{cls.__name__}" if parts[0] == "engram" else f"{cls.__module__}.{cls.__name__}"


def load_class(name: str) -> type:
    """The class of a method by its name in the catalogue, with or without its wing, in any case."""
    from engram.catalogue import find

    method = find(name)
    return getattr(import_module(method.module), method.name.split(".")[-1])


def make(spec: str | Mapping[str, Any], *, wing: str | None = None) -> Any:
    """A method from its name, or from {"name": …, setting: value}.

    Values are checked and converted by the types of the class's fields. EngramError names an unknown method or
    setting and the nearest one there is, or the setting whose value does not fit or makes no sense (`LEAST`, NaN).
    """
    if not (isinstance(spec, str) or (isinstance(spec, Mapping) and "name" in spec)):
        raise EngramError(f"a method is written as a name or as {{name: …, setting: value}}, not {spec!r}")
    given = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(given.pop("name"))
    cls = load_class(f"{wing}.{name}" if wing and "." not in name else name)
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in given:
        if key not in fields:
            raise unknown(f"setting of {name}", key, fields)
    values = typed(cls, given)
    for key, value in values.items():
        if isinstance(value, int | float):
            at_least(f"{key} of {name}", value, _least(key))
    return cls(**values)


def _least(key: str) -> float:
    return next((least for name, least in LEAST.items() if f"_{key}".endswith(f"_{name}")), -math.inf)


def typed(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    """Values for the fields of a dataclass, converted to the fields' types; EngramError for one that does not fit."""
    if not given:
        return {}
    _whole_parts(cls, given)
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    names = {field.name for field in dataclasses.fields(cls)}
    parser.add_class_arguments(cls, None, skip=names - set(given), fail_untyped=False)
    try:
        parsed = parser.instantiate(parser.parse_object(given))
    except ArgumentError as error:
        key = re.search(r'key "([^"]+)"', str(error))
        reason = _misfit(cls, key[1], given) if key else str(error).splitlines()[0].strip()
        raise EngramError(f"{cls.__name__}: {reason}") from error
    for field in dataclasses.fields(cls):  # the parser lets None pass everywhere
        if field.name in given and parsed[field.name] is None and not re.search("None|Optional|Any", str(field.type)):
            raise EngramError(f"{cls.__name__}: {_misfit(cls, field.name, given)}")
    return {key: parsed[key] for key in given}


def _misfit(cls: type, key: str, given: Any) -> str:
    """What a setting takes, and what it was given; `optimizer.lr` is a setting of a part."""
    first, _, rest = key.partition(".")
    field = next(field for field in dataclasses.fields(cls) if field.name == first)
    part = _part(field)
    if rest and part is not None and isinstance(given[first], Mapping):
        return f"{first}.{_misfit(type(part), rest, given[first])}"
    return f"{first} takes {field.type}, not {given[first]!r}"


def _part(field: Any) -> Any:
    """The settings that a setting consists of (an optimizer's), as they are by default; None for a plain one."""
    part = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return part if dataclasses.is_dataclass(part) and not isinstance(part, type) else None


def _whole_parts(cls: type, given: Mapping[str, Any]) -> None:
    """EngramError for a plain value where a setting has settings of its own, and for one that it does not have."""
    for field in dataclasses.fields(cls):
        part, value = _part(field), given.get(field.name)
        if part is None or field.name not in given or isinstance(value, type(part)):
            continue
        names = [inner.name for inner in dataclasses.fields(part) if inner.init]
        if not isinstance(value, Mapping):
            raise EngramError(
                f"{field.name} of {cls.__name__} is {value!r}; give its settings, as in {{{names[0]}: …}}"
            )
        for key in value:
            if key not in names:
                raise unknown(f"setting of {field.name}", key, names)


def _plain(value: Any) -> Any:
    if isinstance(value, nn.Module):
        from engram.models.io import pack

        return pack(value)[0]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {key: _plain(item) for key, item in settings(value).items()}
        return fields if type(value).__module__.startswith(PLAIN) else {"name": name_of(value), **fields}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise EngramError(f"a {type(value).__name__} cannot stand in a config; use plain data")
