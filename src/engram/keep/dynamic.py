"""Dynamic: each task's network starts from that earlier backbone in whose features its own rows lie best.

Bornschein et al.: NEVIS'22, 2022, arXiv 2211.11747, dynamic fine-tuning (FT-d); see `keep.per_task`. For every earlier
network and one fresh one:

1. The frozen backbone gives features of up to 10,000 training and 5,000 dev rows. Batch norms are in training mode, as
   in published code, where those of a fresh network would give no numbers otherwise; so a row's features depend on the
   rows of its batch (batches of about equal size, in the order of the table).
2. Dev rows are told by their 5 nearest training rows (Euclidean, each one vote; of several labels, the mean).
3. The score is the accuracy, or of several labels the mean average precision.

The highest score wins; among equals an earlier network goes before a later one, and the fresh one comes last. In
published code the fresh state is no member of the list of trained states: where it wins, the search goes on to the best
trained one, and a task starts from scratch only when there is none. Here it is a candidate like the others (`scratch`),
so a task may start afresh although there are earlier networks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engram.data.table import Table
from engram.engine.cost import flops_of
from engram.engine.predict import error_of_scores, evaluating
from engram.engine.run import Run
from engram.keep.per_task import Job, PerTask
from engram.models.norms import batch_norms
from engram.models.predictor import Predictor
from engram.stats.knn import nearest, vote

BATCH = 256


@dataclass(kw_only=True, eq=False)
class Dynamic(PerTask):
    """`neighbours`: how many vote. `most_train`, `most_dev`: the rows that are embedded, at most. `scratch`: may a
    fresh backbone win over the earlier ones? Others are those of `PerTask`.

    Cost: as Independent, and for each candidate a forward pass over n + m rows and n m d for their distances, which the
    account has as `choosing`.
    """

    neighbours: int = 5
    most_train: int = 10_000
    most_dev: int = 5_000
    scratch: bool = True

    @classmethod
    def tiny(cls) -> Dynamic:
        small = {"name": "MLP", "hidden": [16]}
        return cls(network=small, epochs=2, batch_size=16, trials=2, lr=(1e-2, 1e-1), validate_every=2, most_train=40)

    def parent(self, job: Job, fresh: Predictor, run: Run) -> tuple[int | None, tuple[float, ...]]:
        readers = self.readers(job)
        if not readers:
            return None, ()
        train, dev = _some(job.train, self.most_train, run), _some(job.dev, self.most_dev, run)
        scores: list[float] = []

        def compare() -> None:
            backbones = [self.experts.expert(k).encoder for k in readers] + [fresh.encoder]
            scores.extend(self.score(part, train, dev, job, run) for part in backbones)

        run.cost.flops += flops_of(compare)
        return self.best(readers, scores), tuple(scores)

    def best(self, readers: list[int], scores: list[float]) -> int | None:
        """The network of the highest score, None for the fresh one, whose score is the last."""
        eligible = scores if self.scratch else scores[:-1]
        place = max(range(len(eligible)), key=lambda k: eligible[k])
        return readers[place] if place < len(readers) else None

    def score(self, encoder: nn.Module, train: Table, dev: Table, job: Job, run: Run) -> float:
        """Accuracy, or mean average precision, of the neighbours' vote on dev rows in the backbone's features."""
        bank, asked = embedded(encoder, train, run), embedded(encoder, dev, run)
        _, near = nearest(asked, bank, min(self.neighbours, len(bank)), metric="l2")
        labels = train.labels
        assert labels is not None
        if job.several:
            return 1 - error_of_scores(labels[near].nanmean(1).nan_to_num(), dev, job.classes)
        places = torch.searchsorted(torch.tensor(job.classes), labels)[near]
        return 1 - error_of_scores(vote(places, torch.ones(near.shape), len(job.classes)), dev, job.classes)


def embedded(encoder: nn.Module, table: Table, run: Run) -> Tensor:
    """Features [n, d] of a frozen backbone, whose batch norms take the statistics of each batch; it stays as it is."""
    twin = copy.deepcopy(encoder).to(run.device)
    with evaluating(twin):
        for norm in batch_norms(twin) if len(table) > 1 else ():
            norm.train()
        pieces = torch.arange(len(table)).tensor_split(-(-len(table) // BATCH))
        batches = (table.batch(rows).to(run.device) for rows in pieces)
        found = [twin(**batch.inputs).pooler_output.flatten(1).float().cpu() for batch in batches]
    run.cost.rows += len(table)
    return torch.cat(found)


def _some(table: Table, most: int, run: Run) -> Table:
    if len(table) <= most:
        return table
    return table.take(torch.randperm(len(table), generator=run.generator("embedded", most))[:most].sort().values)
