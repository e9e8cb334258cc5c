"""Concept vectors: which value vectors of a model spell out a concept when they are read through its output embedding.

Geva, Caciularu, Wang, Goldberg: Transformer Feed-Forward Layers Build Predictions by Promoting Concepts in the
Vocabulary Space. EMNLP 2022, arXiv 2203.14680. Used so by Hong, Yu, Yang, Ravfogel, Geva: Intrinsic Evaluation of
Unlearning Using Parametric Knowledge Traces, arXiv 2406.11614.

With the output embedding E [V, d] and a column v [d], s = E v scores every token; the `top` best ones are what v says.
The final normalisation is left out, as in the paper. The paper asks GPT-4, and then people, whether they make one clear
concept; here (reconstructed, and it needs no other model) a column's score is

    share of its top tokens that occur in the text of the concept - the same share for the texts of other concepts

so that words which stand in both, stop words above all, count nothing. In each layer, the columns with the lowest mean
score of their top tokens are not looked at (the `drop` lowest share of them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engram.data.table import MISSING, Table, Target
from engram.errors import EngramError
from engram.models.split import ValueVectors, value_vectors

Place = tuple[int, int]  # layer, dimension
AT_ONCE = 512  # columns that are read together: 512 V scores in memory
MOST, SHARE = 200, 20


@dataclass(frozen=True)
class Read:
    """The columns of all layers, in order: `tokens` [n, k], best first, their `scores` [n, k]; `layer`, `dim` [n]."""

    tokens: Tensor
    scores: Tensor
    layer: Tensor
    dim: Tensor


@dataclass(frozen=True)
class ConceptVector:
    """Where it stands, its score for the concept, and its top tokens, the best first."""

    layer: int
    dim: int
    score: float
    tokens: tuple[int, ...]

    @property
    def place(self) -> Place:
        """Layer and dimension."""
        return self.layer, self.dim


def words_of(model: nn.Module, top: int | None) -> int:
    """How many tokens of a column are looked at: `top`; None is 200, or one in 20 of a small vocabulary, at least 1.
    EngramError unless there are more tokens than that."""
    size = len(value_vectors(model).words)
    found = max(1, min(MOST, size // SHARE)) if top is None else top
    if not 0 < found < size:
        raise EngramError(f"top={found} tells nothing among {size} tokens; give from 1 to {size - 1}")
    return found


@torch.no_grad()
def read(model: nn.Module, top: int) -> Read:
    """What every column of every layer says. Cost 2 V d flops a column; top tokens are kept, scores are not."""
    vectors = value_vectors(model)
    found = [_spelt(vectors, layer.columns, top) for layer in vectors.layers]
    sizes = torch.tensor([len(tokens) for tokens, _ in found])
    return Read(
        torch.cat([tokens for tokens, _ in found]),
        torch.cat([scores for _, scores in found]),
        torch.arange(len(sizes)).repeat_interleave(sizes),
        torch.cat([torch.arange(size) for size in sizes.tolist()]),
    )


@torch.no_grad()
def spelt(model: nn.Module, columns: Tensor, top: int) -> Tensor:
    """The top tokens of columns [d, n] as a model's output embedding reads them, [n, top]."""
    return _spelt(value_vectors(model), columns, top)[0]


def _spelt(vectors: ValueVectors, columns: Tensor, top: int) -> tuple[Tensor, Tensor]:
    tokens, scores = [], []
    for some in columns.split(AT_ONCE, 1):
        read = some.float() if vectors.output is None else (vectors.output @ some.to(vectors.output)).float()
        best = read.topk(top, 0)
        tokens.append(vectors.words[best.indices.T.cpu()])
        scores.append(best.values.T.cpu())
    return torch.cat(tokens), torch.cat(scores)


