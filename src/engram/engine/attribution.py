"""Data attribution: how far every training row moves every output of a model on other rows.

Datamodels (Ilyas, Park, Engstrom, Leclerc, Madry: Predicting Predictions from Training Data. ICML 2022, arXiv
2202.00622) regress outputs on membership: with z [n] saying which rows a model was trained on,

    f_c(x; z) ~ b_c(x) + sum over i of z_i beta_ic(x),

fitted over many models trained on random subsets. The original fits by the lasso; ridge regression has a closed form,

    beta_R = (Zᵀ (Z Zᵀ + gamma I)⁻¹)_R F,    Z [K, n] with centred columns, F [K, q C],

of which any rows R cost a [R, K] matrix and one product: scores that nobody asks for are never formed.

TRAK (Park, Georgiev, Ilyas, Leclerc, Madry: Attributing Model Behavior at Scale. ICML 2023, arXiv 2303.14186)
linearises a trained model instead: with phi the gradient of an output, projected at random to a few dimensions,

    score_ic(x) = phi_c(x)ᵀ (Phiᵀ Phi)⁻¹ phi_i (1 - p_i),

where row i counts by the gradient of its margin ln p/(1 - p), and Phi holds these of all training rows. For numbers
every output counts, with its residual in the place of 1 - p: the Gauss-Newton form of influence functions.

Adding a constant to all logits of a row changes nothing, so logits of classes are centred over the live classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from engram.data.table import MISSING, Batch, Table, Target
from engram.engine.many import fit_many
from engram.engine.persample import CHUNK, RowLoss, gradients
from engram.engine.predict import evaluating, predict
from engram.engine.recipe import Recipe, Trainer
from engram.engine.run import Run
from engram.errors import EngramError
from engram.stats.scores import margin
from engram.stats.seeds import derive, generator

BLOCK = 128  # models trained before they are asked and let go
ENTRIES = 2**22  # of a product, formed at once
RANK = 1e-10  # eigenvalues of the Gram matrix below this share of the largest count as 0


def datamodels(
    recipe: Trainer,
    table: Table,
    queries: Table,
    *,
    models: int = 600,
    keep: float = 0.9,
    ridge: float = 0.1,
    rows: Tensor | Sequence[int] | None = None,
    run: Run | None = None,
) -> Tensor:
    """Scores [r, q, C] float32: how much having row i of `table` among the training rows raises each output on each
    query; `rows`: the numbers of the rows that are asked for, all n if left out.

    `keep`: the chance of every row to be in a subset. It should be near the share that will be left: at half of the
    data a row matters more. `ridge`: gamma, beside sums over the `models`. Outputs: centred logits, or values where
    labels are numbers. EngramError for other labels and for no models. Cost: `models` trainings, then r K q C.
    """
    return subset_outputs(recipe, table, queries, models=models, keep=keep, run=run).scores(rows, ridge)


@dataclass(frozen=True)
class SubsetOutputs:
    """What K models trained on random subsets of n rows say of q queries: the raw material of datamodels.

    kept [K, n] bool; outputs [K, q, C], centred logits (0 in dead columns) or values. It is far smaller than the scores
    [n, q, C] of all rows, and gives those of any rows.
    """

    kept: Tensor
    outputs: Tensor

    def scores(self, rows: Tensor | Sequence[int] | None = None, ridge: float = 0.1) -> Tensor:
        """The datamodels of some rows, [r, q, C] float32; of all rows if left out."""
        return self._combined(row_weights(self.kept, rows, ridge))

    def shift(self, rows: Tensor | Sequence[int] | None = None, ridge: float = 0.1) -> Tensor:
        """The sum of the datamodels of some rows, [q, C] float32: what the outputs lose when these rows go."""
        return self._combined(row_weights(self.kept, rows, ridge).sum(0, keepdim=True))[0]

    def _combined(self, weights: Tensor) -> Tensor:
        flat = self.outputs.flatten(1).split(max(1, ENTRIES // len(self.outputs)), 1)
        parts = [(weights @ part.double()).float() for part in flat]
        return torch.cat(parts, 1).unflatten(1, self.outputs.shape[1:]) if parts else weights.new_zeros(0)


def row_weights(kept: Tensor, rows: Tensor | Sequence[int] | None = None, ridge: float = 0.1) -> Tensor:
    """Ridge regression on memberships, as weights of the K models: [r, K] float64, of which the product with any
    outputs [K, m] gives the slopes [r, m] of the rows asked for (intercept free).

    kept: [K, n] bool. EngramError unless ridge > 0. Solved on the smaller side: O(K n min(K, n)).
    """
    if not ridge > 0:
        raise EngramError(f"ridge is {ridge}; datamodels need a positive penalty")
    z = kept.double()
    z = z - z.mean(0)
    chosen = torch.arange(z.shape[1]) if rows is None else torch.as_tensor(rows).long()
    if len(z) <= z.shape[1]:
        gram = z @ z.T + ridge * torch.eye(len(z), dtype=z.dtype)
        return torch.linalg.solve(gram, z[:, chosen]).T
    gram = z.T @ z + ridge * torch.eye(z.shape[1], dtype=z.dtype)
    picked = torch.eye(z.shape[1], dtype=z.dtype)[:, chosen]
    return (z @ torch.linalg.solve(gram, picked)).T


def subset_outputs(
    recipe: Trainer, table: Table, queries: Table, *, models: int = 600, keep: float = 0.9, run: Run | None = None
) -> SubsetOutputs:
    """Train models on random subsets of the table and ask them about the queries; see `datamodels`.

    Models are let go block by block; a resumed run goes on from the last finished block.
    """
    run = run or Run()
    kind = _kind(table)
    if models < 1 or not 0 < keep < 1:
        raise EngramError(f"datamodels want one model or more and a share in (0, 1), not {models} and {keep}")
    recipe = with_classes(recipe, table.classes)
    with run.scope("datamodels"):
        draws = run.generator("subsets")
        kept = torch.rand(models, len(table), generator=draws) < keep
        empty = ~kept.any(1)
        kept[empty, torch.randint(len(table), (int(empty.sum()),), generator=draws)] = True
        seeds = [run.number("model", k) for k in range(models)]
        found = []
        for first in range(0, models, BLOCK):
            part = kept[first : first + BLOCK], seeds[first : first + BLOCK]
            ask = partial(_asked, recipe, table, *part, queries.unlabelled(), kind, run)
            found.append(run.phase(f"block {first // BLOCK}", ask))
    return SubsetOutputs(kept, torch.cat(found))


def _asked(
    recipe: Trainer, table: Table, kept: Tensor, seeds: list[int], queries: Table, kind: Target, run: Run
) -> Tensor:
    models = fit_many(recipe, table, kept, seeds, run)
    return torch.stack([comparable(predict(model, queries, run=run), kind) for model in models])


def with_classes(recipe: Trainer, classes: Sequence[int]) -> Trainer:
    """The recipe, with columns for these classes whatever the rows that it is given, unless it names its own."""
    open_ = isinstance(recipe, Recipe) and not recipe.classes
    return replace(recipe, classes=tuple(classes)) if open_ else recipe  # type: ignore[type-var]


def comparable(outputs: Tensor, kind: Target) -> Tensor:
    """Outputs that can be subtracted from those of another model: logits centred, values as they are."""
    return centred(outputs) if kind == Target.CLASSES else outputs


def centred(logits: Tensor) -> Tensor:
    """Logits [..., C] less their mean over the live columns; 0 in the columns that are not (-inf)."""
    live = torch.isfinite(logits)
    mean = torch.where(live, logits, 0.0).sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(live, logits - mean, 0.0)


def trak(
    checkpoints: Sequence[nn.Module],
    table: Table,
    queries: Table,
    *,
    width: int = 512,
    rows: Tensor | Sequence[int] | None = None,
    run: Run | None = None,
) -> Tensor:
    """Scores [r, q, C] float32 as `datamodels` gives them, from trained models instead of many trainings: mean over the
    checkpoints, which were trained on all rows of `table`.

    `width`: dimensions after the projection; at least as many as there are trainable parameters means no projection.
    EngramError for no checkpoints and rows without labels. Cost: a per-row gradient of each row (numbers: of each
    output), C of each query. Memory: about 4 * 32 * P numbers while gradients of 32 rows are formed and projected, then
    four times n width for numbers of 8 bytes (times the outputs, where labels are numbers), and r q C of 4.
    """
    return torch.stack([one.scores(queries, rows) for one in _tracers(checkpoints, table, width, run)]).mean(0)


def trak_shift(
    checkpoints: Sequence[nn.Module],
    table: Table,
    queries: Table,
    *,
    width: int = 512,
    rows: Tensor | Sequence[int] | None = None,
    run: Run | None = None,
) -> Tensor:
    """The sum of the scores of some rows, [q, C] float32, without forming them."""
    return torch.stack([one.shift(queries, rows) for one in _tracers(checkpoints, table, width, run)]).mean(0)


def _tracers(checkpoints: Sequence[nn.Module], table: Table, width: int, run: Run | None) -> Iterator[_Tracer]:
    if not len(checkpoints):
        raise EngramError("TRAK attributes to trained models; give one checkpoint or more")
    run = run or Run()
    seed = run.number("projection")
    return (_Tracer(model, table, width, derive(seed, m), run) for m, model in enumerate(checkpoints))


class Projection:
    """[P] to `width` dimensions by a count sketch (Charikar, Chen, Farach-Colton 2002): every coordinate is added, with
    a random sign, to one place drawn at random. Inner products are kept in the mean, off by about |a| |b| /
    sqrt(width), as they are by a dense matrix of signs, at P operations a row instead of P * width. The identity if
    `width` is at least P.

    A function of the seed; memory 12 P bytes.
    """

    def __init__(self, size: int, width: int, seed: int) -> None:
        self.size, self.identity, self.width = size, width >= size, min(width, size)
        draws = generator(seed, "sketch")
        self.places = torch.randint(self.width, (size,), generator=draws)
        self.signs = torch.randint(2, (size,), generator=draws).float() * 2 - 1

    def __call__(self, rows: Tensor) -> Tensor:
        """[B, P] to [B, width]."""
        if self.identity:
            return rows
        found = rows.new_zeros(len(rows), self.width)
        return found.index_add_(1, self.places.to(rows.device), rows * self.signs.to(rows))


class _Tracer:
    """One checkpoint: the projected gradients of its training rows, and the inverse of their Gram matrix."""

    def __init__(self, model: nn.Module, table: Table, width: int, seed: int, run: Run) -> None:
        self.model, self.run, self.kind = model.to(run.device), run, _kind(table)
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.project = Projection(size, width, seed)
        self.columns = torch.isfinite(predict(model, table.take([0]), run=run)[0])
        parts = [self._of_training(batch) for batch in self._batches(table)]
        phi = torch.cat([features for features, _ in parts])  # [n, O, k]
        self.pulls = torch.einsum("nok,no->nk", phi, torch.cat([weights for _, weights in parts]))
        flat = phi.flatten(0, 1)
        self.inverse = torch.linalg.pinv(flat.T @ flat, rtol=RANK, hermitian=True)

    def scores(self, queries: Table, rows: Tensor | Sequence[int] | None) -> Tensor:
        """[r, q, C] float32."""
        pulls = self.pulls if rows is None else self.pulls[torch.as_tensor(rows).long()]
        return self._along(queries, pulls @ self.inverse)

    def shift(self, queries: Table, rows: Tensor | Sequence[int] | None) -> Tensor:
        """[q, C] float32."""
        pulls = self.pulls if rows is None else self.pulls[torch.as_tensor(rows).long()]
        return self._along(queries, pulls.sum(0, keepdim=True) @ self.inverse)[0]

    def _along(self, queries: Table, directions: Tensor) -> Tensor:
        """How the outputs on the queries change along projected directions [r, k]: [r, q, C]."""
        found = [
            torch.einsum("qck,rk->rqc", self._of_query(batch), directions).float() for batch in self._batches(queries)
        ]
        return torch.cat(found, 1) if found else torch.zeros(len(directions), 0, len(self.columns))

    def _batches(self, table: Table) -> Iterator[Batch]:
        self.run.cost.rows += len(table)
        return (batch.to(self.run.device) for batch in table.batches(CHUNK, shuffle=False))

    def _of_training(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features [B, O, k] of what a row's loss depends on, and the weights [B, O] of its pull."""
        outputs = self._outputs(batch)
        assert batch.labels is not None
        if self.kind == Target.NUMBERS:
            return self._of_query(batch), batch.labels.cpu().double() - outputs
        by_margin = self._gradients(batch, lambda logits, labels: margin(logits, _labels(labels)))
        return by_margin[:, None], torch.sigmoid(-margin(outputs, batch.labels.cpu()))[:, None]

    def _of_query(self, batch: Batch) -> Tensor:
        """Features [B, C, k] of every output."""
        blank = torch.zeros(len(batch), self.project.width, dtype=torch.float64)
        found = [self._gradients(batch, _output(c)) if live else blank for c, live in enumerate(self.columns.tolist())]
        features = torch.stack(found, 1)
        if self.kind == Target.CLASSES:
            features[:, self.columns] -= features[:, self.columns].mean(1, keepdim=True)
        return features

    def _gradients(self, batch: Batch, output: RowLoss) -> Tensor:
        with evaluating(self.model):
            found = gradients(self.model, batch, output)
        return self.project(torch.cat([g.flatten(1) for g in found.values()], 1)).double().cpu()

    def _outputs(self, batch: Batch) -> Tensor:
        with evaluating(self.model):
            return self.model(**batch.inputs).logits.double().cpu()


def _labels(labels: Tensor | None) -> Tensor:
    assert labels is not None
    return labels


def _output(c: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    return lambda logits, _: logits[:, c]


def _kind(table: Table) -> Target:
    """Classes or numbers; EngramError for anything else, and for rows without a label."""
    if table.labels is None or table.target not in (Target.CLASSES, Target.NUMBERS) or not len(table):
        raise EngramError(f"attribution wants rows with class labels or numbers, and the target here is {table.target}")
    bare = table.labels.isnan().any() if table.target == Target.NUMBERS else (table.labels == MISSING).any()
    if bool(bare):
        raise EngramError("attribution wants a label for every row of the table; leave out the rows without one")
    return table.target
