"""One variational model that classifies, rehearses what it dreams, refuses the unknown and says what to learn next.

Mundt, Hong, Pliushch, Ramesh: A Wholistic View of Continual Learning with Deep Neural Networks: Forgotten Lessons and
the Bridge to Active and Open World Learning. Neural Networks 2023, arXiv 2009.01797. The model and its training are
those of Mundt, Pliushch, Majumder, Hong, Ramesh (J. Imaging 2022, arXiv 1905.12019), with the code that goes with it.

1. An encoder gives mean and deviation of a code z = mean + deviation · noise; a linear layer without bias classifies z,
   a decoder rebuilds the row. The loss is

       cross-entropy(z, label) + misfit(decoder(z), row) + beta · KL,

   the misfit averaged over all numbers of all rows, KL over all numbers of all codes. The encoder sees the row with
   noise added, the decoder is held to the clean one.
2. After each task, for every class c: the mean of the codes of the rows that are classified rightly, their distances
   from it, and a Weibull law of the largest ones. The law at a new code's distance is omega_c, the probability that it
   lies outside of what was learnt (OpenMax's bound). A row's omega is that of its predicted class.
3. Before the next task codes are drawn from N(0, 1) and labelled by the classifier; those with omega up to `accept` are
   decoded, until every old class has its share of as many rows as the last training had. They are learnt with the new
   rows. `accept=1` is plain generative replay, `replay=0` none: the lower bound. The upper one is one task of all rows.
4. omega also chooses: rows to be labelled (the most unusual that are no outliers), tasks to be learnt next (the most
   familiar), rows that stand for a class (at distances drawn from the law of all its distances).

Where paper and code differ: papers take the least omega over classes, the code that of the predicted class, which is
the default here (`over`). Code rests predictions on several drawn codes; here they follow from the mean code, so that a
row is told the same each time. Mean codes lie closer together than drawn ones, so tails are fitted to both, each for
its own use. The code's network is a wide ResNet with a mirrored decoder; here any encoder, and a decoder of linear
layers. Rows that do not lie in [0, 1] have no cross-entropy: they are standardised, and their misfit is that of a
Gaussian.

Reconstructed: step 4 (which prior rejects; how the choice is spread over predicted classes; that a class's core set
follows the law of all its distances, not of the tail alone), the shift that puts a tail's smallest distance at 1, and
the floor of `least` rows for a tail.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engram.core.learner import require_labels
from engram.core.learning import GradientLearner
from engram.core.needs import Need, Needs, needs
from engram.core.settings import name_of
from engram.core.trace import State
from engram.data.table import Batch, Table, Target
from engram.data.task import Task
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.predict import evaluating, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.build import build
from engram.models.head import Head
from engram.models.open_variational import DISTANCES, OpenClassifier, Tails, divergence, open_classifier, the_column
from engram.models.output import Output
from engram.models.predictor import Predictor
from engram.models.seeding import seeded
from engram.stats.scores import rejection_threshold
from engram.stats.tails import fit_tail

WIDER = 2.0  # deviation of the prior when that of 1 has not filled a class
WIDE = {"name": "MLP", "hidden": [400, 400], "norm": "batch"}


@dataclass(kw_only=True, eq=False)
class OpenVariational(GradientLearner):
    """A classifying variational autoencoder with extreme-value bounds; its model's output carries `.novelty`.

    `network`: the encoder's trunk, `decoder`: widths of the decoder, `latent`: numbers of a code. `beta`: of the KL,
    `noise`: deviation of the noise on the encoder's input, in units of the rows as standardised. `likelihood`:
    "bernoulli" for rows in [0, 1], "gaussian" for any; None decides by the first task's rows. `tail`: the share of a
    class's rows that makes its tail, at least `least` of them; `distance`: "cosine", "euclidean" or "mixed"; `over`:
    "predicted" or "min". `accept`: the largest omega of a generated row; `reject`: of a row that may be chosen.
    `replay`: the most rows that are generated for a task; None for as many as the last training had, and so more with
    each task. Codes are drawn `draws` at a time for at most `rounds` rounds, so often again from a wider prior, and at
    last without rejection; a class that is still lacking rows stays so.

    EngramError for rows without classes, for inputs other than `values` or `pixel_values`, and for rows outside of
    [0, 1] where the likelihood is Bernoulli's. Batches of one row are passed over: batch statistics need two.

    Cost: as fine-tuning, with a decoder, on new and generated rows; the tails, a forward pass and O(n d). Memory
    between tasks: the model, and a mean and three numbers a class, twice.
    """

    network: Any = field(default_factory=lambda: dict(WIDE))
    epochs: int = 120
    batch_size: int = 128
    decoder: tuple[int, ...] = (400, 400)
    latent: int = 60
    beta: float = 0.1
    noise: float = 0.25
    likelihood: str | None = None
    tail: float = 0.05
    least: int = 10
    distance: str = "cosine"
    over: str = "predicted"
    accept: float = 0.01
    reject: float = 0.5
    replay: int | None = None
    draws: int = 10_000
    rounds: int = 25

    processes: ClassVar[str] = "one"
    growth: ClassVar[str] = "per class"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.size = 0  # rows of the last training, generated ones included

    @classmethod
    def tiny(cls) -> OpenVariational:
        small = {"name": "MLP", "hidden": [16], "norm": "batch"}
        plan = Optimizer(lr=1e-2)
        return cls(network=small, optimizer=plan, epochs=3, batch_size=16, decoder=(16,), latent=4, draws=200, rounds=2)

    @property
    def needs(self) -> Needs:
        return needs({Need.BOUNDARIES})

    # --- learning

    def learn(self, task: Task, run: Run | None = None) -> None:
        """Generate rows of the old classes, train on them and the task's, and fit the tails."""
        if task.train.target not in (Target.CLASSES, Target.NONE):
            raise EngramError(f"{name_of(self)} tells classes apart, and these rows' target is {task.train.target}")
        require_labels(task)
        run, rows = run or Run(), task.train.of_classes(task.train.classes)
        self._check(rows)
        with run.scope("replay"):
            old = self.replayed(rows, run)
        together = rows.concat(old)
        if min(len(together), self.batch_size) < 2:
            raise EngramError("batch statistics need two rows or more in a batch; give more rows, or a larger batch")
        super().learn(Task(together, classes=tuple(sorted({*task.classes, *rows.classes}))), run)
        self.seen.drop(old)

    def replayed(self, rows: Table, run: Run) -> Table:
        """Generated rows of the classes that are known, with the columns of these rows; none for the first task."""
        total = self.size if self.replay is None else min(self.size, self.replay)
        if not (self.started and total):
            return rows.take([])
        return self.generate(math.ceil(total / max(len(self._live()), 1)), rows, run)

    def first_model(self, task: Task, run: Run) -> nn.Module:
        table = task.train
        inner = build(self.network, inputs=table.shapes, generator=run.generator("weights"))
        if not isinstance(inner, Predictor):
            raise EngramError(f"{name_of(self)} wants an encoder with a head, such as network='MLP', for its trunk")
        name, column = the_column(table.inputs)
        outputs, likelihood = math.prod(table.shapes[name]), self.likelihood or _likelihood(column)
        with seeded(run.generator("weights of codes and decoder")):
            model = open_classifier(
                inner.encoder, task.classes, outputs, self.latent, self.decoder, likelihood, self.distance, self.over
            )
        if likelihood == "gaussian":
            deviation, mean = torch.std_mean(column.double(), correction=0)
            model.shift.copy_(mean)
            model.scale.copy_(torch.where(deviation > 1e-6, deviation, 1.0))
        return model

    def batches(self, task: Task, epoch: int, run: Run) -> Iterable[Batch]:
        return (batch for batch in super().batches(task, epoch, run) if len(batch) > 1)

    def step(self, batch: Batch, task: Task) -> Mean:
        model, clean = self.net, self.net.standardised(**batch.inputs)
        found = model.encoder(**{name: value + self.noise * _normal(value) for name, value in clean.items()})
        code = found.pooler_output + found.extra["deviation"] * _normal(found.pooler_output)
        found.logits, found.extra["misfit"] = model.head(code), model.misfit(model.decoder(code), clean)
        return self.terms(batch, found)

    def terms(self, batch: Batch, output: Output) -> Mean:
        assert batch.labels is not None and output.logits is not None and output.pooler_output is not None
        kl = divergence(output.pooler_output, output.extra["deviation"])
        return by_target(output.logits, batch.labels) + Mean.of(output.extra["misfit"]) + self.beta * Mean.of(kl)

    def end(self, task: Task, run: Run) -> None:
        self.size = len(task.train)
        mean, deviation = predict(self.model, task.train, _code, run=run).unbind(1)
        drawn = mean + deviation * torch.randn(mean.shape, generator=run.generator("codes of the rows"))
        assert task.train.labels is not None
        self.model.cpu()
        for tails, codes in zip(self._tails(), (mean, drawn), strict=True):
            self._fit(tails, codes, task.train.labels)
        self.model.to(run.device)

    def refresh(self, run: Run | None = None) -> None:
        """Let go of the tails of classes that the head does not know any more."""
        if self.started:
            for tails in self._tails():
                tails.keep(self._live())

    # --- generating

    def generate(self, each: int, like: Table, run: Run | None = None, accept: float | None = None) -> Table:
        """Up to `each` generated rows of every class that is known, with the input, shape and type of `like`.

        `accept`: another limit of omega than the learner's; 1 rejects nothing.
        """
        run = run or Run()
        code, labels = self._codes(each, self.accept if accept is None else accept, run)
        name, column = the_column(like.inputs)
        with evaluating(self.net.to(run.device)):
            parts = [self.net.generate(part.to(run.device)).cpu() for part in code.split(1024)]
        rows = torch.cat(parts).reshape(len(code), *column.shape[1:])
        rows = rows.mul(255).round() if column.dtype == torch.uint8 else rows
        return Table({name: rows.to(column.dtype)}, labels, tuple(f"generated {k}" for k in range(len(labels))))

    def _codes(self, each: int, accept: float, run: Run) -> tuple[Tensor, Tensor]:
        """Codes [n, d] from the prior and their classes [n]: the first `each` of every class that are accepted."""
        classes, draws = self._live(), run.generator("codes from the prior")
        found: dict[int, Tensor] = {c: torch.zeros(0, self.latent) for c in classes.tolist()}
        for width, limit in ((1.0, accept), (WIDER, accept), (1.0, 1.0)):
            for _ in range(self.rounds):
                if all(len(codes) == each for codes in found.values()):
                    break
                codes, labels = self._draw(width, limit, draws, run)
                found = {c: torch.cat([old, codes[labels == c]])[:each] for c, old in found.items()}
        sizes = torch.tensor([len(codes) for codes in found.values()], dtype=torch.long)
        return torch.cat(list(found.values())), classes.repeat_interleave(sizes)

    def _draw(self, width: float, limit: float, draws: torch.Generator, run: Run) -> tuple[Tensor, Tensor]:
        """Codes from a prior of this deviation that are accepted, and their classes."""
        code = width * torch.randn(self.draws, self.latent, generator=draws)
        with evaluating(self.net.to(run.device)) as model:
            logits = model.head(code.to(run.device))  # type: ignore[operator]
            omega = model.drawn.outlier(code.to(run.device), logits)  # type: ignore[operator,union-attr]
        accepted = (omega <= limit).cpu()
        return code[accepted], logits.argmax(1).cpu()[accepted]

    # --- refusing and choosing

    def threshold(self, known: Table, rejected: float = 0.05, run: Run | None = None) -> float:
        """The limit of `.novelty` above which at most this share of held-out known rows lies, in steps of 0.01.

        EngramError for no rows.
        """
        return rejection_threshold(predict(self.model, known, "novelty", run=run), rejected)

    def query(self, pool: Table, n: int, run: Run | None = None) -> Table:
        """The `n` rows of a pool that are most worth a label: the most unusual, but for those with omega above
        `reject`, in turn from each predicted class. Fewer if there are no more. Labels are not read. EngramError for a
        number below 0."""
        if n < 0:
            raise EngramError(f"{n} rows cannot be chosen; ask for 0 or more")
        omega, classes = predict(self.model, pool, _omega_and_class, run=run).unbind(1)
        order = omega.argsort(descending=True, stable=True)
        order = order[omega[order] <= self.reject]
        return pool.take(order[_turns(classes[order])[:n]])

    def order(self, tasks: Sequence[Task], contrast: bool = False, run: Run | None = None) -> list[Task]:
        """Tasks by the mean omega of their rows under the model as it is: the most familiar first, with `contrast` the
        least. Learn the first, and ask again. EngramError for a task without rows."""
        bare = [task.index for task in tasks if not len(task.train)]
        if bare:
            raise EngramError(f"task {bare[0]} has no rows, so nothing can be said of it; leave it out")
        novelty = [float(predict(self.model, task.train, "novelty", run=run).mean()) for task in tasks]
        places = sorted(range(len(tasks)), key=lambda k: -novelty[k] if contrast else novelty[k])
        return [tasks[k] for k in places]

    def core_set(self, table: Table, n: int, run: Run | None = None) -> Table:
        """`n` labelled rows that stand for the table, as many of each class: at distances from the class's mean code
        that are drawn from the law of all of them. Rows with omega above `reject` are left out.

        EngramError for a class without a tail. Cost: O(n_c k) for k of the n_c rows of a class.
        """
        run, chosen = run or Run(), []
        mean, _ = predict(self.model, table, _code, run=run).unbind(1)
        omega = predict(self.model, table, "novelty", run=run)
        for k, c in enumerate(table.classes):
            own = ((torch.as_tensor(table.labels) == c) & (omega <= self.reject)).nonzero()[:, 0]
            count = n // len(table.classes) + (k < n % len(table.classes))
            distances = self._distances(mean[own], c)
            chosen.append(own[nearest_to_draws(distances, count, run.generator("core set", c))])
        return table.take(torch.cat(chosen)) if chosen else table

    def _distances(self, mean: Tensor, label: int) -> Tensor:
        """Distances [n] of mean codes [n, d] from a class's mean code."""
        tails = self._tails()[0]
        if label >= len(tails.live) or not bool(tails.live[label]):
            raise EngramError(f"class {label} has no tail: no row of it was learnt and classified rightly")
        return DISTANCES[self.distance](mean.double(), tails.means[tails.columns([label])].cpu())[:, 0]

    # --- parts

    @property
    def net(self) -> OpenClassifier:
        """The model."""
        assert isinstance(self.model, OpenClassifier)
        return self.model

    def extra_state(self) -> State:
        return {"size": self.size}

    def load_extra_state(self, state: State) -> None:
        self.size = int(state["size"])

    def _live(self) -> Tensor:
        """The classes that the head knows, ascending."""
        assert isinstance(self.net.head, Head)
        return self.net.head.live.nonzero()[:, 0].cpu()

    def _tails(self) -> tuple[Tails, Tails]:
        """Of mean codes, and of drawn ones."""
        tails, drawn = self.net.tails, self.net.drawn
        assert isinstance(tails, Tails) and isinstance(drawn, Tails)
        return tails, drawn

    def _fit(self, tails: Tails, codes: Tensor, labels: Tensor) -> None:
        """Means and tails of codes [n, d] by class, of the rightly classified alone."""
        head, codes = self.net.head, codes.double()
        right = head(codes.float()).argmax(1) == labels
        classes = [c for c in labels.unique().tolist() if bool((right & (labels == c)).any())]
        size = max(int(self.tail * len(labels) / len(labels.unique())), self.least)
        own = [codes[right & (labels == c)] for c in classes]
        means = torch.stack([z.mean(0) for z in own]) if own else codes.new_zeros(0, self.latent)
        laws = [fit_tail(DISTANCES[self.distance](z, m[None])[:, 0], size) for z, m in zip(own, means, strict=True)]
        tails.set(classes, means, laws)

    def _check(self, rows: Table) -> None:
        """EngramError for inputs that the model, or its likelihood, cannot have."""
        likelihood = self.net.likelihood if self.started else self.likelihood
        name, column = the_column(rows.inputs)
        if self.started:
            decoder: Any = self.net.decoder
            had, got = decoder.out.out_features, math.prod(rows.shapes[name])
            if had != got:
                raise EngramError(f"the model was built for rows of {had} numbers; got {got}")
        if likelihood == "bernoulli" and _likelihood(column) != "bernoulli":
            raise EngramError("rows outside of [0, 1] have no Bernoulli likelihood; say likelihood='gaussian'")


