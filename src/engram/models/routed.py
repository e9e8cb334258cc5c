"""Several classifiers under one call: a router says, row by row, which of them answers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engram.models.config import Configured
from engram.models.output import Output
from engram.models.predictor import supervised_loss


class Routed(Configured, nn.Module):
    """Experts of `outputs` local classes each, and a router with one column for each expert.

    names    [E, outputs] int64 buffer: the class id that each output of each expert stands for, -1 for none

    `squash` puts the experts' scores through a sigmoid, as some of them are trained. Every expert is run on
    every row: E forward passes, and one of the router.
    """

    names: Tensor

    def __init__(self, experts: Sequence[nn.Module], router: nn.Module, outputs: int, squash: bool = True) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = router
        self.squash = squash
        self.register_buffer("names", torch.full((len(experts), outputs), -1))

    def add(self, expert: nn.Module) -> None:
        """One more expert, whose outputs stand for no class yet; the router does not know it."""
        self.experts.append(expert)
        self.names = torch.cat([self.names, torch.full_like(self.names[:1], -1)])

    def retire(self, classes: Iterable[int]) -> None:
        """No expert answers with these classes any more."""
        gone = torch.tensor(sorted(classes), dtype=torch.long, device=self.names.device)
        self.names[torch.isin(self.names, gone)] = -1

    def route(self, **inputs: Any) -> Tensor:
        """The number of the expert that answers for each row: [B]."""
        return self.router(**inputs).logits.argmax(1)

    def local(self, expert: int, **inputs: Any) -> Tensor:
        """What one expert says of its own classes: [B, outputs]."""
        scores: Tensor = self.experts[expert](**inputs).logits
        return torch.sigmoid(scores) if self.squash else scores

    def forward(self, *, labels: Tensor | None = None, task: Tensor | None = None, **inputs: Any) -> Output:
        """Logits [B, W] over class ids, -inf for those that the chosen expert does not have.

        `task` [B] chooses the experts instead of the router; `labels` adds the loss.
        """
        chosen = self.route(**inputs) if task is None else task
        every = torch.stack([self.local(k, **inputs) for k in range(len(self.experts))], 1)
        scores = every.gather(1, chosen[:, None, None].expand(-1, 1, every.shape[2]))[:, 0]
        logits = self._dense(scores, self.names[chosen])
        return Output(loss=None if labels is None else supervised_loss(logits, labels), logits=logits)

    def _dense(self, scores: Tensor, names: Tensor) -> Tensor:
        width = int(self.names.max()) + 1
        dense = scores.new_full((len(scores), width + 1), -torch.inf)
        return dense.scatter(1, torch.where(names < 0, width, names), scores)[:, :width]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A state brings its own number of experts, all of one build."""
        given = state_dict.get(prefix + "names")
        if given is not None:
            self.experts = self.experts[: len(given)]
            self.names = self.names[: len(given)]
            for _ in range(len(given) - len(self.experts)):
                self.add(copy.deepcopy(self.experts[0]))
        super()._load_from_state_dict(state_dict, prefix, *args)
