"""Prototype-sample relation distillation: the encoder learns by contrast, and prototypes of old classes move with it.

Asadi, Davari, Mudur, Aljundi, Belilovsky: Prototype-Sample Relation Distillation: Towards Replay-Free Continual
Learning. ICML 2023, arXiv 2303.14771.

f is the encoder, g a projector on it, p_k the prototype of class k; f' and p' are those of the model as it is when the
task comes. A batch is two random views of each row; sg stops the gradient. The loss is the sum of

1. the supervised contrastive loss of g(f(x)) at a temperature T, times T / 0.07: it alone trains f on the labels;
2. alpha * mean over rows of 1 - cos(p_y, sg f(x)): each prototype of the task goes to its own rows, and away from none;
3. beta * sum over old classes k of KL(Q'(k) || Q(k)), where Q(k) = softmax over the rows of the batch of
   cos(p_k, f(x)) / tau, and Q' the same with f' and p'. It holds back f, and moves the old prototypes, which have no
   other loss: how old classes rank the new rows stays as it was.

A row belongs to the class whose prototype has the largest cosine with f(x): prototypes are the model's head. The
projector serves training alone and is kept beside the model.

Published code differs from the paper in term 3: its softmax runs over the classes of one old task for each row, summed
over old tasks and averaged over rows, `relation_axis="classes"` here; the paper's runs over rows. That code further
divides scores by the length of the prototype only, where the paper has the cosine, and leaves f' in train mode; here
it is in eval mode. The code's direction of KL is followed. Published training has 120 more epochs on the first task,
and divides the learning rate by 10 after epochs 120 and 160; here all tasks have equally many, and schedules are the
optimiser's. The paper's views also crop to other sizes and change colours; here they are `data.augment.Augment`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.learning import GradientLearner
from engram.core.needs import Need, Needs, needs
from engram.core.trace import State
from engram.data.augment import Augment, two_views
from engram.data.table import MISSING, Batch, Target
from engram.data.task import Task
from engram.engine.losses import Mean, supcon
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.engine.teacher import frozen
from engram.errors import EngramError, unknown
from engram.models.build import build
from engram.models.head import Head
from engram.models.heads import CosineHead
from engram.models.io import pack, unpack
from engram.models.output import Output
from engram.models.predictor import Predictor

AXES = ("samples", "classes")
BASE = 0.07  # the temperature at which published code leaves the contrastive loss unscaled


@dataclass(kw_only=True, eq=False)
class PRD(GradientLearner):
    """Contrastive learning with prototypes that keep their relation to the rows.

    `alpha`, `beta`: weights of the prototypes' own loss and of the distillation; with beta 0 old prototypes stay where
    they are. `temperature`: T of the contrast. `tau`: of the distillation; over samples it works together with the
    batch size, since a distribution is over 2 * batch_size views. `relation_axis`: "samples" as in the paper, or
    "classes" as in published code. `projector`: widths of its layers, with ReLU between them. `views`: how rows are
    changed. The optimiser's momentum and weight decay do not apply to prototypes.

    Losses are of whole batches, so it works in one process. EngramError for a network that is not an encoder with a
    class head (a head that is not of cosines is replaced).

    Cost: twice fine-tuning's, for two views, and a forward pass of the old model for each; after the first task the
    model is held twice in memory while it learns. Nothing is stored of rows.
    """

    processes: ClassVar[str] = "one"

    alpha: float = 2.0
    beta: float = 4.0
    temperature: float = 0.1
    tau: float = 1.0
    relation_axis: str = "samples"
    projector: tuple[int, ...] = (512, 512, 128)
    views: Augment = field(default_factory=Augment)
    optimizer: Optimizer = field(default_factory=lambda: Optimizer("sgd", lr=0.01, momentum=0.9, weight_decay=1e-4))
    epochs: int = 100
    batch_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relation_axis not in AXES:
            raise unknown("relation_axis", self.relation_axis, AXES)
        if min(self.temperature, self.tau) <= 0:
            raise EngramError(f"temperatures are above 0; temperature={self.temperature}, tau={self.tau}")
        if not self.projector:
            raise EngramError("projector needs the width of one layer at least, such as projector=[128]")
        self.projection: nn.Module | None = None
        self.groups: list[list[int]] = []  # classes that came together, in order

    @classmethod
    def tiny(cls) -> PRD:
        small = {"name": "MLP", "hidden": [32]}
        return cls(network=small, epochs=3, batch_size=32, optimizer=Optimizer("sgd", lr=0.05), projector=(32, 16))

    @property
    def needs(self) -> Needs:
        return needs({Need.BOUNDARIES})

    def first_model(self, task: Task, run: Run) -> nn.Module:
        model = super().first_model(task, run)
        if not (isinstance(model, Predictor) and isinstance(model.head, Head)):
            raise EngramError("PRD wants an encoder with a class head, such as network='MLP', for its prototypes")
        if not isinstance(model.head, CosineHead):
            model.head = CosineHead(model.head.width)
        return model

    def start(self, task: Task, run: Run) -> None:
        if task.train.target != Target.CLASSES:
            raise EngramError(f"PRD learns classes; these rows have the target {task.train.target}")
        head = _head(self.model)
        head.columns(task.train.classes)  # every class has a prototype, or this says which has none
        self.projection = (self.projection or self._projector(head.width, run)).to(run.device).train()
        self.old = [c for c in self.known if c not in task.train.classes] if self.beta else []
        self.teacher = frozen(self.model).to(run.device) if self.old else None

    def _projector(self, width: int, run: Run) -> nn.Module:
        *hidden, out = self.projector
        spec, shapes = {"name": "MLP", "hidden": hidden}, {"values": (width,)}
        return build(spec, inputs=shapes, outputs=out, generator=run.generator("projector"))

    def optimizers(self) -> Optimizer:
        assert self.projection is not None
        free = (_head(self.model).weight,)
        return _Plan(**vars(self.optimizer), more=tuple(self.projection.parameters()), free=free)

    def changing(self) -> Mapping[str, Any]:
        return {"projector": self.projection}

    def batches(self, task: Task, epoch: int, run: Run) -> Iterable[Batch]:
        rows, draws = super().batches(task, epoch, run), run.generator("views", epoch)
        return (two_views(batch, self.views, draws) for batch in rows)

    def terms(self, batch: Batch, output: Output) -> Mean:
        features, labels = output.pooler_output, batch.labels
        assert features is not None and labels is not None and self.projection is not None
        known = labels != MISSING
        own = prototypes(self.model, labels[known])
        loss = self.temperature / BASE * supcon(self.projection(values=features).logits, labels, self.temperature)
        loss = loss + self.alpha * attraction(own, features[known].detach())
        return loss + self.beta * self.relation(batch, features) if self.teacher is not None else loss

    def relation(self, batch: Batch, features: Tensor) -> Mean:
        """The distillation, given the features [B, d] of a batch."""
        assert self.teacher is not None
        old = torch.tensor(self.old, device=features.device)
        now = cosines(prototypes(self.model, old), features)
        with torch.no_grad():
            before = cosines(prototypes(self.teacher, old), self.teacher(**batch.inputs).pooler_output)
        if self.relation_axis == "samples":
            return relation_over_samples(now, before, self.tau)
        together = [[self.old.index(c) for c in group if c in self.old] for group in self.groups]
        return relation_over_classes(now, before, together, self.tau)

    def end(self, task: Task, run: Run) -> None:
        self.teacher = None
        placed = {c for group in self.groups for c in group}
        self.groups.append([c for c in _head(self.model).classes.tolist() if c not in placed])

    def extra_state(self) -> State:
        projector = None if self.projection is None else list(pack(self.projection))
        return {"projector": projector, "groups": [list(group) for group in self.groups]}

    def load_extra_state(self, state: State) -> None:
        self.projection = None if state["projector"] is None else unpack(*state["projector"])
        self.groups = [list(group) for group in state["groups"]]


@dataclass(frozen=True)
class _Plan(Optimizer):
    """The plan, for parameters beside the model's too, and without momentum or weight decay for some of them."""

    more: tuple[nn.Parameter, ...] = ()
    free: tuple[nn.Parameter, ...] = ()

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        apart = set(map(id, self.free))
        optimizer = super().build([p for p in (*params, *self.more) if id(p) not in apart])
        group: dict[str, Any] = {key: 0.0 for key in ("momentum", "weight_decay") if key in optimizer.defaults}
        optimizer.add_param_group({**group, "params": list(self.free)})
        return optimizer


