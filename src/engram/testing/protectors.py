"""Checks of protectors."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from engram.core.protector import Protector
from engram.core.settings import name_of
from engram.data.table import Table
from engram.engine.run import Run
from engram.testing.material import Material, contents, ensure, fingerprint, fresh


def check_protected_rows(protector: Protector, material: Material) -> None:
    """Other inputs alone: ids, labels, names, other columns, shapes and types stay; images stay images, in memory of
    their own, whether they are stored as uint8 or as float; where it states `eps`, they change by no more than that."""
    for table in (material.train, _as_levels(material.train)):
        _keeps_the_rest(protector, table, fresh(protector).protect(table, Run()))


def _as_levels(table: Table) -> Table:
    """The table with float images as uint8."""
    inputs = {k: (v * 255).round().to(torch.uint8) if k == "pixel_values" else v for k, v in table.inputs.items()}
    return dataclasses.replace(table, inputs=inputs)


def _keeps_the_rest(protector: Protector, table: Table, found: Table) -> None:
    name = name_of(protector)
    for part in ("ids", "names", "shapes"):
        ensure(getattr(found, part) == getattr(table, part), f"{name} changed the {part} of the table")
    rest = [fingerprint({**contents(one), "inputs": {}}) for one in (table, found)]
    ensure(rest[0] == rest[1], f"{name} changed labels or other columns of the table")
    ensure(found.digest != table.digest, f"{name} changed nothing")
    for key, before in table.inputs.items():
        after = found.inputs[key]
        ensure(after.dtype == before.dtype, f"{name} made {after.dtype} of {key}, which was {before.dtype}")
        ensure(after.data_ptr() != before.data_ptr(), f"{name}'s {key} shares memory with that of the table")
        _keeps_the_range(protector, key, before, after)


def _keeps_the_range(protector: Protector, key: str, before: Tensor, after: Tensor) -> None:
    whole = 255 if before.dtype == torch.uint8 else 1
    one, other = before.double() / whole, after.double() / whole
    if key == "pixel_values":
        ensure(bool(((other >= 0) & (other <= 1)).all()), f"{name_of(protector)} made pixels outside the range")
    eps = getattr(protector, "eps", math.inf)
    most = float((one - other).abs().max())
    ensure(most <= eps + 1e-7, f"{name_of(protector)} changed {key} by {most:.6g}, and states eps={eps:.6g}")
