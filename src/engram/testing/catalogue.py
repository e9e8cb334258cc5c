"""Checks of the rows of the catalogue."""

from __future__ import annotations

from engram.catalogue import Method
from engram.core.needs import Needs
from engram.core.probe import Probe
from engram.core.settings import make
from engram.testing.material import ensure


def check_row(row: Method) -> None:
    """The needs of a row of the catalogue are those of its class, by default and at each setting that it names."""
    wanted = dict([("", row.needs), *row.variants])
    for setting, needs in wanted.items():
        found = {frozenset(map(str, one)) for one in _needs_of(row, setting)}
        ensure(found == set(needs), f"the catalogue says that {row.name} {setting} needs {needs}, and it needs {found}")
    cls = type(make(row.name))
    ensure(row.exact == getattr(cls, "exact", False), f"the catalogue and {row.name} disagree about exactness")


def _needs_of(row: Method, setting: str) -> Needs | list[frozenset[str]]:
    import yaml

    key, _, value = setting.partition("=")
    method = make({"name": row.name, **({key: yaml.safe_load(value)} if setting else {})})
    return [method.asks] if isinstance(method, Probe) else method.needs
