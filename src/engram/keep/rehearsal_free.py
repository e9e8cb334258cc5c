"""Keeping what was learnt without stored rows: distillation and penalties on parameters.

Smith, Tian, Halbe, Hsu, Kira: A Closer Look at Rehearsal-Free Continual Learning. CVPR 2023 workshops, arXiv
2203.17269.

theta' and phi' are the model as it is when the task comes; z' and z the logits of the current rows before and
now.

1. Classification over all classes seen, with one sigmoid a class (summed over classes, mean over rows) or a
   softmax.
2. PredKD: the columns of known classes of which the task brings no rows are trained towards sigmoid(z'), or
   by cross-entropy against softmax(z' / T). Without it their targets are zeros.
3. FeatKD: the squared distance of phi(x) from phi'(x), mean over rows.
4. L2: the squared distance of the parameters from theta'; EWC: the same weighted by the Fisher diagonal F of
   each parameter, on the rows of earlier tasks.

The finding: with sigmoids PredKD keeps the classifier; the other terms fail alone, and add to it.

Published code keeps teacher and anchor from the end of the last task. Here both are taken when the next one
starts, so that what was forgotten in between is not taught again; importances are a trace and outlast that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.core.learning import GradientLearner
from engram.core.needs import Need, Needs, needs
from engram.core.trace import Derived
from engram.data.table import Batch
from engram.data.task import Task
from engram.engine.importance import importance
from engram.engine.losses import Mean, binary_by_class, by_target, distil
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.engine.teacher import RowCache, cached
from engram.errors import unknown
from engram.keep.consolidation import known_rows, padded, pulled
from engram.models.output import Output

HEADS = ("bce", "softmax")
ATTENTION = r"query|key|value|qkv"  # the projections of the self-attention blocks of a vision transformer


@dataclass(kw_only=True, eq=False)
class RehearsalFree(GradientLearner):
    """Fine-tuning with any of the terms, each left out at weight 0.

    `head`: "bce" or "softmax". Weights: `prediction` (PredKD), `feature` (FeatKD), `l2`, `ewc`.
    `temperature`: of the softmax distillation. `fisher`: whose labels the Fisher diagonal takes: the
    "model"'s own prediction as in published code, "sampled", "true", or "all" (exact); always of the softmax,
    and per row. `online`: importances of all earlier tasks are added up, else the last task's alone count.

    `covers`: the parameters that the penalties hold: "all", "body" (no head), or a regular expression on
    their names; head rows of classes that were not known are never held. `trains`: a regular expression on
    the names of the parameters that learn besides the head, "" for all; published for transformers is
    `ATTENTION` for both. `pretrained`: the network brings weights worth keeping: L2 and FeatKD hold from the
    first task on.

    Classes of which the task brings rows are trained by their labels, whether or not they were known before.
    Cost: a forward pass a task for teacher outputs, for EWC a backward pass too and one number per parameter.
    """

    head: str = "bce"
    prediction: float = 1.0
    feature: float = 0.0
    l2: float = 0.0
    ewc: float = 0.0
    temperature: float = 2.0
    fisher: str = "model"
    online: bool = True
    covers: str = "all"
    trains: str = ""
    pretrained: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head not in HEADS:
            raise unknown("head", self.head, HEADS)
        self.importances: Derived = self.trace("importances", Derived())

    @classmethod
    def tiny(cls) -> RehearsalFree:
        return cls(
            network={"name": "MLP", "hidden": [32]}, epochs=3, batch_size=32, optimizer=Optimizer(lr=1e-2),
            feature=0.1, l2=0.01, ewc=1.0, pretrained=True,
        )  # fmt: skip

    @property
    def needs(self) -> Needs:
        return needs({Need.BOUNDARIES})

    def start(self, task: Task, run: Run) -> None:
        self.old = [c for c in self.known if c not in task.train.classes] if self.prediction else []
        begun = bool(self.known) or self.pretrained
        self.logits = self._teacher("logits", task, run) if self.old else None
        self.features = self._teacher("pooler_output", task, run) if self.feature and begun else None
        self.anchor = {name: p.detach().clone() for name, p in self.model.to(run.device).named_parameters()}
        self.strength = self._strength() if begun else {}
        self._free(self.trains)

    def terms(self, batch: Batch, output: Output) -> Mean:
        assert output.logits is not None
        loss = self.classify(batch, output.logits)
        if self.features is not None:
            assert output.pooler_output is not None
            loss = loss + self.feature * self.distance(output.pooler_output, self.features(batch))
        return loss + Mean.of(self.penalty()) if self.strength else loss

    def classify(self, batch: Batch, logits: Tensor) -> Mean:
        """Classification with PredKD; logits [B, W]."""
        assert batch.labels is not None
        taught = None if self.logits is None else self.logits(batch)[:, self.old]
        if self.head == "softmax":
            loss = by_target(logits, batch.labels)
            return loss if taught is None else loss + self._distil_softmax(logits, taught)
        new = torch.isfinite(logits).all(0)
        new[self.old] = False
        loss = binary_by_class(logits[:, new], F.one_hot(batch.labels, logits.shape[1])[:, new].to(logits))
        return loss if taught is None else loss + self.prediction * self.distil(logits[:, self.old], taught)

    def _distil_softmax(self, logits: Tensor, taught: Tensor) -> Mean:
        return self.prediction * distil(logits[:, self.old], taught, self.temperature)

    def distil(self, scores: Tensor, taught: Tensor) -> Mean:
        """PredKD with sigmoids: the cross-entropy of [B, K] scores against the teacher's, summed over
        classes."""
        return binary_by_class(scores, torch.sigmoid(taught))

    def distance(self, features: Tensor, taught: Tensor) -> Mean:
        """FeatKD: the squared distance of features [B, d], mean over rows."""
        return Mean.of((features - taught).square().sum(1))

    def penalty(self) -> Tensor:
        """L2 and EWC in one: the sum over parameters of (l2 + ewc F) (theta - theta')², []."""
        return pulled(self.model, self.anchor, self.strength)

    def end(self, task: Task, run: Run) -> None:
        if self.ewc:
            found = importance(self.model, task.train, labels=self.fisher, run=run)
            kept = self.importances.values if self.online else {}
            self.importances.values = {
                name: value + padded(kept[name], value.shape) if name in kept else value
                for name, value in found.items()
            }
            self.importances.add(task.train.ids)
        self._free("")

    def _teacher(self, output: str, task: Task, run: Run) -> RowCache:
        return cached(self.model, task.train, output, run, f"teacher {output}")

    def _strength(self) -> dict[str, Tensor]:
        """What the square of every covered parameter's movement costs; empty when nothing costs."""
        weights = {}
        for name, parameter in self.model.named_parameters() if self.l2 or self.ewc else ():
            if self._covered(name):
                fisher = self.importances.values.get(name, torch.zeros_like(parameter))
                weight = self.l2 + self.ewc * padded(fisher.to(parameter.device), parameter.shape)
                weights[name] = (weight * known_rows(self.model, self.known, name, weight)).to(parameter.dtype)
        return weights

    def _covered(self, name: str) -> bool:
        if self.covers == "body":
            return not name.startswith("head.")
        return self.covers == "all" or re.search(self.covers, name) is not None

    def _free(self, pattern: str) -> None:
        """Let the head learn and the parameters that the pattern names; "" names all."""
        for name, parameter in self.model.named_parameters() if self.trains else ():
            parameter.requires_grad_(name.startswith("head.") or re.search(pattern, name) is not None)
