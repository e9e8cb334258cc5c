"""The template of learners with a network of their own for each task: nothing is forgotten, and everything costs.

Bornschein et al.: NEVIS'22: A Stream of 100 Tasks Sampled from 30 Years of Computer Vision Research. 2022, arXiv
2211.11747. Methods differ in what a task's network starts from; the rest is common to them:

1. A copy of an earlier task's backbone, or a fresh one, gets a new linear head for the classes of the task.
2. It is trained by SGD with Nesterov momentum, a linear warm-up and a cosine to 0, on cross-entropy with label
   smoothing, or where a row may have several labels, on the sum of their binary cross-entropies.
3. Learning rate and smoothing are searched at random. Each trial begins from the same start, is validated every so many
   steps, and keeps the state that was best on the dev rows; the trial with the best one wins.
4. All of that is paid for: training and validation of every trial, and the choice of the start, are counted.

Operations are counted 2 per multiply-add, as `torch.utils.flop_counter` does, in matrix products and convolutions,
forward and backward; published figures count 1, and neither validation nor choice. Published code hands on the best
state of each trial, but ranks trials by the error of their last step; here both go by the best. It decays no norms and
biases, crops and flips images, and sets the batch to 0.25 % of the rows, at most 512; here everything decays, images
stay as they are, and the batch is of a fixed size.

Where nobody says which task a row belongs to, it is the one whose network is most confident, with the confidence
normalised for its number of classes: `models.experts`. That is an addition; the benchmark always says.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.learner import Learner, require_labels
from engram.core.needs import Need, Needs, needs, require_processes
from engram.core.settings import name_of
from engram.core.trace import Seen, State
from engram.data.chronological import is_several
from engram.data.readers import train_test
from engram.data.table import MISSING, Batch, Table, Target
from engram.data.task import Task
from engram.engine.cost import flops_of
from engram.engine.fit import fit
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.predict import error_of_scores, evaluating, predict
from engram.engine.run import Run
from engram.engine.search import Best, Setting, Span, drawn
from engram.errors import EngramError
from engram.models.build import build
from engram.models.experts import Experts
from engram.models.head import Head
from engram.models.heads import LinearHead
from engram.models.predictor import Predictor
from engram.stats.seeds import derive


@dataclass(frozen=True)
class Choice:
    """How a task's network came to be. `parent`: the number of the one that its backbone was copied from, None for a
    fresh one; `scores`: of the candidates, the fresh one last, where they were compared; `error` on dev rows of the
    best state, at `step` of the winning trial; `searching` and `choosing`: operations of all trials, and of the choice.
    """

    parent: int | None
    scores: tuple[float, ...]
    lr: float
    smoothing: float
    error: float
    step: int
    searching: float
    choosing: float


@dataclass(frozen=True)
class Job:
    """A task as its network sees it: labelled rows, and the classes, ascending or as the labels' columns have them."""

    train: Table
    dev: Table
    classes: tuple[int, ...]
    several: bool


