"""What texts mean, as vectors: by a language model on disk, or, for want of one, how they are spelt.

Nothing is downloaded, and transformers is imported only when a model is read. A text's vector depends on the text
and on the fixed vocabulary alone: not on what else is embedded, nor in which order (but for rounding, where texts of
one length share a batch).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from engram.environment import require
from engram.errors import EngramError, unknown
from engram.models.io import load

POOLS = ("mean", "last", "cls", "own")
SPELLING = "spelling"
SMALL = 1e-6  # length, relative to the vectors before they were centred, below which a direction is rounding
BATCH = 64

Encode = Callable[[Sequence[str]], Tensor]


def embed(
    texts: Sequence[str],
    encoder: Any,
    *,
    pool: str = "mean",
    centre: Iterable[str] = (),
    whiten: bool = False,
    device: str = "cpu",
) -> Tensor:
    """Unit vectors of texts, [n, d] float32, on the CPU; see `Embedder`, which keeps the encoder for further texts."""
    return Embedder(encoder, pool=pool, centre=centre, whiten=whiten, device=device)(texts)


class Embedder:
    """Texts to unit vectors, in a space that is fixed once and for all.

    `encoder`: the directory of a transformers model with its tokenizer (a text encoder, a causal language model, an
    encoder-decoder, CLIP), a pair (model, tokenizer), "spelling" (counts of 2 to 4 letters in 512 hashed places, which
    knows nothing of meaning), or any function texts -> [n, d].

    `pool`, what is taken of the last hidden states: their "mean", as sentence encoders have it; the "last" one, for
    causal models; "cls", the first; or "own": what the model itself calls a text's embedding (CLIP's projected one,
    else the pooler's).

    `centre`: a fixed vocabulary, whose mean is taken off; language models put all texts into a narrow cone otherwise.
    `whiten`: also divide by the square root of its covariance (that of Ledoit and Wolf, so that a vocabulary smaller
    than d will do): near-synonyms come apart.

    The model is read at the first call, and is in eval mode. EngramError for a text that is empty or too long, an
    encoder or pool that is not there, and a text that has no direction. Cost: one forward pass a text, in batches of
    equal length.
    """

    def __init__(
        self,
        encoder: Any,
        *,
        pool: str = "mean",
        centre: Iterable[str] = (),
        whiten: bool = False,
        device: str = "cpu",
    ) -> None:
        if pool not in POOLS:
            raise unknown("pool", pool, POOLS)
        self.encoder, self.pool, self.device = encoder, pool, device
        self.centre, self.whiten = tuple(dict.fromkeys(centre)), whiten
        if whiten and len(self.centre) < 2:
            raise EngramError("whitening needs a fixed vocabulary of two texts or more to take the covariance of")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """[n, d] float32 of unit length."""
        if isinstance(texts, str):
            raise EngramError(f"give a list of texts, not the text {texts!r} alone")
        raw = self._raw(texts)
        found = (raw - self._origin) @ self._spread if self.whiten else raw - self._origin
        short = (raw - self._origin).norm(dim=1) <= SMALL * raw.norm(dim=1)
        if bool(short.any()):
            which = texts[int(short.nonzero()[0])]
            raise EngramError(f"the text {which!r} has no direction: its vector is 0, or the mean of the vocabulary")
        return F.normalize(found, dim=1).float()

    @cached_property
    def _encode(self) -> Encode:
        if isinstance(self.encoder, tuple):
            return _Transformer(*self.encoder, pool=self.pool, device=self.device)
        if callable(self.encoder):
            return self.encoder
        return _spelling if self.encoder == SPELLING else _read(self.encoder, self.pool, self.device)

    @cached_property
    def _vocabulary(self) -> Tensor:
        return self._raw(self.centre)

    @cached_property
    def _origin(self) -> Tensor:
        """What is taken off, [d] or []."""
        return self._vocabulary.mean(0) if self.centre else torch.zeros((), dtype=torch.float64)

    @cached_property
    def _spread(self) -> Tensor:
        """The inverse square root of the vocabulary's covariance, [d, d]."""
        from sklearn.covariance import ledoit_wolf

        covariance, _ = ledoit_wolf(self._vocabulary.numpy())
        values, vectors = torch.linalg.eigh(torch.from_numpy(covariance))
        if not bool(values[0] > 0):
            raise EngramError("the texts of the vocabulary all have the same vector; whitening needs different ones")
        return vectors * values.rsqrt() @ vectors.T

    def _raw(self, texts: Sequence[str]) -> Tensor:
        """The encoder's vectors, [n, d] float64."""
        empty = [text for text in texts if not (isinstance(text, str) and text.strip())]
        if empty or not len(texts):
            raise EngramError(f"there is no text to embed: {empty[0]!r}" if empty else "there are no texts to embed")
        found = torch.as_tensor(self._encode(list(texts))).double()
        if found.shape[:1] != (len(texts),) or found.ndim != 2 or not bool(found.isfinite().all()):
            raise EngramError(
                f"the encoder gave {list(found.shape)} for {len(texts)} texts; it has to give [n, d], all finite"
            )
        return found


