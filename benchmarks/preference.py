"""NPO against the loop that one would write by hand, which also computes the reference once."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ratio import Ratio, speedup
from engram.core.request import Request
from engram.data.qa import pairs, read_pairs, tokenizer_for
from engram.data.table import IGNORED, Table
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.forget.npo import NPO
from engram.models.build import build

BATCH, EPOCHS, BETA = 8, 4, 0.1


def ratios() -> Iterator[Ratio]:
    """Tokens per second of NPO without a retain term, GPT-2 of 128 wide and two layers."""
    rows = read_pairs("facts:60")
    table = pairs(rows, tokenizer_for({"vocabulary": 512, "longest": 64}, rows))
    spec = {"name": "GPT2", "vocab_size": 512, "n_positions": 64, "n_embd": 128, "n_layer": 2, "n_head": 4}
    model = build(spec, inputs=table.shapes, generator=torch.Generator().manual_seed(0))
    request = Request.of_records(table, table.ids[:120])
    method = NPO(beta=BETA, retain_weight=0.0, optimizer=Optimizer("adamw", lr=1e-4), epochs=EPOCHS, batch_size=BATCH)
    yield speedup(
        "NPO, 120 pairs, 4 epochs, tokens per second against a bare loop",
        lambda: method.forget(model, request, Run()),
        lambda: by_hand(model, table.take(range(120))),
        least=0.95,
    )


def by_hand(model: nn.Module, table: Table) -> nn.Module:
    """The reference once, then batches in random order, cut to their longest row."""
    new = copy.deepcopy(model)
    ids, mask, labels = table.inputs["input_ids"], table.inputs["attention_mask"], table.labels
    assert labels is not None
    with torch.no_grad():
        reference = torch.cat(
            [_logp(model, ids[k : k + 256], mask[k : k + 256], labels[k : k + 256]) for k in range(0, len(ids), 256)]
        )
    optimizer = torch.optim.AdamW(new.parameters(), 1e-4, weight_decay=0.0)
    draws = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(ids), generator=draws).split(BATCH):
            width = int(mask[rows].sum(1).max())
            ratio = _logp(new, ids[rows, :width], mask[rows, :width], labels[rows, :width]) - reference[rows]
            loss = -(2 / BETA) * F.logsigmoid(-BETA * ratio).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return new


def _logp(model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED)
    return -losses.sum(1)
