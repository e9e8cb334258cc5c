"""A network for each task, of which each reads rows of its own shape; who answers is the most confident, or is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engram.errors import EngramError
from engram.models.config import Configured
from engram.models.head import Head
from engram.models.output import Output
from engram.models.predictor import Predictor, supervised_loss

FLOOR = 1e-6  # the least confidence

Shapes = Mapping[str, Sequence[int]]


class Experts(Configured, nn.Module):
    """Predictors with class heads; `takes`: for each the shape of a row by input, `several`: may a row have several of
    its classes?

    Without a task, every expert that reads the inputs is run, but for those whose classes a later one has too. With
    log p its log-softmax over its C classes and m the largest p, an expert's confidence is normalised for C,

        c = (m - 1/C) / (1 - 1/C),

    0 at an even guess and 1 at certainty (an expert of one class has 0), and the logit of its class j is

        log p_j - log m + log max(c, 1e-6),

    so that the most confident expert has the largest logit, and the order within each expert is its own. Classes of
    several labels a row have log sigmoid + log 1e-6, which ranks rows, and lies below every expert's best. Of two
    experts with a common class, the larger counts. One expert alone gives its own softmax.
    """

    def __init__(self, experts: Sequence[nn.Module], takes: Sequence[Shapes], several: Sequence[bool]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.takes = [{name: tuple(shape) for name, shape in shapes.items()} for shapes in takes]
        self.several = list(several)

    def __len__(self) -> int:
        return len(self.experts)

    def describe(self) -> dict[str, Any]:
        """As it is now."""
        takes = [{name: list(shape) for name, shape in shapes.items()} for shapes in self.takes]
        return {**super().describe(), "takes": takes, "several": list(self.several)}

    def add(self, expert: Predictor, takes: Shapes, several: bool) -> None:
        """One more expert, for the classes of its head."""
        self.experts.append(expert)
        self.takes.append({name: tuple(shape) for name, shape in takes.items()})
        self.several.append(several)

    def classes(self, expert: int) -> list[int]:
        """The live classes of an expert, ascending."""
        return self.head(expert).live.nonzero().flatten().tolist()

    def head(self, expert: int) -> Head:
        """An expert's head."""
        found = self.expert(expert).head
        assert isinstance(found, Head)
        return found

    def expert(self, number: int) -> Predictor:
        """An expert."""
        found = self.experts[number]
        assert isinstance(found, Predictor)
        return found

    def readers(self, takes: Shapes) -> list[int]:
        """The experts that read rows of these shapes, in order."""
        wanted = {name: tuple(shape) for name, shape in takes.items()}
        return [k for k, own in enumerate(self.takes) if own == wanted]

    def answering(self, takes: Shapes) -> list[int]:
        """Those of them whose classes no later one has, all of them, too."""
        readers = self.readers(takes)
        own = {k: (self.several[k], frozenset(self.classes(k))) for k in readers}
        return [k for k in readers if own[k][1] and own[k] not in [own[later] for later in readers if later > k]]

    def retire(self, classes: Iterable[int]) -> None:
        """No expert tells these classes any more."""
        gone = set(classes)
        for k in range(len(self)):
            self.head(k).retire([c for c in self.head(k).classes.tolist() if c in gone])

    def forward(self, *, labels: Tensor | None = None, task: Tensor | None = None, **inputs: Any) -> Output:
        """Logits [B, W] over class ids; -inf where no expert tells a class. `task` [B]: the numbers of the experts that
        shall answer, with their own logits; `labels` adds the loss. EngramError for rows that no expert reads."""
        logits = self._joint(inputs) if task is None else self._told(task, inputs)
        return Output(loss=None if labels is None else supervised_loss(logits, labels), logits=logits)

    def _joint(self, inputs: dict[str, Tensor]) -> Tensor:
        takes = {name: value.shape[1:] for name, value in inputs.items() if value is not None}
        chosen = self.answering(takes)
        if not chosen:
            raise EngramError(f"no expert reads rows of {_said(takes)}; there are {[_said(own) for own in self.takes]}")
        return torch.stack([self._dense(self._scores(k, inputs), k) for k in chosen]).amax(0)

    def _scores(self, k: int, inputs: dict[str, Tensor]) -> Tensor:
        """What an expert says beside others, [B, live classes]."""
        logits = self.experts[k](**inputs).logits[:, self.classes(k)].double()
        if self.several[k]:
            scores = F.logsigmoid(logits) + torch.log(torch.tensor(FLOOR))
        else:
            log_p = logits.log_softmax(1)
            best = log_p.amax(1, keepdim=True)
            scores = log_p - best + _log_confidence(best, logits.shape[1])
        return scores.float()

    def _told(self, task: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        dense = torch.full((len(task), self._width()), -torch.inf, device=task.device)
        for k in task.unique().tolist():
            rows = (task == k).nonzero()[:, 0]
            logits = self.experts[k](**{name: value[rows] for name, value in inputs.items()}).logits
            own = self.classes(k)
            dense = dense.index_copy(0, rows, self._dense(logits[:, own], k).to(dense.dtype))
        return dense

    def _dense(self, scores: Tensor, k: int) -> Tensor:
        where = torch.tensor(self.classes(k), dtype=torch.long, device=scores.device)
        return scores.new_full((len(scores), self._width()), -torch.inf).index_copy(1, where, scores)

    def _width(self) -> int:
        return max(len(self.head(k).live) for k in range(len(self)))


def _log_confidence(best: Tensor, classes: int) -> Tensor:
    """log of the normalised confidence, of log m [B, 1] in float64; near 1 the complement keeps its digits."""
    if classes == 1:
        return torch.full_like(best, FLOOR).log()
    rest = -torch.expm1(best) * classes / (classes - 1)
    return torch.log1p(-rest.clamp(max=1 - FLOOR))


def _said(takes: Shapes) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in takes.items()) or "nothing"
