"""BT²: a new embedding that can be searched for among the old one's vectors, and is as good as without that duty.

Zhou, Li, Shrivastava, Zhao, Torralba, Tian, Lim: BT²: Backward-compatible Training with Basis Transformation. ICCV
2023, arXiv 2211.03989.

At an upgrade there are the old model's embedding phi_o (its vectors are stored, and stay) and that of a better model,
trained without looking at the old one, phi'_n; both at unit length. A new network gives h, and from it

    u = norm(h[:d_n]),  v = norm(norm(A relu(h) + b)[:k]),
    e = [v, P C u],  w = Q e[:d_o],  phi_n = [w, e[d_o:]],

P and Q orthogonal matrices that are trained (rotations: the basis), C = `scale`, k = `extra`. w is compared with stored
vectors of phi_o; phi_n, of k + d_n numbers, with vectors of its own. Whatever P and Q are, inner products of phi_n are
v·v' + C² u·u', so that u loses nothing by the turn: the k numbers of v make room for what the old space has besides.
The loss is

    cross-entropy of U u + own * (1 - cos(u, phi'_n)) + pseudo * cross-entropy of M norm(w)
    + match * (1 - cos(w, phi_o)),

U a classifier without bias, M the class means of phi_o on the task's rows (see `keep.BCT`). Trained are the network, A,
P, Q and U. The logits of M lie in [-1, 1], where the cross-entropy is nearly flat; that is why `pseudo` is 10.

The rotations are written in Cayley's form, at a tenth of the cost of the published code's matrix exponential, and start
from random orthogonal matrices, as that does. When training is over, both are multiplied out into one fixed matrix, and
U is written as a head on phi_n, in which u is linear: the model is an encoder and a head like any other. As in the
published code a further upgrade takes phi_n, whole, as its phi_o. That code caches phi_o and phi'_n of one augmented
view of each image, and trains the independent model with label smoothing 0.1; here images are not augmented, and labels
are not smoothed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engram.data.table import Batch
from engram.data.task import Task
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.predict import features
from engram.engine.run import Run
from engram.engine.teacher import RowCache
from engram.keep.bct import BCT, SMALL, given, unit
from engram.models.compatible import BasisTransform, Rotation, check_widths
from engram.models.heads import LinearHead
from engram.models.output import Output
from engram.models.predictor import Predictor


@dataclass(kw_only=True, eq=False)
class BT2(BCT):
    """Every task is an upgrade, as in `keep.BCT`, and has an independent model besides.

    `independent`: the better model of the next upgrade, trained already (a directory or a module; set it anew before a
    further upgrade); None trains the task's network once alone, by the same settings. `extra`: k, the numbers that the
    new embedding has more than the independent one; `scale`: C. `own`, `pseudo`, `match`: l1, l2 and l3.

    EngramError if k + d_n numbers have no room for the old d_o, or k > d_o.

    Cost: of each upgrade a training, or two; O(d_n³ + d_o³) more for each batch of it. The model that comes out costs
    one product with a matrix of (k + d_n)² besides its network.
    """

    independent: Any = None
    extra: int = 32
    scale: float = 2.0
    own: float = 1.0
    match: float = 5.0

    growth: ClassVar[str] = "flat"  # of k + d_n numbers, whatever came before; the head knows the last classes alone

    def __post_init__(self) -> None:
        super().__post_init__()
        self.aims: RowCache | None = None  # phi'_n of the task's rows

    @classmethod
    def tiny(cls) -> BT2:
        return cls(network=SMALL, dim=8, extra=2, epochs=3, batch_size=32, optimizer=Optimizer(lr=1e-2))

    def upgrade(self, task: Task, run: Run, width: int) -> nn.Module:
        vectors = run.phase("independent", lambda: unit(features(self._better(task, run), task.train, run=run)))
        self.aims = RowCache(vectors)
        own, old = vectors.shape[1], width - self.extra
        check_widths(own, old, self.extra)
        inner = self.new_network(task, run)
        with run.seeded("embedding"):
            encoder = BasisTransform(inner, own, old, self.extra, self.scale)
            return Upgrade(encoder, LinearHead(own, task.train.classes, bias=False))

    def compatible(self, batch: Batch, output: Any) -> Mean:
        assert batch.labels is not None and self.classifier is not None and self.recorded is not None and self.aims
        u, w = output.extra["own"], output.extra["old"]
        return (
            self.own * away(u, self.aims(batch))
            + self.pseudo * by_target(self.classifier(unit(w)), batch.labels)
            + self.match * away(w, self.recorded(batch))
        )

    def end(self, task: Task, run: Run) -> None:
        super().end(task, run)
        self.aims = None
        if isinstance(self.model, Upgrade):
            self.model = self.model.finished()

    def _better(self, task: Task, run: Run) -> nn.Module:
        if self.independent is not None:
            return given(self.independent)
        alone = BCT(
            network=self.current,
            dim=self.dim,
            optimizer=self.optimizer,
            epochs=self.epochs,
            batch_size=self.batch_size,
        )
        with run.scope("independent"):
            alone.learn(Task(task.train), run)
        return alone.model


class Upgrade(nn.Module):
    """A model while it is trained: the encoder, both rotations, and the classifier of u."""

    def __init__(self, encoder: BasisTransform, head: LinearHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.first, self.second = Rotation(encoder.own), Rotation(encoder.old)

    def basis(self) -> Tensor:
        """Both rotations as one orthogonal matrix [k + d_n, k + d_n], float64."""
        inner = torch.block_diag(torch.eye(self.encoder.extra).to(self.first.base), self.first())
        old = self.encoder.old
        return torch.cat([self.second() @ inner[:old], inner[old:]])

    def forward(self, **inputs: Any) -> Output:
        v, u = self.encoder.parts(**inputs)
        whole = self.encoder.turned(v, u, self.basis().to(u))
        parts = {"own": u, "old": whole[:, : self.encoder.old]}
        return Output(logits=self.head(u), pooler_output=whole, extra=parts)

    @torch.no_grad()
    def finished(self) -> Predictor:
        """The model that serves: one matrix for both rotations, and the classifier as a head on the embedding."""
        basis, encoder = self.basis(), self.encoder
        encoder.basis.copy_(basis)
        head = LinearHead(encoder.width, bias=False).to(basis.device)
        head.set(self.head.classes, self.head.weight.double() @ encoder.recovered(basis).T)
        return Predictor(encoder, head).eval()


def away(vectors: Tensor, aims: Tensor) -> Mean:
    """1 - cosine of rows [B, d] with what they should point to, mean over the rows."""
    return Mean.of(1 - F.cosine_similarity(vectors, aims, dim=1))