@dataclass(kw_only=True, eq=False)
class PerTask(Learner):
    """A network for each task; a method says in `parent` whose backbone it starts from.

    `network`: an encoder with a class head, as for `models.build`; or one for each kind of input, {"pixel_values": …,
    "values": …}. A saved model is what the fresh ones start from. `epochs`, but at most `max_steps` updates a trial;
    `validate_every` so many, and at the end. `trials`: how many settings are tried, of `lr` (log-uniform) and
    `smoothing` (uniform). `warmup`: a share of the training. `held_out`: the share of the rows that settings are chosen
    by, where the task brings none. `choices` says how each network came to be.

    A task that comes back gets a new network, which answers from then on; the old one stays to start from. Draws follow
    from the seed and the task's classes, not from its place in the stream. Cost: `trials` trainings for each task;
    memory grows by a network a task. A prediction runs all networks that read such rows, unless it is told the task.
    """

    network: Any = "MLP"
    epochs: int = 10
    max_steps: int = 50_000
    batch_size: int = 256
    validate_every: int = 1000
    trials: int = 16
    lr: Span = (1e-4, 1e-1)
    smoothing: Span = (0.0, 0.3)
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.05
    held_out: float = 0.15

    growth: ClassVar[str] = "per task"
    processes: ClassVar[str] = "one"
    counts_flops: ClassVar[bool] = True  # in run.cost, also where a training goes on that was interrupted

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: Seen = self.trace("seen", Seen())
        self.choices: list[Choice] = []

    @property
    def needs(self) -> Needs:
        return needs({Need.BOUNDARIES})

    @property
    def experts(self) -> Experts:
        """The model."""
        assert isinstance(self.model, Experts)
        return self.model

    def parent(self, job: Job, fresh: Predictor, run: Run) -> tuple[int | None, tuple[float, ...]]:
        """The network whose backbone this task starts from, None for a fresh one; and the scores it was chosen by."""
        raise NotImplementedError

    def learn(self, task: Task, run: Run | None = None) -> None:
        """Search for the task's network. EngramError for rows without class labels, or several labels without names."""
        require_processes(name_of(self), self.processes)
        if self.trials < 1:
            raise EngramError(f"a search of {self.trials} trials finds nothing; give 1 or more")
        require_labels(task)
        job = self._job(task)
        run = run or Run()
        with run.scope("learn"):
            own = run.with_seed(derive(run.seed, *job.classes))
            fresh = self._fresh(job, own)
            parent, scores, choosing = self._chosen(job, fresh, own)
            if parent is not None:
                fresh.encoder = copy.deepcopy(self.experts.expert(parent).encoder)
            before = run.cost.flops
            found, setting, outcome = own.phase("search", lambda: self._search(job, fresh, own))
            spent = run.cost.flops - before
        self.choices.append(Choice(parent, scores, *setting, *outcome, spent, choosing))
        self._add(found, job, run)
        self.seen.add((*task.train.ids, *(task.valid.ids if task.valid is not None else ())))

    def readers(self, job: Job) -> list[int]:
        """The networks of earlier tasks that read such rows, in order."""
        return self.experts.readers(job.train.shapes) if self.started else []

    def extra_state(self) -> State:
        return {"choices": [asdict(choice) for choice in self.choices]}

    def load_extra_state(self, state: State) -> None:
        self.choices = [Choice(**{**choice, "scores": tuple(choice["scores"])}) for choice in state["choices"]]

    def _job(self, task: Task) -> Job:
        several = is_several(task.train)
        if not several and task.train.target != Target.CLASSES:
            raise EngramError(
                f"{name_of(self)} tells classes, or several labels of 0 or 1; these rows' target is {task.train.target}"
            )
        classes = tuple(task.classes) if several else tuple(sorted({*task.classes, *task.train.classes}))
        width = task.train.labels.shape[1] if several and task.train.labels is not None else len(classes)
        if len(classes) != width:
            raise EngramError(f"rows have {width} labels each, and the task names {len(classes)} classes; name as many")
        return Job(*self._parts(task, classes), classes, several)

    def _parts(self, task: Task, classes: tuple[int, ...]) -> tuple[Table, Table]:
        """Rows to train with, and dev rows: those of the task, else some held out, else the same ones."""
        train = _labelled(task.train, classes)
        if task.valid is not None and len(found := _labelled(task.valid, classes)):
            return train, found
        try:
            return train_test(train, self.held_out)
        except EngramError:  # too few rows to part with any
            return train, train

    def _fresh(self, job: Job, run: Run) -> Predictor:
        """An untrained network, or the one given, with a new head for the task's classes."""
        spec = self.network
        if isinstance(spec, Mapping) and not {"name", "fresh"} & spec.keys():
            kind = next((name for name in job.train.inputs if name in spec), None)
            if kind is None:
                raise EngramError(
                    f"there are networks for {', '.join(spec)}, and rows of {', '.join(job.train.inputs)}"
                )
            spec = spec[kind]
        made = build(spec, inputs=job.train.shapes, generator=run.generator("weights"))
        if not (isinstance(made, Predictor) and isinstance(made.head, Head)):
            raise EngramError(f"{name_of(self)} wants an encoder with a class head, such as network='MLP'")
        made.head = LinearHead(made.head.width)
        made.head.grow(job.classes, run.generator("head"))
        return made

    def _chosen(self, job: Job, fresh: Predictor, run: Run) -> tuple[int | None, tuple[float, ...], float]:
        before = run.cost.flops
        parent, scores = run.phase("choice", lambda: self.parent(job, fresh, run))
        return parent, tuple(scores), run.cost.flops - before

    def _search(self, job: Job, start: Predictor, run: Run) -> tuple[Predictor, tuple[float, float], tuple[float, int]]:
        """The best state of the best trial, its setting, and its error and step."""
        costs = _costs(start, job)
        settings = [drawn(k, self.lr, self.smoothing, run) for k in range(self.trials)]
        best, won = Best(), settings[0]
        for k, setting in enumerate(settings):
            found = Best()
            with run.scope(f"trial {k}"):
                found.load_state_dict(run.phase("training", partial(self._trial, job, start, setting, costs, run)))
            if found.error < best.error:
                best, won = found, setting
        if not best.weights:
            raise EngramError(f"all {self.trials} trials diverged, of learning rates from {self.lr[0]} on; lower them")
        model = copy.deepcopy(start)
        model.load_state_dict(best.weights)
        return model.cpu().eval(), (won.lr, won.smoothing), (best.error, best.step)

    def _trial(self, job: Job, start: Predictor, setting: Setting, costs: tuple[float, float], run: Run) -> State:
        model, best = copy.deepcopy(start), Best()
        per_epoch = -(-len(job.train) // self.batch_size)
        total = min(self.epochs * per_epoch, self.max_steps)
        order, forward, update = run.number("order"), *costs

        def step(batch: Batch) -> Mean:
            run.cost.flops += update * len(batch)
            return loss(model, batch, job, setting.smoothing)

        def batches(epoch: int) -> Iterator[Batch]:
            return islice(job.train.batches(self.batch_size, seed=order, epoch=epoch), total - epoch * per_epoch)

        def look(k: int) -> None:
            if k % self.validate_every == 0 or k == total:
                run.cost.flops += forward * len(job.dev)
                best.look(_error(model, job, run), model, k)

        try:
            fit(
                step,
                batches,
                model=model.train(),
                optimizer=self._optimizer(setting.lr),
                epochs=-(-total // per_epoch),
                steps=min(per_epoch, total),
                run=run,
                state={"best": best},
                after_step=look,
            )
        except EngramError:
            if not _diverged(model):
                raise
        return best.state_dict()

    def _optimizer(self, lr: float) -> Optimizer:
        return Optimizer("sgd", lr, self.momentum, True, self.weight_decay, "cosine", self.warmup)

    def _add(self, found: Predictor, job: Job, run: Run) -> None:
        if self.started:
            self.experts.add(found, job.train.shapes, job.several)
        else:
            self.model = Experts([found], [job.train.shapes], [job.several])
        self.model.to(run.device).eval()


def loss(model: Predictor, batch: Batch, job: Job, smoothing: float) -> Mean:
    """Cross-entropy over the task's classes with label smoothing; of several labels, the sum of the binary ones."""
    assert batch.labels is not None
    logits = model(**batch.inputs).logits[:, list(job.classes)].float()
    if not job.several:
        places = torch.searchsorted(torch.tensor(job.classes, device=logits.device), batch.labels)
        return Mean.of(F.cross_entropy(logits, places, reduction="none", label_smoothing=smoothing))
    known = ~batch.labels.isnan()
    wanted = (1 - smoothing) * batch.labels.nan_to_num() + smoothing / 2
    each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return Mean.over((each * known).sum(), float(len(logits)))


def _error(model: Predictor, job: Job, run: Run) -> float:
    """The error on dev rows; infinite for a network whose scores are no numbers any more."""
    scores = predict(model, job.dev, lambda output, _: output.logits[:, list(job.classes)], run=run)
    return error_of_scores(scores, job.dev, job.classes) if bool(scores.isfinite().all()) else math.inf


def _costs(model: Predictor, job: Job) -> tuple[float, float]:
    """Operations of one row: forward, and forward and backward. All that is counted is linear in the rows."""
    twin, batch = copy.deepcopy(model).cpu(), job.train.batch(torch.zeros(2, dtype=torch.long))
    with evaluating(twin):
        forward = flops_of(lambda: twin(**batch.inputs))
    twin.eval().requires_grad_(True)
    return forward / 2, flops_of(lambda: loss(twin, batch, job, 0.0).value.backward()) / 2


def _labelled(table: Table, classes: Sequence[int]) -> Table:
    """The rows with a label, of these classes."""
    labels = table.labels
    assert labels is not None
    known = ~labels.isnan().all(1) if labels.is_floating_point() else torch.isin(labels, torch.tensor(list(classes)))
    return table if bool(known.all()) else table.take(known & (labels != MISSING) if labels.ndim == 1 else known)


def _diverged(model: nn.Module) -> bool:
    values: list[Tensor] = [p.detach() for p in model.parameters()]
    return not all(bool(torch.isfinite(value).all()) for value in values)
