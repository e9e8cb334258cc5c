"""ConTraCon: a frozen transformer whose attention weights every task re-weights by small convolutions.

Roy, Verma, Voonna, Ghosh, Ghosh, Das: Exemplar-Free Continual Transformer with Convolutions. ICCV 2023, arXiv
2308.11357.

1. The first task trains the whole of a compact convolutional transformer (`models.cct`). From then on it is frozen.
2. A further task t learns, for each head h of every query, key and value matrix W, a k x k kernel, a number and a gate:

       W_t[h] = kernel * W[h] + b + sigmoid(a) W[h],

   * being a convolution of the weights, taken as an image. It also has norms, a pooling and a head of its own, which
   start anew with each task. Attention outputs, MLPs and tokenizer are those of the first task.
3. The loss is cross-entropy with smoothed labels among the task's own classes. No old row is kept, and no parameter of
   an earlier task moves.
4. Without being told its task, a row goes to the one whose prediction, the mean of the logits over 6 plain and 10
   changed views, has the least entropy; the plain row is then told under that task (`models.convolved_attention`).

Where paper and code differ: the paper re-weights a transformer of a *similar* task, the code always the first one's, as
is done here unless `parent="similar"`. What likeness is, the code leaves open; here it is task inference itself: the
parent is the earlier task with the least mean entropy on the new rows. The code chooses the best epoch on test rows;
here that is left out, or done on validation rows (`held_out`).

As in the code: gates start at 1, convolutions as torch's do; the cosine with one restart moves AdamW alone; 250 epochs
are its default, its commands say 500. Otherwise than there: images are standardised by the first task's rows; entropies
are shares of log C, so that tasks of unequal size can be compared; the changes of views are drawn once for all rows, so
that a prediction depends on its row alone; noise is in units of the first task's deviation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.learning import GradientLearner
from engram.core.needs import Need, Needs, needs
from engram.core.trace import State
from engram.data.table import MISSING, Batch, Table, Target
from engram.data.task import Task
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.predict import evaluating, predict
from engram.engine.run import Run
from engram.errors import EngramError, unknown
from engram.models.build import build
from engram.models.cct import CompactTransformer
from engram.models.convolved_attention import PARENTLESS, ConvolvedTransformer, TaskPart, begun
from engram.models.predictor import Predictor
from engram.models.seeding import seeded

LEAST_RATE = 1e-5  # where the cosine ends
PARENTS = ("first", "similar")


@dataclass(kw_only=True, eq=False)
class ConTraCon(GradientLearner):
    """Convolutions of the attention weights for each task, over a transformer trained on the first.

    `network`: a CompactTransformer, by its arguments. `kernel`: k, odd. `smoothing`: of the labels. `optimizer`: of all
    but the head, its rate on a cosine with a restart half-way; `head_lr`: of plain SGD for the head. `parent`: "first"
    or "similar". `held_out`: the share of a task's rows on which the best epoch is chosen, unless the task brings
    validation rows; 0 keeps the last epoch and looks at neither. `plain`, `augmented`, `noise`: the views.

    Reads square images; stored features and tables are refused. A task of one class can be told apart by nothing: its
    entropy counts as the largest. Cost: as fine-tuning, a task after the first updating 3 L H (k² + 2) numbers and its
    norms, pooling and head, which is also what is kept of it; a prediction runs the network T (1 + `augmented`) times
    for T tasks.
    """

    network: Any = field(default_factory=lambda: {"name": "CompactTransformer"})
    optimizer: Optimizer = field(default_factory=lambda: Optimizer("adamw", lr=8e-4, weight_decay=6e-7))
    epochs: int = 250
    batch_size: int = 256
    kernel: int = 15
    smoothing: float = 0.1
    head_lr: float = 5e-3
    parent: str = "first"
    held_out: float = 0.0
    plain: int = 6
    augmented: int = 10
    noise: float = 1.0

    growth: ClassVar[str] = "per task"
    processes: ClassVar[str] = "one"  # each would draw which blocks its rows leave out

    @classmethod
    def tiny(cls) -> ConTraCon:
        small = {"name": "CompactTransformer", "width": 8, "depth": 2, "heads": 2}
        plan = Optimizer("adamw", lr=1e-2)
        options: dict[str, Any] = {"parent": "similar", "held_out": 0.2, "augmented": 2, "plain": 1}
        return cls(network=small, epochs=2, batch_size=16, optimizer=plan, kernel=3, **options)

    @property
    def needs(self) -> Needs:
        return needs({Need.BOUNDARIES})

    def learn(self, task: Task, run: Run | None = None) -> None:
        """Train the whole network on the first task, a part of its own on every other. EngramError for rows without
        classes or without square images, for another network than a CompactTransformer, and for settings out of
        range."""
        if task.train.target != Target.CLASSES:
            raise EngramError(f"ConTraCon tells classes apart, and the target of these rows is {task.train.target}")
        if self.parent not in PARENTS:
            raise unknown("parent", self.parent, PARENTS)
        if not 0 <= self.held_out < 1:
            raise EngramError(f"held_out is a share of the rows, 0 or more and below 1; got {self.held_out}")
        super().learn(task, run)

    def _prepare(self, task: Task, run: Run) -> None:
        """Build the network for the first task; give every other a part."""
        if not self.started:
            super()._prepare(task, run)
            return
        parent = self.nearest(task.train, run) if self.parent == "similar" else 0
        part = self._part(self.whole.encoder, task, parent, run)
        self.whole.parts.append(part)

    def first_model(self, task: Task, run: Run) -> nn.Module:
        encoder = self._encoder(task.train, run)
        part = self._part(encoder, task, PARENTLESS, run)
        channels, seed = task.train.shapes["pixel_values"][0], run.number("views")
        views: dict[str, Any] = {"plain": self.plain, "augmented": self.augmented, "noise": self.noise, "seed": seed}
        model = ConvolvedTransformer(encoder, [part], channels, **views)
        model.standardise(task.train)
        return model

    def start(self, task: Task, run: Run) -> None:
        """Choose the rows, and let the newest part learn alone; the first together with the encoder."""
        self.rows, self.validation = self._split(task, run)
        self.best = Best()
        self.model.requires_grad_(False)
        self.part.requires_grad_(True)
        self.whole.encoder.requires_grad_(self.part.parent == PARENTLESS)

    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        head = list(self.part.head.parameters())
        rest = [p for p in self.model.parameters() if all(p is not q for q in head)]
        self.body = self.optimizer.build(rest)
        return {"": cast(torch.optim.Optimizer, Together(self.body, torch.optim.SGD(head, lr=self.head_lr)))}

    def changing(self) -> Mapping[str, Any]:
        return {"best": self.best}

    def batches(self, task: Task, epoch: int, run: Run) -> Iterable[Any]:
        if epoch:
            self._compare()
        for group in self.body.param_groups:
            group["lr"] = restarted(self.optimizer.lr, epoch, self.epochs)
        return self.rows.batches(self.batch_size, seed=run.number("order"), epoch=epoch, shard=run.shard)

    def step(self, batch: Batch, task: Task) -> Mean:
        features = self.whole.features(self.newest, batch.inputs["pixel_values"])
        assert batch.labels is not None
        places = self.places(batch.labels)
        said, soft = self.part.head.scores(features), self.smoothing
        losses = F.cross_entropy(said, places, ignore_index=MISSING, reduction="sum", label_smoothing=soft)
        return Mean.over(losses, (places != MISSING).sum())

    def places(self, labels: Tensor) -> Tensor:
        """The newest head's own columns for class ids [B]; MISSING stays."""
        found = torch.searchsorted(self.part.head.classes.to(labels.device), labels.clamp(min=0))
        return torch.where(labels == MISSING, MISSING, found)

    def end(self, task: Task, run: Run) -> None:
        self._compare()
        self.best.restore(self.part, self.whole.encoder)
        self.model.requires_grad_(True)
        if self.held_out and task.valid is not None:
            self.seen.add(task.valid.ids)

    def nearest(self, table: Table, run: Run) -> int:
        """The task whose network is surest of these rows: that with the least mean entropy."""
        found = predict(self.model, table, lambda output, _: output.extra["entropies"], run=run)
        return int(found.double().mean(0).argmin())

    @property
    def whole(self) -> ConvolvedTransformer:
        """The model."""
        assert isinstance(self.model, ConvolvedTransformer)
        return self.model

    @property
    def newest(self) -> int:
        """The number of the newest task."""
        return len(self.whole.parts) - 1

    @property
    def part(self) -> TaskPart:
        """What the newest task has of its own."""
        return self.whole.part(self.newest)

    def _encoder(self, table: Table, run: Run) -> CompactTransformer:
        found = build(self.network, inputs=table.shapes, generator=run.generator("weights"))
        encoder = found.encoder if isinstance(found, Predictor) else found
        if not isinstance(encoder, CompactTransformer):
            raise EngramError(
                "ConTraCon re-weights the attention of a CompactTransformer, such as network={'name': "
                f"'CompactTransformer', 'width': 256}}; got {type(encoder).__name__}"
            )
        return encoder

    def _part(self, encoder: CompactTransformer, task: Task, parent: int, run: Run) -> TaskPart:
        with seeded(run.generator("part")):
            return begun(encoder, {*task.classes, *task.train.classes}, self.kernel, parent)

    def _split(self, task: Task, run: Run) -> tuple[Table, Table]:
        """Rows to train on, and rows to choose the best epoch by; the latter may be none."""
        train = task.train
        if not self.held_out:
            return train, train.take([])
        if task.valid is not None and len(task.valid):
            return train, task.valid
        order = torch.randperm(len(train), generator=run.generator("held out"))
        aside = int(self.held_out * len(train))
        return train.take(order[aside:].sort().values), train.take(order[:aside])

    def _compare(self) -> None:
        """Keep the weights as they are now if none were better on the validation rows."""
        if not len(self.validation):
            return
        right = 0
        with evaluating(self.model):
            for batch in self.validation.batches(256, shuffle=False):
                moved = batch.to(self.whole.mean.device)
                features = self.whole.features(self.newest, moved.inputs["pixel_values"])
                right += int((self.part.head(features).argmax(1) == moved.labels).sum())
        self.best.offer(right, self.part, self.whole.encoder)


