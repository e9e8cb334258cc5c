"""A small GPT-2 for generated worlds, and its training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from engram.data.table import Batch
from engram.data.worlds import Words
from engram.engine.fit import fit
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.environment import require
from engram.models.seeding import seeded


def untrained(words: Words, positions: int, run: Run, *, width: int, heads: int, spread: float) -> nn.Module:
    """Two layers over these words. `spread`: the standard deviation of its first weights; at GPT-2's own 0.02 so narrow
    a network often stays on a plateau."""
    transformers = require("transformers")
    config = transformers.GPT2Config(
        vocab_size=len(words),
        n_positions=positions,
        n_embd=width,
        n_layer=2,
        n_head=heads,
        initializer_range=spread,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=words.eos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    with seeded(run.generator("weights")):
        return transformers.GPT2LMHeadModel(config)


def trained(
    model: nn.Module, batches: Callable[[int], Iterable[Any]], run: Run, *, lr: float, epochs: int, steps: int = 1
) -> nn.Module:
    """The model itself after so many epochs of batches, or lists of batches whose losses are added; linear decay."""
    plan = Optimizer("adamw", lr=lr, schedule="linear", warmup=0.05, clip=1.0)
    fit(lambda batch: loss(model, batch), batches, model=model, optimizer=plan, epochs=epochs, steps=steps, run=run)
    return model.eval()


def loss(model: Any, batch: Batch | list[Batch]) -> Mean:
    """The usual loss; of several batches, its sum."""
    if isinstance(batch, list):
        return Mean(tuple(term for part in batch for term in loss(model, part).terms))
    assert batch.labels is not None
    return by_target(model(**batch.inputs).logits, batch.labels)