def nearest_to_draws(distances: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """Up to `count` different row numbers: each row's distance [n] is the nearest, among those that are left, to one
    drawn from the Weibull law of all of them. O(n count)."""
    if not len(distances):
        return torch.zeros(0, dtype=torch.long)
    law = fit_tail(distances.clamp(min=1e-9), len(distances), start=None)
    free, chosen = torch.ones(len(distances), dtype=torch.bool), []
    for wanted in law.inverse(torch.rand(min(count, len(distances)), generator=draws)):
        chosen.append(int((distances - wanted).abs().masked_fill(~free, torch.inf).argmin()))
        free[chosen[-1]] = False
    return torch.tensor(chosen, dtype=torch.long)


def misfit(model: OpenClassifier, table: Table, run: Run | None = None) -> Tensor:
    """How badly each row [n] is rebuilt from its mean code, in nats a number: the score that omega is compared with."""

    def read(output: Output, batch: Batch) -> Tensor:
        return model.misfit(model.decoder(output.pooler_output), model.standardised(**batch.inputs)).mean(1)

    return predict(model, table, read, run=run)


def _turns(classes: Tensor) -> Tensor:
    """An order [n] of rows with these classes in which the first of each class come first, then the second ones …"""
    turn = torch.zeros(len(classes), dtype=torch.long)
    for c in classes.unique():
        turn[classes == c] = torch.arange(int((classes == c).sum()))
    return turn.argsort(stable=True)


def _code(output: Output, batch: Batch) -> Tensor:
    """Mean and deviation of codes: [B, 2, d]."""
    assert output.pooler_output is not None
    return torch.stack([output.pooler_output, output.extra["deviation"]], 1)


def _omega_and_class(output: Output, batch: Batch) -> Tensor:
    """[B, 2], float64."""
    assert output.novelty is not None and output.logits is not None
    return torch.stack([output.novelty, output.logits.argmax(1).to(output.novelty)], 1)


def _likelihood(column: Tensor) -> str:
    """Bernoulli for numbers in [0, 1] and images of uint8."""
    inside = column.dtype == torch.uint8 or (bool((column >= 0).all()) and bool((column <= 1).all()))
    return "bernoulli" if inside else "gaussian"


def _normal(like: Tensor) -> Tensor:
    """Standard normal numbers from the generator of the training, which is the CPU's."""
    return torch.randn(like.shape).to(like)