def read_vectors(path: str | Path) -> dict[str, Tensor]:
    """Vectors by name from a file: `.safetensors` (a tensor [d] a name, or one matrix [n, d]), `.parquet` (a column of
    names and one of lists) or `.npy` ([n, d]). The rows of a matrix are named by their numbers, "0", "1", …

    EngramError for a file that cannot be read, is of another kind, or holds anything else; pickles are not read.
    """
    file = Path(path)
    if file.suffix not in _READERS:
        raise unknown("kind of vector file", file.suffix or file.name, _READERS)
    try:
        return as_vectors(_READERS[file.suffix](file))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise EngramError(f"the vectors in {file} cannot be read: {error}") from error


def as_vectors(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Vectors by name, [d] float64 each. EngramError unless all are finite vectors of one length."""
    found = {str(name): torch.as_tensor(value, dtype=torch.float64) for name, value in given.items()}
    shapes = {tuple(value.shape) for value in found.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1 or not all(bool(v.isfinite().all()) for v in found.values()):
        raise EngramError("vectors by name have to be finite, one [d] a name, and all of one length")
    return found


class _Transformer:
    """A frozen model and its tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: Any, *, pool: str, device: str) -> None:
        self.model, self.tokenizer, self.pool = model.to(device).eval(), tokenizer, pool
        limit = getattr(model.config, "max_position_embeddings", None) or math.inf
        self.limit = min(limit, tokenizer.model_max_length)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        tokens = [self.tokenizer(text)["input_ids"] for text in texts]
        for text, own in zip(texts, tokens, strict=True):
            if not 0 < len(own) <= self.limit:
                raise EngramError(f"the text {text[:40]!r} has {len(own)} tokens; the encoder takes 1 to {self.limit}")
        order = sorted(range(len(texts)), key=lambda k: len(tokens[k]))
        found: dict[int, Tensor] = {}
        for rows in _alike(order, [len(own) for own in tokens]):
            vectors = self._pooled(torch.tensor([tokens[k] for k in rows]))
            found.update(zip(rows, vectors.double().cpu(), strict=True))
        return torch.stack([found[k] for k in range(len(texts))])

    def _pooled(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, d]; no text of the batch is padded."""
        ids = ids.to(next(self.model.parameters()).device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.pool == "own":
            return _own(self.model, inputs)
        hidden: Tensor = _trunk(self.model)(**inputs).last_hidden_state
        return {"mean": hidden.mean(1), "last": hidden[:, -1], "cls": hidden[:, 0]}[self.pool]


def _alike(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Rows in this order, cut where the length changes and at the size of a batch."""
    cuts: list[list[int]] = []
    for k in order:
        if not cuts or len(cuts[-1]) == BATCH or lengths[cuts[-1][0]] != lengths[k]:
            cuts.append([])
        cuts[-1].append(k)
    return cuts


def _trunk(model: Any) -> Any:
    """The part of a transformers model that has hidden states of text."""
    base = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    return getattr(base, "text_model", base)


def _own(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    tower = getattr(model, "get_text_features", model)
    output = tower(**inputs)
    found = next((getattr(output, name, None) for name in ("text_embeds", "pooler_output") if name in output), None)
    if found is None:
        raise EngramError(f"{type(model).__name__} has no text embedding of its own; use pool='mean', 'last' or 'cls'")
    return found


def _read(directory: Any, pool: str, device: str) -> _Transformer:
    if not isinstance(directory, str | Path) or not Path(directory).is_dir():
        raise EngramError(
            f"the encoder {str(directory)!r} is no directory of a transformers model with its tokenizer; give one, or "
            f"{SPELLING!r}, which knows letters but no meaning"
        )
    return _Transformer(load(directory), _tokenizer(Path(directory)), pool=pool, device=device)


def _tokenizer(directory: Path) -> Any:
    if not any(file for pattern in ("tokenizer.json", "vocab*", "*.model") for file in directory.glob(pattern)):
        raise EngramError(f"there is no tokenizer in {directory}; save it beside the model")  # else one without words
    try:
        return require("transformers").AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # a damaged file makes the library raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise EngramError(f"the tokenizer in {directory} cannot be read: {reason}") from error


def _spelling(texts: Sequence[str]) -> Tensor:
    from sklearn.feature_extraction.text import HashingVectorizer

    counts = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 4), n_features=512)
    return torch.from_numpy(counts.transform(texts).toarray())


def _numbered(rows: Any) -> dict[str, Any]:
    return {str(number): row for number, row in enumerate(rows)}


def _safetensors(path: Path) -> dict[str, Any]:
    found = load_file(path)
    only = next(iter(found.values()), torch.zeros(0))
    return _numbered(only) if len(found) == 1 and only.ndim == 2 else found


def _parquet(path: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq
    from pyarrow import types

    table = pq.read_table(path)
    names = [field.name for field in table.schema if types.is_string(field.type) or types.is_large_string(field.type)]
    lists = [field.name for field in table.schema if types.is_nested(field.type)]
    if len(names) != 1 or len(lists) != 1:
        raise EngramError("a parquet file of vectors has one column of names and one of lists of numbers")
    return dict(zip(table[names[0]].to_pylist(), table[lists[0]].to_pylist(), strict=True))


def _npy(path: Path) -> dict[str, Any]:
    return _numbered(torch.from_numpy(np.load(path, allow_pickle=False)))


_READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".safetensors": _safetensors,
    ".parquet": _parquet,
    ".npy": _npy,
}
VECTOR_FILES = tuple(_READERS)