class Best:
    """The weights with most hits so far, of modules that are always named in the same order; the first among equals."""

    def __init__(self) -> None:
        self.hits = -1
        self.weights: list[Tensor] = []

    def offer(self, hits: int, *modules: nn.Module) -> None:
        """Copy the trainable parameters if there are more hits than ever before."""
        if hits > self.hits:
            self.hits, self.weights = hits, [p.detach().cpu().clone() for p in _trainable(modules)]

    @torch.no_grad()
    def restore(self, *modules: nn.Module) -> None:
        """Put the copy back; nothing if there is none."""
        for p, value in zip(_trainable(modules), self.weights, strict=False):
            p.copy_(value)

    def state_dict(self) -> State:
        return {"hits": self.hits, "weights": self.weights}

    def load_state_dict(self, state: State) -> None:
        self.hits, self.weights = state["hits"], list(state["weights"])


class Together:
    """Several optimisers that step at once, each over its own parameters."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> State:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: State) -> None:
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)


def restarted(rate: float, epoch: int, epochs: int) -> float:
    """The rate of an epoch: a cosine from `rate` to 1e-5 (or `rate`, if that is less), begun anew half-way."""
    period = max(1, epochs // 2)
    least = min(rate, LEAST_RATE)
    return least + (rate - least) * (1 + math.cos(math.pi * (epoch % period) / period)) / 2


def _trainable(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [p for module in modules for p in module.parameters() if p.requires_grad]
