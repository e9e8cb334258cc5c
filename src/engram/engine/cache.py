"""Features kept between runs: computed once for given weights and rows, and able to let go of rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from engram.data.table import Ids, Table
from engram.engine.predict import features
from engram.engine.run import Run
from engram.errors import EngramError
from engram.files import write_atomic
from engram.models.io import digest


class FeatureCache:
    """A trace on disk: one file per (weights, rows). The ids stand in each file, so that a request can be carried out.

    The weights hold the preprocessing too (means and deviations are buffers), and the rows' digest covers their
    contents: a change of any of them gives another file.
    """

    def __init__(self, directory: str | Path, ledger: Any = None) -> None:
        """`ledger`: is told which rows each new file holds."""
        self.directory, self.ledger = Path(directory), ledger

    def features(self, model: nn.Module, table: Table, run: Run | None = None, batch_size: int = 256) -> Tensor:
        """What comes before the model's head, [n, d]; computed at most once. EngramError for a damaged file.

        Cost when it is there: a digest of weights and rows, and one read.
        """
        key = hashlib.sha256(f"{digest(model)} {table.digest}".encode()).hexdigest()[:32]
        path = self.directory / f"{key}.safetensors"
        if path.exists():
            try:
                return load_file(path)["features"]
            except (OSError, SafetensorError, KeyError) as error:
                raise EngramError(f"the cached features {path} cannot be read ({error}); delete the file") from error
        found = features(model, table, batch_size=batch_size, run=run)
        if self.ledger is not None:  # before the file: a kill between the two leaves no file that nobody noted
            self.ledger.add_holder("cache", path, table.ids)
        write_atomic(path, save({"features": found.contiguous()}, metadata={"ids": json.dumps(table.ids)}))
        return found

    def holds(self, ids: Iterable[str]) -> Ids:
        """Those of the ids of which features are kept."""
        wanted = tuple(ids)
        kept = {id for path in self._files() for id in _ids(path)}
        return tuple(id for id in wanted if id in kept)

    def drop(self, rows: Table) -> Ids:
        """Delete every file that holds features of one of the rows; nothing stays behind."""
        gone = set(rows.ids)
        for path in self._files():
            if gone & set(_ids(path)):
                path.unlink()
        return ()

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob("*.safetensors"))


def _ids(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as content:
            return list(json.loads(content.metadata()["ids"]))
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise EngramError(f"the cached features {path} cannot be read ({error}); delete the file") from error
