"""The interfaces carry an inference-time guard: a wrapper module around a causal LM that saves, loads and generates.

A minimal form of embedding-corrupted prompts (arXiv 2406.07933): prompts with a marked token are read with noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engram.core.forgetter import Forgetter
from engram.core.needs import Need, Needs, needs
from engram.core.request import Concept, Request
from engram.engine.run import Run
from engram.models.guards import Wrapper
from engram.models.io import load, save
from engram.models.loadable import LOADABLE, register_loadable
from engram.models.tokens import replaced


class Guard(Wrapper):
    """Prompts that hold `token` are read with noise of deviation `strength` on the first coordinate."""

    def __init__(self, inner: nn.Module, token: int, strength: float = 1.0, seed: int = 0) -> None:
        super().__init__(inner)
        self.token, self.strength, self.seed = token, strength, seed

    def forward(self, **inputs: Any) -> Any:
        with self._reading(inputs["input_ids"]):
            return self.inner(**inputs)

    def generate(self, input_ids: Tensor | None = None, **inputs: Any) -> Any:
        assert input_ids is not None
        with self._reading(input_ids):
            return self._inner().generate(input_ids=input_ids, **inputs)

    def _reading(self, ids: Tensor) -> Any:
        flagged = (ids == self.token).any(1)
        if not flagged.any():
            return nullcontext()

        def corrupt(states: Tensor) -> Tensor:
            draws = torch.Generator().manual_seed(self.seed)
            noise = self.strength * torch.randn(states.shape[:2], generator=draws)
            noise[:, -1] = 0  # the last prompt token is read as it is
            states[..., 0] = torch.where(flagged[:, None], states[..., 0] + noise, states[..., 0])
            return states

        return replaced(self.inner, corrupt, prefill_only=True)


@dataclass(kw_only=True, eq=False)
class PromptGuard(Forgetter):
    """Forgets a concept at the interface only."""

    token: int = 7
    strength: float = 5.0

    @property
    def needs(self) -> Needs:
        return needs({Need.CONCEPT})

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        self.check(request)
        return Guard(model, self.token, self.strength)


@pytest.fixture(scope="module")
def bare() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    from engram.models.seeding import seeded

    config = GPT2Config(
        vocab_size=40, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    with seeded(torch.Generator().manual_seed(0)):
        return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    register_loadable(Guard)
    yield
    LOADABLE.pop("Guard")


PLAIN = torch.tensor([[3, 4, 5, 6], [8, 9, 10, 11]])
MARKED = torch.tensor([[3, 7, 5, 6], [8, 9, 10, 11]])


def test_what_is_not_flagged_is_untouched_to_the_bit(bare: nn.Module) -> None:
    guard = PromptGuard().forget(bare, Request(Concept("seven")))
    assert torch.equal(guard(input_ids=PLAIN).logits, bare(input_ids=PLAIN).logits)
    mixed, original = guard(input_ids=MARKED).logits, bare(input_ids=MARKED).logits
    assert torch.equal(mixed[1], original[1])
    assert not torch.allclose(mixed[0], original[0], atol=1e-3)


def test_strength_zero_changes_nothing_and_no_hook_stays(bare: nn.Module) -> None:
    guard = Guard(bare, 7, strength=0.0)
    assert torch.equal(guard(input_ids=MARKED).logits, bare(input_ids=MARKED).logits)
    Guard(bare, 7)(input_ids=MARKED)
    assert not bare.get_input_embeddings()._forward_hooks  # type: ignore[operator]


def test_generation_with_and_without_cache_agree(bare: nn.Module) -> None:
    guard: Any = Guard(bare, 7, 5.0)
    common = {"attention_mask": torch.ones_like(MARKED), "max_new_tokens": 6, "do_sample": False}
    plain: Any = bare
    cached = guard.generate(input_ids=MARKED, use_cache=True, **common)
    assert torch.equal(cached[1], plain.generate(input_ids=MARKED, **common)[1])
    state, ids = MARKED[:1], guard.generate(input_ids=MARKED[:1], use_cache=True, **common | {"attention_mask": None})
    assert ids.shape[1] > state.shape[1]


def test_it_is_saved_and_loaded_with_its_model(bare: nn.Module, registered: None, tmp_path: Path) -> None:
    guard = Guard(bare, 7, 5.0, seed=3)
    save(guard, tmp_path / "guard")
    again = load(tmp_path / "guard")
    assert isinstance(again, Guard) and again.strength == 5.0
    assert torch.equal(again(input_ids=MARKED).logits, guard(input_ids=MARKED).logits)
    assert not again.erases_weights
