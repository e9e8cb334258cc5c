"""Continuations: those of one prompt at a time, whatever the batch; a tokenizer without padding; ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engram.engine.generate import generate
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.output import Output
from engram.models.seeding import seeded

WORDS = ["<end>", *(f"w{k}" for k in range(39))]
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w1 w2", "w11 w12 w13"]


def tokenizer_of(**special: str) -> Any:
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, "<end>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def network(kind: str) -> Any:
    common = {"vocab_size": 40, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    with seeded(torch.Generator().manual_seed(3)):
        if kind == "gpt2":
            config = GPT2Config(n_positions=24, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5, **common)
            return GPT2LMHeadModel(config)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(**sizes, initializer_range=0.5, max_position_embeddings=24, **common)
        return LlamaForCausalLM(config)


class Plain(nn.Module):
    """A model without a `generate` of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor) -> Output:
        return Output(logits=self.inner(input_ids=input_ids).logits)


def by_hand(model: Any, tokenizer: Any, prompt: str, length: int) -> str:
    """The likeliest token, again and again, one prompt alone."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(length):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(1)[:, None]], 1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("special", [{"eos_token": "<end>"}, {"pad_token": "<end>"}, {}])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_batch_gives_what_each_prompt_gives_alone(kind: str, special: dict[str, str]) -> None:
    model, tokenizer = network(kind).train(), tokenizer_of(**special)
    before = tokenizer.pad_token
    found = generate(model, tokenizer, PROMPTS, max_new=6)
    assert model.training and tokenizer.pad_token == before
    assert found == [by_hand(model.eval(), tokenizer, prompt, 6) for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, max_new=6, batch_size=2) == found
    assert generate(Plain(model), tokenizer, PROMPTS, max_new=6, batch_size=2) == found
    assert len(set(found)) > 2 and generate(model, tokenizer, [], max_new=6) == []


def test_an_answer_ends_at_its_end_and_before_the_stop() -> None:
    class Counting(nn.Module):
        """After a word comes the next one, after the tenth the end."""

        def forward(self, input_ids: Tensor) -> Output:
            told = torch.where(input_ids >= 10, 0, input_ids + 1)
            return Output(logits=nn.functional.one_hot(told, 40).float())

    tokenizer = tokenizer_of(eos_token="<end>")
    assert generate(Counting(), tokenizer, ["w4", "w8"], max_new=8) == ["w5 w6 w7 w8 w9", "w9"]
    assert generate(Counting(), tokenizer, ["w4", "w8"], max_new=3) == ["w5 w6 w7", "w9"]
    assert generate(Counting(), tokenizer, ["w4", "w8"], max_new=8, stop="w7") == ["w5 w6 ", "w9"]
    assert generate(Counting(), tokenizer, ["w4"], max_new=8, stop=["w9", " w6"]) == ["w5"]


def test_a_model_stops_where_its_own_settings_say_so_too() -> None:
    model, tokenizer = network("gpt2"), tokenizer_of(eos_token="<end>")
    whole = generate(model, tokenizer, ["w1 w2 w3"], max_new=6)[0].split()
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(whole[2])]
    assert generate(model, tokenizer, ["w1 w2 w3"], max_new=6)[0].split() == whole[: whole.index(whole[2])]


@pytest.mark.parametrize("wrap", [False, True])
def test_draws_follow_the_run_and_the_distribution(wrap: bool) -> None:
    model, tokenizer = network("gpt2"), tokenizer_of()
    used = Plain(model) if wrap else model
    some = [generate(used, tokenizer, ["w1 w2"] * 8, max_new=4, greedy=False, run=Run(seed=s)) for s in (0, 0, 1)]
    assert some[0] == some[1] != some[2]
    with torch.no_grad():
        p = model.eval()(input_ids=torch.tensor([tokenizer("w1 w2")["input_ids"]])).logits[0, -1].softmax(0)
    many = generate(used, tokenizer, ["w1 w2"] * 2000, max_new=1, greedy=False, batch_size=2000)
    counts = torch.bincount(torch.tensor(tokenizer.convert_tokens_to_ids(many)), minlength=40) / 2000
    assert float((counts - p).abs().sum()) < 0.25  # 40 cells: about 0.11 for equal distributions


def test_what_cannot_be_answered_is_said() -> None:
    model, tokenizer = network("gpt2"), tokenizer_of()
    with pytest.raises(EngramError, match="has no token to go on from"):
        generate(model, tokenizer, [""], max_new=2)
    with pytest.raises(EngramError, match="do not fit into the model's 24"):
        generate(model, tokenizer, PROMPTS, max_new=19)
    with pytest.raises(EngramError, match="asks for no token"):
        generate(model, tokenizer, PROMPTS, max_new=0)
    assert generate(model, tokenizer_of(bos_token="<end>"), [""], max_new=2)[0]
