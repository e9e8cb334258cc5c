"""What language models and classifiers have in common: the log-probability of an answer, other answers, adapters.

A class is an answer of one token: whatever is said here of answers holds for classifiers too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.data.table import IGNORED, Batch, Table, Target
from engram.engine.losses import Mean, per_row
from engram.engine.predict import evaluating, predict
from engram.environment import require
from engram.errors import EngramError

Answers = Sequence[Sequence[int]]


def sequence_logp(logits: Tensor, labels: Tensor, reduce: str) -> Tensor:
    """log p(answer | question) of every row, [B].

    Token labels [B, T] with logits [B, T, V]: the `sum` over the answer's tokens, or their `mean`; class labels [B]
    with logits [B, C]: log p of the class, which is both.
    """
    return -per_row(logits, labels, reduce=reduce)


def answer_logp(model: Any, batch: Batch, reduce: str) -> Tensor:
    """log p(answer | question) of every row of a batch under a model, [B], with its gradient."""
    batch = batch.trimmed()
    assert batch.labels is not None
    return sequence_logp(model(**batch.inputs).logits, batch.labels, reduce)


def summed_logp(output: Any, batch: Batch) -> Tensor:
    """A reader for `engine.predict`: log p(answer | question), sum over the answer's tokens, [B]."""
    assert batch.labels is not None
    return sequence_logp(output.logits, batch.labels, reduce="sum")


def log_probs(output: Any, batch: Batch) -> Tensor:
    """A reader for `engine.predict`: log p of every class [B, C], or of every next token [B, T, V]."""
    return torch.log_softmax(output.logits.float(), -1)


def kl_to(reference: Tensor, logits: Tensor) -> Mean:
    """KL(reference || model), summed over the last axis, mean over all places: rows [B, C], or rows times tokens
    [B, T, V], question and padding included. `reference`: log-probabilities; what it holds impossible counts 0."""
    found = torch.log_softmax(logits.float(), -1)
    possible = ~torch.isneginf(reference)
    terms = torch.where(possible, reference.exp() * (reference - torch.where(possible, found, 0.0)), 0.0)
    return Mean.over(terms.sum(), float(terms[..., 0].numel()))


def live_classes(model: nn.Module, table: Table) -> Tensor:
    """The classes that a classifier can tell, ascending: one forward pass over one row of the table."""
    return torch.isfinite(predict(model, table.take([0]))[0]).nonzero()[:, 0]


def other_answers(table: Table, answers: Answers, draws: torch.Generator) -> Table:
    """The rows with another answer each, drawn from `answers`: the same ids, the same questions.

    An answer is a list of token ids, its end-of-sequence token included; for classes, of one class. A question is
    what stands before the first token that is asked for. Rows become as wide as the longest question with its answer.
    EngramError for no answers, an answer that fits no row, and inputs besides `input_ids` and `attention_mask`.
    """
    if not answers or not all(len(answer) for answer in answers):
        raise EngramError("there is no other answer to draw; give `refusals`, each as a list of token ids")
    chosen = torch.randint(len(answers), (len(table),), generator=draws)
    padded = nn.utils.rnn.pad_sequence([torch.tensor(answer) for answer in answers], batch_first=True)[chosen]
    lengths = torch.tensor([len(answer) for answer in answers])[chosen]
    if table.target == Target.CLASSES and padded.shape[1] == 1:
        return table.with_labels(padded[:, 0])
    if table.target != Target.TOKENS or not {"input_ids"} <= set(table.inputs) <= {"input_ids", "attention_mask"}:
        raise EngramError(f"a row of {sorted(table.inputs)} with {table.target} takes no answer of token ids")
    return _answered(table, padded, lengths)


def questions(labels: Tensor) -> Tensor:
    """How many tokens stand before each row's answer, [n], for token labels [n, T]."""
    asked = labels != IGNORED
    return torch.where(asked.any(1), asked.int().argmax(1), labels.shape[1])


