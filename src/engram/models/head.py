"""Heads whose columns are classes: they grow, and they let go of classes, without moving anything else.

Only classes that were born have parameters (`classes`, in order of birth), but the output is dense: the
column of a logit *is* the class id, in every file of engram. Columns of classes that are unborn or retired
are -inf, made so here and nowhere else: a zero column of a forgotten class could still win an argmax.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engram.errors import EngramError
from engram.models.config import Configured


class Head(Configured, nn.Module):
    """Base of the class heads: a subclass names its per-class tensors in `rows`, has `scores` and `fresh`.

    width    d, the number of features
    classes  [born] int64 buffer: class ids of the compact columns in order of birth, retired ones included
    live     [W] bool buffer over class ids; W = 1 + the largest id ever grown, at least `classes_total`
    """

    rows: ClassVar[tuple[str, ...]] = ()  # one that is None is left out
    classes: Tensor
    live: Tensor

    def __init__(self, width: int, classes_total: int = 0) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("classes", torch.empty(0, dtype=torch.int64))
        self.register_buffer("live", torch.zeros(classes_total, dtype=torch.bool))

    def scores(self, features: Tensor) -> Tensor:
        """Compact logits: [B, d] -> [B, born], columns as in `classes`, those of retired classes included."""
        raise NotImplementedError

    def fresh(self, name: str, count: int, generator: torch.Generator | None) -> Tensor:
        """Initial rows of the tensor `name` for `count` newborn classes: [count, ...]."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> Tensor:
        """Dense logits: [B, d] -> [B, W]; -inf in the columns that are not live. The gradient skips those."""
        scores = self.scores(features)
        alive = self.live[self.classes]
        dense = scores.new_full((scores.shape[0], self.live.shape[0]), -torch.inf)
        return dense.index_copy(1, self.classes, scores.masked_fill(~alive, -torch.inf))

    @torch.no_grad()
    def grow(self, classes: Iterable[int] | Tensor, generator: torch.Generator | None) -> None:
        """Make classes live: a live one is left alone, a retired one starts afresh, others keep their bits.

        New rows are drawn from `generator` (None: from torch's global one, for use under `seeded`).
        Parameters become new objects when they grow: make the optimizer afterwards.
        """
        live = set(self.live.nonzero().flatten().tolist())
        wanted = [label for label in class_ids(classes) if label not in live]
        self._give_birth(wanted)
        places = self.columns(wanted)
        for name, row in self._rows().items():
            row[places] = self.fresh(name, len(wanted), generator).to(row)
        self.live[wanted] = True

    @torch.no_grad()
    def retire(self, classes: Iterable[int] | Tensor) -> None:
        """Take classes out: their columns are -inf from now on, and their rows zero, so nothing is left."""
        gone = class_ids(classes)
        places = self.columns(gone)
        for row in self._rows().values():
            row[places] = 0
        self.live[gone] = False

    def columns(self, classes: Iterable[int] | Tensor) -> Tensor:
        """Places of classes among the compact columns: [k] int64. Raises EngramError for one never born."""
        place = {label: at for at, label in enumerate(self.classes.tolist())}
        wanted = class_ids(classes)
        unborn = [label for label in wanted if label not in place]
        if unborn:
            raise EngramError(f"the head has no class {unborn[0]}; it has {sorted(place) or 'none'}.")
        return torch.tensor([place[label] for label in wanted], dtype=torch.int64, device=self.classes.device)

    def describe(self) -> dict[str, Any]:
        """As it is now: the live classes, and W."""
        alive = self.classes[self.live[self.classes]].tolist()
        now = {"classes": alive, "classes_total": len(self.live)}
        return {key: now.get(key, value) for key, value in super().describe().items()}

    @torch.no_grad()
    def _put(self, classes: Iterable[int] | Tensor, **rows: Tensor) -> None:
        """Write rows [k, ...] of these classes, which become live; the rows of others keep their bits."""
        ids = class_ids(classes)
        for name, given in rows.items():
            _check(name, given, (len(ids), *getattr(self, name).shape[1:]))
        self._give_birth(ids)
        for name, row in self._rows().items():
            row[self.columns(ids)] = rows[name].to(row)
        self.live[ids] = True

    def _rows(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.rows if getattr(self, name) is not None}

    def _give_birth(self, classes: list[int]) -> None:
        """Rows of zeros for those of `classes` that have none; `live` gets long enough."""
        born = set(self.classes.tolist())
        newborn = [label for label in classes if label not in born]
        self._lengthen("live", max([len(self.live), *(label + 1 for label in classes)]))
        for name in ("classes", *self.rows):
            self._lengthen(name, len(born) + len(newborn))
        if newborn:
            self.classes[len(born) :] = torch.tensor(newborn)

    def _lengthen(self, name: str, length: int) -> None:
        """Give a per-class tensor `length` rows: the old ones as they are, then zeros."""
        old = getattr(self, name)
        if old is None or len(old) == length:
            return
        new = old.detach().new_zeros((length, *old.shape[1:]))
        kept = min(length, len(old))
        new[:kept] = old.detach()[:kept]
        setattr(self, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A state brings its own number of classes."""
        for name in ("classes", "live", *self.rows):
            if (given := state_dict.get(prefix + name)) is not None and given.dim():
                self._lengthen(name, len(given))
        super()._load_from_state_dict(state_dict, prefix, *args)


def predict_classes(logits: Tensor) -> Tensor:
    """The class of the largest logit: [B, W] -> [B]. Raises EngramError when a row has no live class."""
    if logits.shape[-1] == 0 or bool(torch.isneginf(logits).all(dim=-1).any()):
        raise EngramError("no class is live: grow the head, or learn a task, before predicting classes.")
    return logits.argmax(dim=-1)


def _check(name: str, given: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(given.shape) != shape:
        raise EngramError(f"{name} has shape {list(given.shape)}; so many distinct classes need {list(shape)}.")
    if not bool(given.isfinite().all()):
        raise EngramError(f"{name} is not finite everywhere; give rows of those classes only that have one.")


def class_ids(classes: Iterable[int] | Tensor) -> list[int]:
    """Distinct class ids as plain numbers, in the given order. Raises EngramError for a negative one."""
    given = classes.tolist() if isinstance(classes, Tensor) else classes
    ids = list(dict.fromkeys(int(label) for label in given))
    if ids and min(ids) < 0:
        raise EngramError(f"a class id is a column, so it is 0 or larger; got {min(ids)}.")
    return ids
