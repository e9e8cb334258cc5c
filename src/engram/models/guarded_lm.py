"""Guards of prompts: what a classifier flags is read with damaged embeddings; all else is read as it stands.

Liu, Wang, Flanigan, Liu: Large Language Model Unlearning via Embedding-Corrupted Prompts. NeurIPS 2024, arXiv
2406.07933. No weight of the model changes, and all that it knew is still in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.errors import EngramError, unknown
from engram.models.config import Configured
from engram.models.guards import Wrapper
from engram.models.shifted import row_keys
from engram.models.tokens import replaced
from engram.stats.seeds import generator, uniform

CORRUPTIONS = ("noise", "zero", "flip")
STEP = 6364136223846793005  # an odd number; 64-bit integers wrap around
BACK = (pow(STEP, -1, 2**64) + 2**63) % 2**64 - 2**63  # BACK * STEP = 1
TAIL = 8.3  # no draw of `_normal` lies farther out


# --- classifiers


class Scorer(Configured, nn.Module):
    """Log-odds by one weight a column; 0 until `put`."""

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros((), dtype=torch.float64))

    def put(self, weight: Tensor, bias: Tensor) -> None:
        """Take these weights [width] and this bias []."""
        self.weight.copy_(weight)
        self.bias.copy_(bias)


class RowClassifier(Scorer):
    """Log-odds of rows of numbers [B, width] -> [B] float64."""

    def forward(self, values: Tensor) -> Tensor:
        return values.to(self.weight) @ self.weight + self.bias


class PromptClassifier(Scorer):
    """Log-odds of a prompt: the sum over its runs of 1 to `longest` tokens of one weight each, which stand in `places`
    hashed places; runs that were never seen weigh nothing.

    It reads token ids, so that no tokenizer is needed; and it is a sum, so that no words around a name thin that out.
    `places` is a power of 2. Cost: `longest` look-ups a token.
    """

    def __init__(self, places: int = 2**16, longest: int = 2) -> None:
        super().__init__(places)
        if places < 1 or places & (places - 1) or longest < 1:
            raise EngramError(f"places={places} and longest={longest}: give a power of 2, and at least 1")
        self.places, self.longest = places, longest
        draws = torch.randint(-(2**62), 2**62, (longest,), generator=generator("runs of tokens"))
        self.factors = (2 * draws + 1).tolist()

    def forward(self, ids: Tensor, there: Tensor) -> Tensor:
        """Prompts and which of their tokens count, both [B, T] -> [B] float64."""
        total = self.bias.expand(len(ids))
        for places, whole in self.runs(ids, there):
            total = total + torch.where(whole, self.weight[places], 0.0).sum(1)
        return total

    def runs(self, ids: Tensor, there: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each length n: the place of every run of n tokens, and whether all of them count, both [B, T - n + 1]."""
        for n, factor in enumerate(self.factors, 1):
            width = max(ids.shape[1] - n + 1, 0)
            mixed, whole = torch.full_like(ids[:, :width], n), torch.ones_like(there[:, :width])
            for k in range(n):
                mixed = (mixed ^ (mixed >> 29)) * factor + ids[:, k : k + width] * STEP
                whole = whole & there[:, k : k + width]
            yield ((mixed ^ (mixed >> 31)) * factor) >> 24 & (self.places - 1), whole


# --- corruption


def corrupted(states: Tensor, kind: str, strength: float, draws: Tensor) -> Tensor:
    """Embeddings [n, d], damaged: "noise" adds `strength` times the draws [n, dims] to the first coordinates; "zero"
    and "flip" set the `strength` coordinates of largest size of each to 0, or turn their signs (all, if there are
    fewer). The argument is untouched. EngramError for noise that the type of the embeddings cannot hold."""
    if kind not in CORRUPTIONS:
        raise unknown("corruption", kind, CORRUPTIONS)
    if kind == "noise":
        if TAIL * strength > torch.finfo(states.dtype).max:
            raise EngramError(f"noise of {strength:g} is more than {states.dtype} holds; use the model in bfloat16")
        return torch.cat([states[:, : draws.shape[1]] + (strength * draws).to(states), states[:, draws.shape[1] :]], 1)
    largest = states.abs().topk(int(min(strength, states.shape[1])), 1).indices
    chosen = torch.zeros_like(states, dtype=torch.bool).scatter(1, largest, True)
    return torch.where(chosen, torch.zeros_like(states) if kind == "zero" else -states, states)