def _head(model: nn.Module) -> CosineHead:
    assert isinstance(model.head, CosineHead)
    return model.head


def prototypes(model: nn.Module, classes: Tensor) -> Tensor:
    """The prototypes of classes [k], which the model's head has: [k, d], with gradient."""
    head = _head(model)
    place = torch.zeros_like(head.live, dtype=torch.long)
    place[head.classes] = torch.arange(len(head.classes), device=place.device)
    return head.weight[place[classes]]


def cosines(rows: Tensor, features: Tensor) -> Tensor:
    """Of rows [K, d] and features [n, d]: [K, n], in float32 at least."""
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(_wide(rows), dim=1) @ F.normalize(_wide(features), dim=1).T


def attraction(rows: Tensor, features: Tensor) -> Mean:
    """1 - cos of the prototype of each row and its features, [n, d] each, mean over rows."""
    return Mean.of(1 - F.cosine_similarity(_wide(rows), _wide(features), dim=1))


def relation_over_samples(now: Tensor, before: Tensor, tau: float) -> Mean:
    """For each prototype, KL of the softmax over rows from what it was before; summed over prototypes, [K, n] each."""
    return Mean.of(_divergence(now / tau, before / tau))


def relation_over_classes(now: Tensor, before: Tensor, groups: Sequence[Sequence[int]], tau: float) -> Mean:
    """For each row, KL of the softmax over the prototypes of a group from what it was before, [K, n] each; summed over
    groups (of row numbers of these), mean over rows."""
    parts = [_divergence(now[list(group)].T / tau, before[list(group)].T / tau) for group in groups if group]
    return Mean.over(torch.stack(parts).sum(), float(now.shape[1]))


def _divergence(now: Tensor, before: Tensor) -> Tensor:
    """KL(softmax(before) || softmax(now)) along the last dimension, summed, []."""
    return F.kl_div(now.log_softmax(1), before.log_softmax(1), reduction="sum", log_target=True)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
