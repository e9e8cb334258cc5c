"""Tiny models and generators for the tests of this floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from engram.models import MLP, LinearHead, Predictor, seeded


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def make() -> Callable[..., Any]:
    """make(cls, *args, seed=0, **kwargs): an instance with initial weights of its own seed."""

    def made(cls: Callable[..., Any], *args: Any, seed: int = 0, **kwargs: Any) -> Any:
        with seeded(generator(seed)):
            return cls(*args, **kwargs)

    return made


@pytest.fixture
def predictor(make: Callable[..., Any]) -> Predictor:
    """Classes 4 and 1 of 6 columns on 5 numbers a row."""
    return make(lambda: Predictor(MLP(5, hidden=(8,)), LinearHead(8, classes=(4, 1), classes_total=6)))


@pytest.fixture
def tiny_vit(make: Callable[..., Any]) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=3,
    )  # fmt: skip
    return make(ViTForImageClassification, config).eval()


@pytest.fixture
def tiny_gpt(make: Callable[..., Any]) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return make(GPT2LMHeadModel, config).eval()
