"""The smallest language world of the experiments: invented capitals, learnt by a GPT-2 of 16,000 weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engram.data.table import IGNORED, Batch, Table
from engram.engine.fit import fit
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.environment import require
from engram.models.seeding import seeded
from engram.stats.seeds import generator

STOP, START = 1, 10  # token ids: the end of sequence, and the first of the names
WRONG = 5


def facts(n: int = 40, seed: int = 0) -> Table:
    """n facts `the capital of X is Y`, one token per name, an end of sequence behind; [n, 7] tokens. The columns
    `perturbed_ids` and `perturbed_labels` [n, 5, 7] hold the capitals of other places for an answer."""
    names, draws = torch.arange(n), generator("facts", seed)
    capitals = START + n + torch.randperm(n, generator=draws)
    shift = 1 + torch.stack([torch.randperm(n - 1, generator=draws)[:WRONG] for _ in range(n)])
    ids, labels = _written(names, capitals)
    wrong = [_written(names, capitals[(names + step) % n]) for step in shift.T]
    extra = {
        "perturbed_ids": torch.stack([ids for ids, _ in wrong], 1),
        "perturbed_labels": torch.stack([labels for _, labels in wrong], 1),
    }
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Table(inputs, labels, tuple(f"fact {name}" for name in names.tolist()), extra)


def _written(names: Tensor, capitals: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids and labels [n, 7]."""
    words = torch.tensor([3, 4, 5]).expand(len(names), -1)
    stop = torch.full_like(capitals, STOP)
    ids = torch.cat([words, torch.stack([START + names, torch.full_like(names, 6), capitals, stop], 1)], 1)
    return ids, torch.where(torch.arange(7) >= 5, ids, IGNORED)


@dataclass(frozen=True)
class SmallGPT2:
    """Trains a one-layer GPT-2, 32 wide, on facts of the world with so many, or on other rows of at most `positions`
    tokens; usable as a recipe. About 1 s."""

    world: int = 40
    epochs: int = 150
    positions: int = 8

    def __call__(self, table: Table, seed: int, run: Run | None = None) -> nn.Module:
        run = (run or Run()).with_seed(seed)
        with seeded(run.generator("weights")):
            model = self.untrained()

        def step(batch: Batch) -> Mean:
            assert batch.labels is not None
            return by_target(model(**batch.inputs).logits, batch.labels)

        plan = Optimizer("adamw", lr=5e-3, schedule="linear")
        fit(
            step, lambda e: table.batches(len(table), epoch=e), model=model, optimizer=plan, epochs=self.epochs, run=run
        )
        return model.eval()

    def untrained(self) -> nn.Module:
        """The network, its weights drawn from the global generator."""
        transformers = require("transformers")
        config = transformers.GPT2Config(
            vocab_size=START + 2 * self.world,
            n_positions=self.positions,
            n_embd=32,
            n_layer=1,
            n_head=2,
            initializer_range=0.1,  # at GPT-2's own 0.02 so narrow a network often stays on a plateau
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=STOP,
            pad_token_id=2,
        )
        return transformers.GPT2LMHeadModel(config)


def recall(model: nn.Module, table: Table) -> float:
    """Share of facts whose capital is the likeliest next token."""

    def right(output: object, batch: Batch) -> Tensor:
        assert batch.labels is not None
        return output.logits[:, 4].argmax(1) == batch.labels[:, 5]  # type: ignore[attr-defined]

    return float(predict(model, table, right).double().mean())
