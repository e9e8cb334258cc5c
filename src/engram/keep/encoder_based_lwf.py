"""Encoder-based learning without forgetting: what the features were good for in earlier tasks stays as it was.

Rannen Triki, Aljundi, Blaschko, Tuytelaars: Encoder Based Lifelong Learning. ICCV 2017, arXiv 1704.01920; chapter of
Aljundi: Continual Learning in Neural Networks, arXiv 1910.02718.

1. After task k an autoencoder r with the code sigma(W_k F) is trained on the features F of its rows, with
   reconstruction * ||r(F) - F||² + the task's own loss of the frozen head on r(F): the code holds what the task needs.
2. While a new task is learnt: the loss of learning without forgetting

       + alpha / 2 * sum over earlier tasks k of ||sigma(W_k F(x)) - sigma(W_k F'(x))||²,

   F' the features of the model as it was when the task came; the encoders W_k stay.
3. Before that, the rows of the head that are new are trained alone, for some epochs.

The paper has a head for each task; here classes share one, and their distillation is that of `LwF`. An autoencoder's
own loss is over the columns of its task's classes. Published code has alpha = 1e-6 for the 9216 features of an AlexNet
and a code of 300; the default here is for networks of some dozens or hundreds of features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from engram.core.trace import Derived
from engram.data.table import Batch, Table
from engram.data.task import Task
from engram.engine.fit import fit
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.engine.teacher import RowCache, cached, frozen
from engram.errors import EngramError
from engram.keep.lwf import LwF
from engram.models.autoencoder import Autoencoder
from engram.models.head import Head
from engram.models.output import Output
from engram.models.predictor import Predictor
from engram.models.seeding import seeded


@dataclass(kw_only=True, eq=False)
class EncoderBasedLwF(LwF):
    """Learning without forgetting, with the codes of features held.

    `alpha`: weight of the codes' movement; with 0 and no `warmup` it is `LwF`. `code`: units of a code, at most half of
    the features. `reconstruction`: weight of the features against the task's loss, when an autoencoder is trained, by
    `code_optimizer` for `code_epochs`. `warmup`: epochs in which the new rows of the head are trained alone.

    Encoders are a trace: rows leave residue in them. EngramError for a network that is not an encoder with a class
    head. Cost: as `LwF`, and the autoencoders' training, O(d c) a row; memory grows by d c numbers for each task.
    """

    alpha: float = 1.0
    code: int = 300
    reconstruction: float = 1e-2
    code_optimizer: Optimizer = field(default=Optimizer(lr=1e-2))
    code_epochs: int = 20
    warmup: int = 3

    growth: ClassVar[str] = "per task"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.encoders: Derived = self.trace("encoders", Derived())

    @classmethod
    def tiny(cls) -> EncoderBasedLwF:
        small, plan = {"name": "MLP", "hidden": [16]}, Optimizer(lr=1e-2)
        return cls(network=small, epochs=3, batch_size=32, optimizer=plan, code=6, code_epochs=3, warmup=1)

    def first_model(self, task: Task, run: Run) -> nn.Module:
        model = super().first_model(task, run)
        if not (isinstance(model, Predictor) and isinstance(model.head, Head)):
            raise EngramError("EncoderBasedLwF wants an encoder with a class head, such as network='MLP'")
        return model

    def start(self, task: Task, run: Run) -> None:
        super().start(task, run)
        self.held = self._encoders(run) if self.alpha else []
        wanted = self.held or (self.known and self.warmup)
        self.features = cached(self.model, task.train, "pooler_output", run, "features") if wanted else None
        if self.features is not None and self.warmup and self.known:
            self.warm_up(self.features, task, run)

    def warm_up(self, features: RowCache, task: Task, run: Run) -> None:
        """Train the head's new rows on features as they are."""
        head = self.model.head
        assert isinstance(head, Head)
        old = head.columns(self.known)
        rows = {name: getattr(head, name) for name in head.rows if getattr(head, name) is not None}
        kept = {name: row.detach()[old].clone() for name, row in rows.items()}

        def step(batch: Batch) -> Mean:
            known = features(batch)
            return self.terms(batch, Output(logits=head(known), pooler_output=known))

        @torch.no_grad()
        def hold(_: int) -> None:
            for name, row in rows.items():
                row[old] = kept[name]

        fit(
            step,
            lambda epoch: task.train.batches(self.batch_size, seed=run.number("warm-up"), epoch=epoch, shard=run.shard),
            model=head,
            optimizer=self.optimizer,
            epochs=self.warmup,
            run=run,
            name="warm-up",
            after_step=hold,
        )

    def terms(self, batch: Batch, output: Output) -> Mean:
        loss = super().terms(batch, output)
        if not self.held or self.features is None:
            return loss
        assert output.pooler_output is not None
        return loss + 0.5 * self.alpha * self.moved(output.pooler_output, self.features(batch))

    def moved(self, features: Tensor, before: Tensor) -> Mean:
        """How far the codes of features [B, d] are from what they were: squared, summed over tasks, mean over rows."""
        steps = [(code(weight, bias, features) - code(weight, bias, before)).square() for weight, bias in self.held]
        return Mean.of(torch.stack([step.sum(1) for step in steps]).sum(0))

    def end(self, task: Task, run: Run) -> None:
        self.features = self.teacher = None
        if self.alpha:
            number = len(self.encoders.values) // 2
            layer = self.autoencoder(task, run).encoder[0]
            self.encoders.values.update({f"{number}.{k}": p.detach().cpu() for k, p in layer.named_parameters()})
            self.encoders.add(task.train.ids)

    def autoencoder(self, task: Task, run: Run) -> Autoencoder:
        """An autoencoder of the features of the task's rows, which keeps what the head needs of them."""
        features = predict(self.model, task.train, "pooler_output", run=run)
        width = features.shape[1]
        with seeded(run.generator("autoencoder")):
            model = Autoencoder(width, min(self.code, max(1, width // 2)), "sigmoid", "linear").to(run.device)
        head, rows = frozen(self.model.head), Table({"values": features}, task.train.labels)  # type: ignore[arg-type]
        fit(
            lambda batch: self.rebuilding(batch, model, head, task.train.classes),
            lambda epoch: rows.batches(self.batch_size, seed=run.number("codes"), epoch=epoch, shard=run.shard),
            model=model,
            optimizer=self.code_optimizer,
            epochs=self.code_epochs,
            run=run,
            name="code",
        )
        return model

    def rebuilding(self, batch: Batch, model: Autoencoder, head: nn.Module, classes: tuple[int, ...]) -> Mean:
        """An autoencoder's loss: squared error, and the task's loss of what the head says of rebuilt features."""
        assert batch.labels is not None
        features = batch.inputs["values"]
        rebuilt = model(features)[1]
        logits = head(rebuilt)
        others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
        others[list(classes)] = False
        error = Mean.of((rebuilt - features).square().sum(1))
        return self.reconstruction * error + by_target(logits.masked_fill(others, -torch.inf), batch.labels)

    def _encoders(self, run: Run) -> list[tuple[Tensor, Tensor]]:
        """Weight [c, d] and bias [c] of the encoder of each earlier task."""
        values: Mapping[str, Tensor] = self.encoders.values
        parts = ([values[f"{k}.{name}"].to(run.device) for name in ("weight", "bias")] for k in range(len(values) // 2))
        return [(weight, bias) for weight, bias in parts]


def code(weight: Tensor, bias: Tensor, features: Tensor) -> Tensor:
    """sigma(W F + b) of features [B, d]: [B, c]."""
    return torch.sigmoid(features @ weight.T + bias)
