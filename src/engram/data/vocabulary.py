"""A tokenizer made from texts: for language models that are trained from nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engram.environment import require

END, PAD = "<|end|>", "<|pad|>"


def byte_pairs(texts: Iterable[str], size: int = 2048, longest: int = 256) -> Any:
    """A byte-level BPE tokenizer of `size` tokens for texts of at most `longest` tokens, as `transformers` has them:
    it saves, loads and knows every character. Equal texts give equal tokenizers. Cost: a pass over the characters."""
    tokenizers = require("tokenizers", "language")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return require("transformers").PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=END, pad_token=PAD, model_max_length=longest
    )
