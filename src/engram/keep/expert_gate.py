"""Expert gate: an expert for each task, and autoencoders that say which expert a row belongs to.

Aljundi, Chakravarty, Tuytelaars: Expert Gate: Lifelong learning with a network of experts. CVPR 2017, arXiv
1611.06194; chapter of Aljundi: Continual Learning in Neural Networks, arXiv 1910.02718.

1. Features f of a frozen encoder are standardised once for all and squashed, u = sigmoid(f). For each task an
   autoencoder (linear, ReLU, linear, sigmoid; fewer code units than features) is trained on the u of its rows, by
   cross-entropy, with Adagrad.
2. With Er_a the mean error of task a's autoencoder on held-out rows of the new task k, a is related to k by

       Rel = 1 - (Er_a - Er_k) / Er_k.

3. The new expert starts from that of the most related task. Related by more than 0.85 it learns without forgetting
   (a head of the old classes goes on answering as before on the new rows); otherwise it is fine-tuned.
4. A row goes to the expert whose autoencoder rebuilds its u with the least error.

As in published code the errors of gate and relatedness are squared ones, and autoencoders are trained by
cross-entropy. There, mean and deviation are those of ImageNet; here, of the first task's rows. All autoencoders start
from the same weights and see rows in an order of the same seed, so that equal tasks have equal autoencoders.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.learner import require_labels
from engram.core.learning import GradientLearner
from engram.core.needs import Need, Needs, needs
from engram.core.trace import State
from engram.data.table import MISSING, Batch, Table, Target
from engram.data.task import Task
from engram.engine.fit import fit
from engram.engine.losses import Mean, by_target, distil
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.engine.teacher import RowCache, cached
from engram.errors import EngramError
from engram.models.autoencoder import Autoencoder, AutoencoderGate
from engram.models.build import build
from engram.models.frozen import frozen_encoder
from engram.models.head import Head
from engram.models.heads import LinearHead
from engram.models.predictor import Predictor
from engram.models.routed import Routed
from engram.models.seeding import seeded


@dataclass(frozen=True)
class Choice:
    """How a task's expert came to be: its parent (None for the first), the relatedness of every task before, and
    whether it learnt without forgetting."""

    parent: int | None
    relatedness: tuple[float, ...]
    distilled: bool


@dataclass(kw_only=True, eq=False)
class ExpertGate(GradientLearner):
    """An expert and an autoencoder for each task.

    `network`: the first expert, an encoder with a class head. `backbone`: the frozen encoder under the gate; None takes
    the rows as they are. `outputs`: room for so many classes in a task. `code`: units of the autoencoders' codes, at
    most half of the features. `gate_lr`, `gate_epochs`: their training. `held_out`: the share of a task's rows on which
    relatedness is measured, where the task brings no validation rows. `related`: above it an expert learns without
    forgetting, with `weight` and `temperature` of the distillation. `gate_temperature`: of the gate's probabilities.
    `choices` tells how each expert came to be.

    A task's autoencoder and expert are of its rows alone, and nothing is stored of them besides. Cost: as fine-tuning,
    and the autoencoders' training, O(d c) a row; a prediction runs every expert. Memory grows by both for each task.
    """

    backbone: Any = None
    outputs: int = 100
    code: int = 100
    gate_lr: float = 0.02
    gate_epochs: int = 50
    held_out: float = 0.1
    related: float = 0.85
    weight: float = 1.0
    temperature: float = 2.0
    gate_temperature: float = 2.0

    growth: ClassVar[str] = "per task"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choices: list[Choice] = []
        self.old_head: Head | None = None
        self.teacher: RowCache | None = None

    @classmethod
    def tiny(cls) -> ExpertGate:
        small = {"name": "MLP", "hidden": [16]}
        plan = Optimizer(lr=1e-2)
        return cls(network=small, epochs=3, batch_size=16, optimizer=plan, code=8, gate_epochs=3, related=-10.0)

    @property
    def needs(self) -> Needs:
        return needs({Need.BOUNDARIES} if self.backbone is None else {Need.BOUNDARIES, Need.BACKBONE})

    def learn(self, task: Task, run: Run | None = None) -> None:
        """Train an autoencoder and an expert on the task's rows; EngramError for rows without classes, and for more
        classes than an expert has outputs."""
        if task.train.target != Target.CLASSES:
            raise EngramError(f"experts tell classes apart, and the target of these rows is {task.train.target}")
        require_labels(task)
        if len(task.train.classes) > self.outputs:
            count = len(task.train.classes)
            raise EngramError(f"a task brings {count} classes, and an expert has {self.outputs} outputs; raise outputs")
        super().learn(task, run)

    def first_model(self, task: Task, run: Run) -> nn.Module:
        shapes = task.train.shapes
        expert = build(self.network, inputs=shapes, generator=run.generator("weights"))
        if not (isinstance(expert, Predictor) and isinstance(expert.head, Head)):
            raise EngramError("ExpertGate wants an encoder with a class head, such as network='MLP', for its experts")
        encoder = frozen_encoder(self.backbone, inputs=shapes, generator=run.generator("backbone"))
        gate = AutoencoderGate(encoder, [self._autoencoder(encoder, run)], self.gate_temperature)
        return Routed([self._child(expert, task, run)], gate, self.outputs, squash=False)

    def start(self, task: Task, run: Run) -> None:
        features = self._features(task.train, run)
        if self.choices:
            self.gate.autoencoders.append(self._autoencoder(self.gate.encoder, run))
        else:
            self.gate.standardise(features)
        u, other = self._split(features, task, run)
        number = len(self.choices)
        try:
            self.train_gate(number, u, run)
        except BaseException:  # an interrupted task leaves no autoencoder without an expert
            del self.gate.autoencoders[max(number, 1) :]
            raise
        self.choices.append(self.choose(number, other))
        self._begin(self.choices[-1], task, run)

    def train_gate(self, number: int, u: Tensor, run: Run) -> None:
        """Train an autoencoder on squashed features [n, d], by their cross-entropy summed over d."""
        part, rows = self.gate.autoencoders[number].to(run.device), Table({"values": u})
        order = _alike(run).number("gate order")

        def step(batch: Batch) -> Mean:
            x = batch.inputs["values"]
            told = part(x)[1].float()
            with torch.autocast(x.device.type, enabled=False):  # which refuses this loss at half precision
                return Mean.over(F.binary_cross_entropy(told, x, reduction="sum"), float(len(batch)))

        fit(
            step,
            lambda epoch: rows.batches(self.batch_size, seed=order, epoch=epoch, shard=run.shard),
            model=part.train(),
            optimizer={"": torch.optim.Adagrad(part.parameters(), lr=self.gate_lr)},
            epochs=self.gate_epochs,
            run=run,
            name="gate",
        )
        part.eval()

    def choose(self, number: int, u: Tensor) -> Choice:
        """How the newest expert shall begin, by its task's held-out u [m, d]."""
        if number == 0:
            return Choice(None, (), False)
        related = self.relatedness(u, number)
        parent = int(related.argmax())
        return Choice(parent, tuple(related.tolist()), float(related[parent]) > self.related and self.weight != 0)

    def relatedness(self, u: Tensor, number: int) -> Tensor:
        """How related every task before task `number` is to it, by its own u [m, d]: [number], at most about 1."""
        with torch.no_grad():
            errors = self.gate.cpu().errors(u).double().mean(0)
        own = errors[number].clamp(min=1e-12)
        return 1 - (errors[:number] - own) / own

    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        old: Iterable[nn.Parameter] = () if self.old_head is None else self.old_head.parameters()
        return {"": self.optimizer.build([*self.expert.parameters(), *old])}

    def changing(self) -> Mapping[str, Any]:
        return {} if self.old_head is None else {"old head": self.old_head}

    def step(self, batch: Batch, task: Task) -> Mean:
        assert batch.labels is not None
        output = self.expert(**batch.inputs)
        loss = by_target(output.logits, self.places(batch.labels))
        if self.old_head is None or self.teacher is None:
            return loss
        said, live = self.old_head(output.pooler_output), self.old_head.live
        return loss + self.weight * distil(said[:, live], self.teacher(batch)[:, live], self.temperature)

    def places(self, labels: Tensor) -> Tensor:
        """The newest expert's outputs for class ids, [B]; MISSING stays."""
        names = self.routed.names[-1].to(labels.device)
        found = torch.searchsorted(names[names >= 0], labels.clamp(min=0))
        return torch.where(labels == MISSING, MISSING, found)

    def end(self, task: Task, run: Run) -> None:
        self.old_head = self.teacher = None
        if task.valid is not None:
            self.seen.add(task.valid.ids)

    @property
    def routed(self) -> Routed:
        """The model."""
        assert isinstance(self.model, Routed)
        return self.model

    @property
    def gate(self) -> AutoencoderGate:
        """The model's router."""
        assert isinstance(self.routed.router, AutoencoderGate)
        return self.routed.router

    @property
    def expert(self) -> Predictor:
        """The newest expert."""
        found = self.routed.experts[-1]
        assert isinstance(found, Predictor)
        return found

    def extra_state(self) -> State:
        return {"choices": [asdict(choice) for choice in self.choices]}

    def load_extra_state(self, state: State) -> None:
        self.choices = [Choice(c["parent"], tuple(c["relatedness"]), c["distilled"]) for c in state["choices"]]

    def _begin(self, choice: Choice, task: Task, run: Run) -> None:
        """Make the newest expert, its class names, and what teaches it."""
        if choice.parent is not None:
            parent = self.routed.experts[choice.parent]
            if choice.distilled:
                self.teacher = cached(parent, task.train, "logits", run, "teacher")
                self.old_head = copy.deepcopy(parent.head).to(run.device)  # type: ignore[assignment]
            self.routed.add(self._child(parent, task, run))
        self.model.to(run.device)
        self.routed.names[-1, : len(task.train.classes)] = torch.tensor(task.train.classes)

    def _child(self, parent: nn.Module, task: Task, run: Run) -> nn.Module:
        """A copy of an expert with a fresh head for the task's classes."""
        child: Any = copy.deepcopy(parent)
        child.head = LinearHead(child.head.width, classes_total=self.outputs)
        child.head.grow(range(len(task.train.classes)), run.generator("head"))
        return child

    def _autoencoder(self, encoder: nn.Module, run: Run) -> Autoencoder:
        """An untrained autoencoder; all of a run start alike."""
        width: Any = encoder.width
        with seeded(_alike(run).generator("autoencoder")):
            return Autoencoder(width, min(self.code, max(1, width // 2)), "relu", "sigmoid")

    def _features(self, table: Table, run: Run) -> Tensor:
        """What the frozen encoder gives for rows, [n, d]."""
        return run.phase("features", lambda: predict(self.gate.encoder, table, "pooler_output", run=run).float())

    def _split(self, features: Tensor, task: Task, run: Run) -> tuple[Tensor, Tensor]:
        """u of the rows that the autoencoder is trained on [n, d], and of those on which relatedness is measured."""
        u = self.gate.cpu().squashed(features)
        if task.valid is not None and len(task.valid):
            return u, self.gate.cpu().squashed(self._features(task.valid, run))
        order = torch.randperm(len(u), generator=_alike(run).generator("held out"))
        out = min(max(1, round(self.held_out * len(u))), len(u) - 1)
        return (u[order[out:]], u[order[:out]]) if out else (u, u)


def _alike(run: Run) -> Run:
    """The run as every task sees it: draws depend on no scope."""
    return run.with_seed(run.seed)
