"""Methods as plain data and back: the fields of a method are its config, its command line and its help."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from engram.errors import EngramError, unknown

PLAIN = ("engram.engine", "engram.data")  # where dataclasses are settings of methods, and no methods


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
    setting and the nearest one there is, or the setting whose value does not fit.
    """
    given = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "name" not in given:
        raise EngramError(f"a method is written as a name or as {{name: …, setting: value}}, not {spec!r}")
    name = str(given.pop("name"))
    cls = load_class(f"{wing}.{name}" if wing and "." not in name else name)
    fields = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in given:
        if key not in fields:
            raise unknown(f"setting of {name}", key, fields)
    return cls(**_typed(cls, given))


def _typed(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    if not given:
        return {}
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    names = {field.name for field in dataclasses.fields(cls)}
    parser.add_class_arguments(cls, None, skip=names - set(given), fail_untyped=False)
    try:
        parsed = parser.instantiate(parser.parse_object(given))
    except ArgumentError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise EngramError(f"{cls.__name__}: {lines[0]} {lines[-1] if len(lines) > 1 else ''}".strip()) from error
    return {key: parsed[key] for key in given}


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
