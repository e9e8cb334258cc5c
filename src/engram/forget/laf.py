"""Label-agnostic forgetting: embeddings of the forget rows leave their density, the others stay where they were.

Shen, Zhang, Zhao, Bialkowski, Chen, Xu: Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep Models.
ICLR 2024, arXiv 2404.00506.

No label is used. With g the encoder, g_0 as it was, e = g(x), and two variational autoencoders of g_0's embeddings, h
of all rows and h_f of the forget rows, whose squared errors are m(x) = ||h(e) - e||^2 and m_f(x) = ||h_f(e) - e||^2,
every pair of a forget batch x_f and a retain batch x_r gives two updates, each by an Adam of its own:

    L_UE = sum over x_r of exp(m / (m + 1))  -  sum over x_f of exp(m_f / (m_f + 1))
    L_RA = sum over x_r of [d(x) - log sum over x_f of exp(d(x') / tau)],    d(x) = 1 - cos(g(x), g_0(x))

The first is extractor unlearning, the second representation alignment. The paper writes m and m_f plainly; published
code has the bounded map, without which the term with the minus sign runs away. Repair, the paper's LAF+R, then trains
the head alone on labelled retain rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.forgetter import Forgetter, rows
from engram.core.needs import Need, Needs, needs
from engram.core.request import Request
from engram.data.table import Batch, Table
from engram.engine.fit import Update, fit
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.predict import features
from engram.engine.run import Run
from engram.engine.teacher import RowCache
from engram.errors import EngramError
from engram.models.split import split
from engram.models.vae import VAE

Pair = tuple[Batch, Batch]


@dataclass(frozen=True)
class Reference:
    """The model as it was: its embeddings of forget and retain rows, and the densities of the forget rows and of
    all."""

    forget: RowCache
    retain: RowCache
    of_forget: VAE
    of_all: VAE


@dataclass(kw_only=True, eq=False)
class LAF(Forgetter):
    """`lr_unlearn`, `lr_align`: learning rates of the two updates; `temperature`: the paper's tau. Of the densities:
    `latent` and `hidden` widths, `kl_weight`, `output`, `vae_epochs`, `vae_lr`. `repair_epochs` above 0: repair of the
    head at `repair_lr`, which needs the labels of retain rows.

    The defaults are those for a small convolutional network and records; a ResNet-18 has latent 16, lr_unlearn 1e-5,
    lr_align 4e-5, temperature 20 and 40 epochs, and whole classes have temperature 20. Published code ends the decoder
    in a sigmoid (`output` "sigmoid"), beside which embeddings without a bound stay far from their reconstruction; the
    linear one has no such gap. It also draws the codes while it unlearns; here they are their means.

    For models that `models.split` can split, of classes or numbers, in eval mode throughout; EngramError where nothing
    before the head can be trained. An epoch ends with the shorter of the two sides: few forget rows want more epochs or
    higher rates. Cost: that many batches times epochs, four forward and two backward passes each; one forward pass
    over all rows; the densities, small networks on stored embeddings.
    """

    lr_unlearn: float = 5e-5
    lr_align: float = 1e-4
    temperature: float = 5.0
    epochs: int = 20
    batch_size: int = 32
    latent: int = 8
    hidden: tuple[int, ...] = (128, 32)
    kl_weight: float = 0.025
    output: str = "linear"
    vae_epochs: int = 10
    vae_lr: float = 1e-3
    repair_epochs: int = 0
    repair_lr: float = 1e-3

    processes: ClassVar[str] = "one"

    @classmethod
    def tiny(cls) -> LAF:
        """A setting for checks on a handful of rows."""
        return cls(lr_unlearn=1e-3, lr_align=1e-3, epochs=2, batch_size=8, vae_epochs=2, repair_epochs=1)

    @property
    def needs(self) -> Needs:
        both = {Need.FORGET_ROWS, Need.RETAIN_ROWS}
        return needs(both | {Need.RETAIN_LABELS} if self.repair_epochs else both)

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        self.check(request)
        run = run or Run()
        with run.scope("forget"):
            forget, retain = rows(request.forget).unlabelled(), rows(request.retain).unlabelled()
            new = copy.deepcopy(model).eval().to(run.device)
            first = forget.batch(torch.arange(1)).to(run.device)
            _require_trainable(split(new).features(**first.inputs), "before its head")
            self.unlearn(new, forget, retain, self.reference(model, forget, retain, run), run)
            if self.repair_epochs:
                self.repair(new, rows(request.retain), run)
            return new

    def reference(self, model: nn.Module, forget: Table, retain: Table, run: Run) -> Reference:
        """What the updates compare with, from the model as it is."""
        of_forget = run.phase("embeddings of forget rows", lambda: features(model, forget, run=run))
        of_retain = run.phase("embeddings of retain rows", lambda: features(model, retain, run=run))
        return Reference(
            RowCache(of_forget),
            RowCache(of_retain),
            self.density(of_forget, "density of forget rows", run),
            self.density(torch.cat([of_forget, of_retain]), "density of all rows", run),
        )

    def density(self, embeddings: Tensor, name: str, run: Run) -> VAE:
        """A frozen autoencoder trained on embeddings [n, d]: mean over rows of squared error plus kl_weight times
        divergence."""

        def step(batch: Batch) -> Mean:
            x = batch.inputs["values"]
            error, divergence = vae(x, torch.randn(len(x), self.latent).to(x))  # drawn under the seed of `fit`
            return Mean.of(error + self.kl_weight * divergence)

        with run.scope(name):
            with run.seeded("weights"):
                vae = VAE(embeddings.shape[1], self.latent, self.hidden, self.output).to(embeddings.dtype)
            self._train(vae, step, Table({"values": embeddings}), self.vae_lr, self.vae_epochs, run)
        return vae.eval().requires_grad_(False)

    def unlearn(self, model: nn.Module, forget: Table, retain: Table, reference: Reference, run: Run) -> None:
        """The two updates of every pair of batches, in place."""
        away, near = (Optimizer(lr=lr).build(model.parameters()) for lr in (self.lr_unlearn, self.lr_align))

        def step(pair: Pair) -> Generator[Update, None, None]:
            yield self.unlearning(model, pair, reference), away
            yield self.alignment(model, pair, reference), near

        def pairs(epoch: int) -> Iterable[Pair]:
            return zip(batches(forget, "forget order", epoch), batches(retain, "retain order", epoch), strict=False)

        def batches(table: Table, order: str, epoch: int) -> Iterable[Batch]:
            return table.batches(self.batch_size, seed=run.number(order), epoch=epoch)

        both = {"unlearn": away, "align": near}
        fit(step, pairs, model=model, optimizer=both, epochs=self.epochs, run=run, name="unlearn")

    def unlearning(self, model: nn.Module, pair: Pair, reference: Reference) -> Mean:
        """L_UE, a sum; the gradient passes through what goes into an autoencoder and through its target."""
        forget, retain = _embeddings(model, pair)
        near, away = reference.of_all(retain)[0], reference.of_forget(forget)[0]
        return Mean.over(bounded(near).sum() - bounded(away).sum(), 1.0)

    def alignment(self, model: nn.Module, pair: Pair, reference: Reference) -> Mean:
        """L_RA, a sum over the retain batch."""
        forget, retain = _embeddings(model, pair)
        away, near = distances(forget, reference.forget(pair[0])), distances(retain, reference.retain(pair[1]))
        return Mean.over((near - torch.logsumexp(away / self.temperature, 0)).sum(), 1.0)

    def repair(self, model: nn.Module, retain: Table, run: Run) -> None:
        """Train the head, in place, on the model's embeddings of labelled rows."""
        head = split(model).head

        def step(batch: Batch) -> Mean:
            assert batch.labels is not None
            return by_target(head(batch.inputs["values"]), batch.labels)

        with run.scope("repair"):
            embeddings = run.phase("embeddings", lambda: features(model, retain, run=run))
            _require_trainable(head(embeddings[:1].to(run.device)), "in its head")
            self._train(
                head, step, Table({"values": embeddings}, retain.labels), self.repair_lr, self.repair_epochs, run
            )

    def _train(
        self, part: nn.Module, step: Callable[[Batch], Mean], table: Table, lr: float, epochs: int, run: Run
    ) -> None:
        order = run.number("order")

        def batches(epoch: int) -> Iterable[Batch]:
            return table.batches(self.batch_size, seed=order, epoch=epoch)

        fit(step, batches, model=part, optimizer=Optimizer(lr=lr), epochs=epochs, run=run)


def bounded(errors: Tensor) -> Tensor:
    """exp(m / (m + 1)) of errors m >= 0: from 1 up to e, its slope dying out as e / m^2."""
    return torch.exp(errors / (errors + 1))


def distances(one: Tensor, other: Tensor) -> Tensor:
    """1 - cosine of rows [B, d] with rows [B, d]: [B], from 0 to 2."""
    return 1 - F.cosine_similarity(one, other, dim=1)


def _embeddings(model: nn.Module, pair: Pair) -> list[Tensor]:
    encode = split(model).features
    return [encode(**batch.inputs) for batch in pair]


def _require_trainable(output: Tensor, where: str) -> None:
    """EngramError if nothing that the output depends on can be trained."""
    if not output.requires_grad:
        raise EngramError(f"forget.LAF trains the model, and no weight {where} is trainable; use forget.SSD")
