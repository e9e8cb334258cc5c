"""The interfaces carry forgetting in a causal language model: facts of one token, learnt, forgotten, kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from engram.core.request import Request
from engram.data.table import IGNORED, Table, Target
from engram.engine.fit import fit
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.forget.gradient_ascent import GradientAscent
from engram.forget.npo import NPO
from engram.models.seeding import seeded

FACTS, GONE = 40, 10


@pytest.fixture(scope="module")
def facts() -> Table:
    """`the capital of X is` -> Y: 5 prompt tokens and an answer, one token per name."""
    x = torch.arange(FACTS)
    draws = torch.Generator().manual_seed(0)
    answers = 10 + FACTS + torch.randperm(FACTS, generator=draws)
    prompt = torch.stack(
        [torch.full_like(x, 3), torch.full_like(x, 4), torch.full_like(x, 5), 10 + x, torch.full_like(x, 6)], 1
    )
    ids = torch.cat([prompt, answers[:, None]], 1)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1] = answers
    return Table({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels)


def train(table: Table) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=10 + 2 * FACTS,
        n_positions=8,
        n_embd=32,
        n_layer=1,
        n_head=2,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with seeded(torch.Generator().manual_seed(1)):
        model = GPT2LMHeadModel(config)

    def step(batch: object) -> Mean:
        return by_target(model(**batch.inputs).logits, batch.labels)  # type: ignore[attr-defined]

    optimizer = Optimizer("adamw", lr=5e-3, schedule="linear")
    fit(step, lambda e: table.batches(len(table), epoch=e), model=model, optimizer=optimizer, epochs=150, run=Run())
    return model.eval()


@pytest.fixture(scope="module")
def model(facts: Table) -> nn.Module:
    return train(facts)


def recall(model: nn.Module, table: Table) -> float:
    """Share of facts whose answer is the likeliest next token."""

    def right(output: object, batch: object) -> Tensor:
        return output.logits[:, -2].argmax(1) == batch.labels[:, -1]  # type: ignore[attr-defined]

    return float(predict(model, table, right).double().mean())


def test_the_target_is_read_off_the_labels(facts: Table) -> None:
    assert facts.target == Target.TOKENS


def test_npo_forgets_what_ascent_ruins(model: nn.Module, facts: Table) -> None:
    gone, kept = facts.take(range(GONE)), facts.take(range(GONE, FACTS))
    assert recall(model, facts) > 0.95
    request = Request.of_records(facts, gone.ids)
    before = copy.deepcopy(model.state_dict())
    common = {"optimizer": Optimizer("adamw", lr=1e-3), "batch_size": GONE}
    ascent = GradientAscent(epochs=40, **common).forget(model, request)  # type: ignore[arg-type]
    gentle = NPO(beta=0.1, epochs=150, retain_ratio=3.0, **common).forget(model, request)  # type: ignore[arg-type]
    assert recall(ascent, kept) < 0.2
    assert recall(gentle, gone) < 0.1
    assert recall(gentle, kept) > 0.9
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