def located(
    model: nn.Module, concept: Tensor, others: Tensor, top: int | None = None, count: int = 1, drop: float = 0.3
) -> list[ConceptVector]:
    """The `count` columns that spell out a concept best, the best first; of equal scores, the one that says its tokens
    louder.

    `concept`, `others`: the tokens (or classes) of the concept's text and of other texts. EngramError for settings out
    of range, and for more columns than there are.
    """
    if not 0 <= drop < 1:
        raise EngramError(f"drop={drop} is a share of the columns; give 0 up to, not with, 1")
    found = read(model, words_of(model, top))
    loud = found.scores.double().mean(1)
    score = alike(found.tokens, concept, others).masked_fill(_quiet(loud, found.layer, drop), -torch.inf)
    there = int((score > -torch.inf).sum())
    if not 0 < count <= there:
        raise EngramError(f"{count} concept vectors are asked for; there are {there} columns to choose from")
    best = _descending(score, loud)[:count]
    parts = (found.layer[best], found.dim[best], score[best], found.tokens[best])
    rows = zip(*(part.tolist() for part in parts), strict=True)
    return [ConceptVector(layer, dim, value, tuple(tokens)) for layer, dim, value, tokens in rows]


def text_of(table: Table) -> Tensor:
    """The tokens that occur in token rows, or the classes of the labels of others, ascending. EngramError for rows that
    have neither."""
    if "input_ids" in table.inputs:
        ids = table.inputs["input_ids"]
        return ids[table.inputs.get("attention_mask", torch.ones_like(ids)) > 0].unique()
    if table.target != Target.CLASSES or table.labels is None:
        raise EngramError("a concept is looked for by the tokens or classes of its rows, and these rows have neither")
    return table.labels[table.labels != MISSING].unique()


def alike(tokens: Tensor, concept: Tensor, others: Tensor) -> Tensor:
    """The score of columns by their top tokens [n, k]: the share in the concept's text less that in others, [n]."""
    return share(tokens, concept) - share(tokens, others)


def share(tokens: Tensor, text: Tensor) -> Tensor:
    """The share of tokens [n, k] that occur in a text, [n] float64."""
    return torch.isin(tokens, text).double().mean(1)


def _quiet(loud: Tensor, layer: Tensor, drop: float) -> Tensor:
    """The lowest share of the columns of each layer, by how loud they are, [n] bool."""
    quiet = torch.zeros_like(loud, dtype=torch.bool)
    for one in layer.unique():
        members = (layer == one).nonzero()[:, 0]
        quiet[members[loud[members].argsort()[: int(drop * len(members))]]] = True
    return quiet


def _descending(score: Tensor, loud: Tensor) -> Tensor:
    order = loud.argsort(descending=True, stable=True)
    return order[score[order].argsort(descending=True, stable=True)]


# --- columns at their places


@torch.no_grad()
def columns_at(model: nn.Module, places: Sequence[Place]) -> Tensor:
    """The columns at these places, [k, d], a copy. EngramError for a place that the model does not have."""
    layers = value_vectors(model).layers
    for layer, dim in places:
        if not (0 <= layer < len(layers) and 0 <= dim < layers[layer].columns.shape[1]):
            sizes = [one.columns.shape[1] for one in layers]
            raise EngramError(
                f"there is no column {dim} in layer {layer}; the {len(sizes)} layers have {sizes} columns"
            )
    return torch.stack([layers[layer].columns[:, dim].clone() for layer, dim in places])


def written(model: nn.Module, places: Sequence[Place], columns: Tensor) -> dict[str, Tensor]:
    """The weights, by name, that have these columns [k, d] at these places, and else are as they were: what
    `torch.func.functional_call` takes; a function of the columns."""
    layers, found = value_vectors(model).layers, {}
    for layer in sorted({layer for layer, _ in places}):
        here = [k for k, (one, _) in enumerate(places) if one == layer]
        dims = torch.tensor([places[k][1] for k in here], device=columns.device)
        found[layers[layer].name] = layers[layer].put(dims, columns[here].T)
    return found


@torch.no_grad()
def write(model: nn.Module, places: Sequence[Place], columns: Tensor) -> None:
    """Put these columns [k, d] at these places of the model itself; all else keeps its bits."""
    layers = value_vectors(model).layers
    for (layer, dim), column in zip(places, columns, strict=True):
        layers[layer].columns[:, dim] = column.to(layers[layer].weight)
