"""What a guard of prompts costs those who ask for something else."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.ratio import REPEATS, Act, Ratio, overhead, seconds
from engram.models.guarded_lm import GuardedLM, PromptClassifier
from engram.models.seeding import seeded

NEW, PROMPT = 64, 32


def ratios(width: int = 128, layers: int = 4, words: int = 2048) -> Iterator[Ratio]:
    """Generation behind a guard that flags nothing against the bare model, and the classifier against a millisecond."""
    classifier = PromptClassifier()
    classifier.put(torch.zeros(classifier.places), torch.tensor(-5.0))
    model = _model(width, layers, words)
    guard = GuardedLM(model, classifier, end=(5, 6))
    size, own = (sum(p.numel() for p in m.state_dict().values()) for m in (model, classifier))
    for batch in (1, 8):
        prompt = torch.randint(words, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
        who = f"{batch} prompt(s) not flagged; model / classifier = {size / own:.0f}"
        arms: tuple[Act, Act] = (partial(_told, guard, prompt), partial(_told, model, prompt))
        yield overhead(f"guarded, {NEW} tokens for {who}", *arms, most=1.05, repeats=11)
        judged = partial(guard.flagged, input_ids=prompt)
        yield overhead(f"judging, over {NEW} tokens for {who}", judged, arms[1], most=0.05)
    yield _classified(classifier, words)


def _told(model: Any, prompt: torch.Tensor) -> object:
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, **length)


def _classified(classifier: nn.Module, words: int, calls: int = 200) -> Ratio:
    """CPU milliseconds for a prompt alone."""
    prompt = torch.randint(words, (1, 512), generator=torch.Generator().manual_seed(1))
    there = torch.ones_like(prompt, dtype=torch.bool)
    took = sorted(
        1e3 * seconds(lambda: [classifier(prompt, there) for _ in range(calls)]) / calls for _ in range(REPEATS)
    )
    value = took[REPEATS // 2]
    return Ratio("classifier, a prompt of 512 tokens, over 1 ms", value, took[0], took[-1], "<= 1", value <= 1)


def _model(width: int, layers: int, words: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=words,
        n_positions=128,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    with seeded(torch.Generator().manual_seed(0)):
        return GPT2LMHeadModel(config).eval()
