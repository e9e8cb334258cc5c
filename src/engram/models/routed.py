"""Several classifiers under one call: a router says, row by row, which of them answers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from engram.models.config import Configured
from engram.models.output import Output
from engram.models.predictor import supervised_loss


class Routed(Configured, nn.Module):
    """Experts of local classes, and a router with one column for each expert.

    names    [E, outputs] int64 buffer: the class id that each output of each expert stands for, -1 for none

    `outputs`: of each expert to begin with; the table of names is as wide as the widest expert. `squash` puts the
    experts' scores through a sigmoid, as some of them are trained. Every expert is run on every row: E forward
    passes, and one of the router.
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

    def name(self, expert: int, classes: Sequence[int]) -> None:
        """Say which class each of an expert's outputs stands for; -1 for none."""
        self.names = F.pad(self.names, (0, max(0, len(classes) - self.names.shape[1])), value=-1)
        self.names[expert] = -1
        self.names[expert, : len(classes)] = torch.as_tensor(classes, dtype=torch.long)

    def retire(self, classes: Iterable[int]) -> None:
        """No expert answers with these classes any more."""
        gone = torch.tensor(sorted(classes), dtype=torch.long, device=self.names.device)
        self.names[torch.isin(self.names, gone)] = -1

    def route(self, **inputs: Any) -> Tensor:
        """The number of the expert that answers for each row: [B]."""
        return self.router(**inputs).logits.argmax(1)

    def local(self, expert: int, **inputs: Any) -> Tensor:
        """What one expert says of its own classes: [B, outputs of it]."""
        return self._squashed(self.experts[expert](**inputs).logits)

    @torch.no_grad()
    def every(self, inputs: Mapping[str, Any], stacked: bool | None = None) -> list[Tensor]:
        """What each expert says of its own classes, E times [B, outputs of it], without a gradient.

        `stacked`: experts of one shape run together, by `torch.func.vmap` over their weights; equal within rounding.
        Left out, they do so on an accelerator; on a CPU one after the other is 1.2 to 3 times as fast. Call it in eval
        mode: statistics of batches are not kept.
        """
        together = self.names.device.type != "cpu" if stacked is None else stacked
        groups = _alike(self.experts) if together else [[k] for k in range(len(self.experts))]
        found = [(k, scores) for group in groups for k, scores in zip(group, self._group(group, inputs), strict=True)]
        return [scores for _, scores in sorted(found, key=lambda pair: pair[0])]

    def forward(self, *, labels: Tensor | None = None, task: Tensor | None = None, **inputs: Any) -> Output:
        """Logits [B, W] over class ids, -inf for those that the chosen expert does not have.

        `task` [B] chooses the experts instead of the router; `labels` adds the loss.
        """
        chosen = self.route(**inputs) if task is None else task
        every = torch.stack([self._wide(self.local(k, **inputs)) for k in range(len(self.experts))], 1)
        scores = every.gather(1, chosen[:, None, None].expand(-1, 1, every.shape[2]))[:, 0]
        logits = self._dense(scores, self.names[chosen])
        return Output(loss=None if labels is None else supervised_loss(logits, labels), logits=logits)

    def _group(self, group: list[int], inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        """What these experts, which are alike, say."""
        if len(group) == 1:
            return [self.local(group[0], **inputs)]
        experts = [self.experts[k] for k in group]
        params, buffers = stack_module_state(experts)
        weights = {**params, **{name: value for name, value in buffers.items() if value.is_floating_point()}}
        scores: Tensor = vmap(lambda given: functional_call(experts[0], given, (), dict(inputs)).logits)(weights)
        return self._squashed(scores).unbind(0)

    def _squashed(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores) if self.squash else scores

    def _wide(self, scores: Tensor) -> Tensor:
        """With a column for each name of the widest expert; those beyond its own have no name."""
        return F.pad(scores, (0, self.names.shape[1] - scores.shape[1]))

    def _dense(self, scores: Tensor, names: Tensor) -> Tensor:
        width = int(self.names.max()) + 1 if self.names.numel() else 0
        dense = scores.new_full((len(scores), width + 1), -torch.inf)
        return dense.scatter(1, torch.where(names < 0, width, names), scores)[:, :width]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A state brings its own number of experts, all of one build."""
        given = state_dict.get(prefix + "names")
        if given is not None:
            self.experts = self.experts[: len(given)]
            for _ in range(len(given) - len(self.experts)):
                self.experts.append(copy.deepcopy(self.experts[0]))
            self.names = self.names.new_full(given.shape, -1)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _alike(experts: Iterable[nn.Module]) -> list[list[int]]:
    """The numbers of experts, grouped: those of a group differ in the values of floating tensors alone."""
    groups: dict[Any, list[int]] = {}
    for k, expert in enumerate(experts):
        key = tuple((name, value.shape, _fixed(value)) for name, value in expert.state_dict().items())
        groups.setdefault(key, []).append(k)
    return list(groups.values())


def _fixed(value: Tensor) -> Any:
    """What has to be equal: columns and masks. A count of batches does not."""
    return tuple(value.flatten().tolist()) if value.ndim and not value.is_floating_point() else None