def _answered(table: Table, answers: Tensor, lengths: Tensor) -> Table:
    """Each row's question, then its answer [n, L] of so many tokens [n]."""
    assert table.labels is not None
    begin = questions(table.labels)[:, None]
    end = begin + lengths[:, None]
    places = torch.arange(int(end.max())).expand(len(table), -1)
    inside = (places >= begin) & (places < end)
    told = answers.gather(1, (places - begin).clamp(0, answers.shape[1] - 1))
    columns = {"input_ids": _put(table.inputs["input_ids"], places < begin, inside, told)}
    if "attention_mask" in table.inputs:
        columns["attention_mask"] = _put(table.inputs["attention_mask"], places < begin, inside, torch.ones_like(told))
    return Table(columns, torch.where(inside, told, IGNORED), table.ids)


def _put(old: Tensor, before: Tensor, inside: Tensor, new: Tensor) -> Tensor:
    """The old values [n, T] before the answer, the new ones [n, W] inside of it, 0 behind."""
    width = before.shape[1]
    old = F.pad(old, (0, max(width - old.shape[1], 0)))[:, :width]
    return torch.where(before, old, torch.where(inside, new.to(old.dtype), 0))


def greedy(model: Any, prompt: Tensor, length: int, stop: int | None = None, mask: Tensor | None = None) -> Tensor:
    """The likeliest continuation [B, up to `length`] of prompts [B, T], token by token; after the token `stop`, which
    ends an answer, nothing but it.

    A transformers model generates by itself, with its cache; with any other, a token costs a pass over all before it.
    `mask` [B, T]: 0 where a shorter prompt is filled up, on the left; for models that generate by themselves.
    """
    with evaluating(model):
        if hasattr(model, "generate") and length > 0:
            mask = torch.ones_like(prompt) if mask is None else mask
            ends = {"eos_token_id": stop, "pad_token_id": stop if stop is not None else 0}
            found = model.generate(prompt, attention_mask=mask, max_new_tokens=length, do_sample=False, **ends)
            return found[:, prompt.shape[1] :]
        return _step_by_step(model, prompt, length, stop)


def _step_by_step(model: nn.Module, prompt: Tensor, length: int, stop: int | None) -> Tensor:
    ids, done = prompt, torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    for _ in range(length):
        told = model(input_ids=ids).logits[:, -1].argmax(1)
        if stop is not None:
            told = torch.where(done, stop, told)
            done = done | (told == stop)
        ids = torch.cat([ids, told[:, None]], 1)
        if bool(done.all()):
            break
    return ids[:, prompt.shape[1] :]


# --- adapters


def adapted(model: nn.Module, rank: int) -> nn.Module:
    """The model with LoRA adapters (peft) of this rank, scale 2, on each of its trainable linear layers except a
    language model's output layer; it says the same as before. Its own weights ARE those of `model`.

    Draws from the global generator: call it under `run.seeded`. EngramError without peft or without such a layer.
    """
    peft = require("peft", "language")
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    twin = copy.deepcopy(model, weights)  # the modules anew, the weights shared
    layers = _linear_layers(twin)
    if not layers:
        raise EngramError(f"{type(model).__name__} has no trainable linear layer for an adapter; train without `lora`")
    conv1d = any(type(layer).__name__ == "Conv1D" for layer in layers.values())
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(layers), fan_in_fan_out=conv1d)
    peft.inject_adapter_in_model(config, twin)
    for name, p in model.named_parameters():
        p.requires_grad_(trainable[name])  # peft froze them
    return twin


def adapter_weights(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model's adapters."""
    return [p for name, p in model.named_parameters() if "lora_" in name]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model is what it was without its adapters."""
    layers = _adapters(model)
    for layer in layers.values():
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers.values():
            layer.enable_adapters(True)


def merged(model: nn.Module) -> nn.Module:
    """The model itself, its adapters added to the weights and gone: a plain model again."""
    for name, layer in _adapters(model).items():
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def _adapters(model: nn.Module) -> dict[str, Any]:
    layer = require("peft.tuners.tuners_utils", "language").BaseTunerLayer
    return {name: module for name, module in model.named_modules() if isinstance(module, layer)}


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that are trained, by name; transformers' Conv1D is one."""
    find = getattr(model, "get_output_embeddings", None)
    last = find() if callable(find) else None
    kinds = {"Linear", "Conv1D"}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in kinds and module is not last and module.weight.requires_grad
    }