def _normal(keys: Tensor, dims: int, seed: int) -> Tensor:
    """Standard normal draws of numbers [n] -> [n, dims] float64, on the CPU: functions of number and seed."""
    return torch.special.ndtri(uniform(keys, "corruption", seed, size=dims).clamp(min=2.0**-54))


class Guard(Wrapper):
    """What both guards share. `classifier`: log-odds that a row lies in the scope of what must be forgotten; flagged
    are rows whose probability is above one half and not below `threshold`. `kind`, `strength`, `dims`: see `corrupted`.

    The noise of a row follows from `seed` and from what is read, so that an answer can be repeated and depends on no
    other row of its batch; the published code draws anew at every call.
    """

    def __init__(
        self,
        inner: nn.Module,
        classifier: nn.Module,
        threshold: float = 0.5,
        kind: str = "noise",
        strength: float = 1.0,
        dims: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(inner)
        if kind not in CORRUPTIONS:
            raise unknown("corruption", kind, CORRUPTIONS)
        self.classifier = classifier
        self.threshold, self.kind, self.strength, self.dims, self.seed = threshold, kind, strength, dims, seed
        self.train(False)

    def flagged(self, **inputs: Any) -> Tensor:
        """Which rows are read damaged, [B] bool."""
        raise NotImplementedError

    @torch.no_grad()
    def _judged(self, *read: Tensor) -> Tensor:
        p = self.classifier(*read).sigmoid()
        return (p > 0.5) & (p >= self.threshold)

    def _damaged(self, states: Tensor, keys: Tensor) -> Tensor:
        """Embeddings [n, d] with their keys [n]."""
        draws = _normal(keys, min(self.dims, states.shape[1]), self.seed)
        return corrupted(states, self.kind, self.strength, draws.to(states.device))


class GuardedInputs(Guard):
    """A guarded model that reads numbers and no tokens: the inputs themselves, as one row of numbers, take the place of
    the embeddings. Beyond the paper. `input`: the name of the tensor [B, …]."""

    def __init__(
        self,
        inner: nn.Module,
        classifier: nn.Module,
        input: str,
        threshold: float = 0.5,
        kind: str = "noise",
        strength: float = 1.0,
        dims: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(inner, classifier, threshold, kind, strength, dims, seed)
        self.input = input

    def flagged(self, **inputs: Any) -> Tensor:
        return self._judged(inputs[self.input].flatten(1))

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        own, chosen = inputs[self.input].clone(), self.flagged(**inputs)
        rows = own[chosen]
        if len(rows):
            own[chosen] = self._damaged(rows.flatten(1), row_keys({"rows": rows}, ["rows"])).reshape(rows.shape)
        return {**inputs, self.input: own}


class GuardedLM(Guard):
    """A guarded language model (or any that embeds `input_ids`): reads, saves and generates as the inner one.

    A prompt is what is given to `generate`, whole. In a forward pass, which may read a prompt with its answer, it ends
    with the last place of the tokens `end`, or with the row where these are not there or none are set: whoever scores
    answers sets them, or the answer is damaged too; what stands behind them is not judged. Damaged are all tokens of a
    flagged prompt but the last; or the `entities` (runs of token ids) where one of them stands in it.

    It guards this interface and nothing else: the weights hold all they ever knew, and prompts that reach them in
    pieces (a token a call, over a cache) are not judged. Cost: one pass of the classifier over a prompt; nothing for
    the tokens after it. EngramError without `input_ids`, and for several tokens over a cache or a prompt read in
    chunks, where the guard cannot see the prompt.
    """

    def __init__(
        self,
        inner: nn.Module,
        classifier: nn.Module,
        threshold: float = 0.5,
        kind: str = "noise",
        strength: float = 1.0,
        dims: int = 1,
        seed: int = 0,
        end: Sequence[int] = (),
        entities: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__(inner, classifier, threshold, kind, strength, dims, seed)
        self.end, self.entities = list(end), [list(one) for one in entities if len(one)]

    def flagged(self, **inputs: Any) -> Tensor:
        ids, there = _read(inputs)
        return self._judged(ids, prompts(ids, there, self.end))

    def forward(self, **inputs: Any) -> Any:
        ids, there = _read(inputs)
        if ids.shape[1] == 1:
            return self.inner(**inputs)
        if any(_length(inputs.get(name)) for name in ("past_key_values", "cache")):
            raise EngramError(
                "the guard cannot see a prompt that is read over a cache; give it whole, or call generate"
            )
        with self._reading(ids, prompts(ids, there, self.end)):
            return self.inner(**inputs)

    def generate(self, input_ids: Tensor | None = None, **inputs: Any) -> Any:
        """The inner model's `generate`, its prompts read through the guard."""
        given = {"input_ids": input_ids, **inputs}
        with self._reading(*_read(given)):
            return self._inner().generate(**given)

    def _reading(self, ids: Tensor, prompt: Tensor) -> AbstractContextManager[None]:
        """Inside, the model reads these rows; nothing is done unless one of them is flagged."""
        flagged = self._judged(ids, prompt)
        mask = self.masked(ids, prompt) & flagged[:, None] if bool(flagged.any()) else flagged
        if not bool(mask.any()):
            return nullcontext()
        keys = prefix_keys(ids, prompt)

        def corrupt(states: Tensor) -> Tensor:
            if states.shape[1] < ids.shape[1] or len(states) % len(ids):
                raise EngramError(
                    f"the model reads {states.shape[1]} tokens at once of a prompt of {ids.shape[1]}; generate without "
                    "chunks (prefill_chunk_size) and without an assistant"
                )
            here, own = (_as_read(part, states) for part in (mask, keys))  # rows repeat for beams
            states[here] = self._damaged(states[here], own[here])
            return states

        return replaced(self.inner, corrupt, prefill_only=True)

    def masked(self, ids: Tensor, prompt: Tensor) -> Tensor:
        """The tokens that would be damaged in a flagged row, [B, T] bool: never one behind the prompt."""
        order = prompt.long().cumsum(1)
        default, named = prompt & (order < order[:, -1:]), torch.zeros_like(prompt)
        for entity in self.entities:
            named |= _inside(found(ids, entity), len(entity), ids.shape[1])
        named &= prompt
        return torch.where(named.any(1, keepdim=True), named, default)


def prompts(ids: Tensor, there: Tensor, end: Sequence[int]) -> Tensor:
    """The tokens of each row's prompt, [B, T] bool: up to the last place of `end`, else all that are there."""
    places = torch.arange(ids.shape[1], device=ids.device)
    if not end:
        return there
    hits = _inside(found(ids, end), len(end), ids.shape[1]) & there
    last = torch.where(hits, places, -1).amax(1, keepdim=True)
    return there & ((places <= last) | (last < 0))


def found(ids: Tensor, run: Sequence[int]) -> Tensor:
    """Where a run of n token ids begins, [B, T - n + 1] bool."""
    width = max(ids.shape[1] - len(run) + 1, 0)
    hits = torch.ones_like(ids[:, :width], dtype=torch.bool)
    for k, token in enumerate(run):
        hits = hits & (ids[:, k : k + width] == token)
    return hits


def prefix_keys(ids: Tensor, there: Tensor) -> Tensor:
    """A 64-bit number of every token of a row and all before it, [B, T] int64; tokens that are not there (padding on
    either side) count for nothing."""
    order = there.long().cumsum(1)
    back, forth = (_powers(base, order) for base in (BACK, STEP))
    return forth * (torch.where(there, ids + 1, 0) * back).cumsum(1)


def _powers(base: int, exponents: Tensor) -> Tensor:
    """base ** k, wrapping around, for whole numbers k."""
    factors = torch.full((int(exponents.max()) + 1,), base, device=exponents.device)
    factors[0] = 1
    return factors.cumprod(0)[exponents]


def _inside(begins: Tensor, n: int, width: int) -> Tensor:
    """The tokens of runs of n that begin there, [B, width] bool."""
    covered = torch.zeros(len(begins), width, dtype=torch.bool, device=begins.device)
    for k in range(n):
        covered[:, k : k + begins.shape[1]] |= begins
    return covered


def _as_read(rows: Tensor, states: Tensor) -> Tensor:
    """[B, T] as the model reads it, [B * beams, T + new tokens], zeros behind."""
    repeated = rows.repeat_interleave(len(states) // len(rows), 0)
    return F.pad(repeated, (0, states.shape[1] - rows.shape[1]))


def _read(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Token ids, and which of them are there, [B, T]."""
    ids = inputs.get("input_ids")
    if ids is None:
        raise EngramError("a guard judges prompts by their input_ids, and none were given")
    mask = inputs.get("attention_mask")
    return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())
