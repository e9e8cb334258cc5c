"""A network of columns: a block of hidden units for each task, links between blocks, and a head for each class."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from engram.errors import EngramError
from engram.models.config import Configured
from engram.models.encoders import ACTIVATIONS, flat
from engram.models.output import Output
from engram.models.predictor import supervised_loss


@dataclass(frozen=True)
class Group:
    """Weights that move or stay together. `name`: of their module in the network. `block`: that they feed. `kind`:
    within, link or head. `layer`: counted from 0, a head's is the number of hidden layers. `other`: a link's source
    block, a head's class, -1 for none."""

    name: str
    block: int
    kind: str
    layer: int
    other: int = -1


class Block(nn.Module):
    """The hidden units of one task: `layers`, `links` [source][layer - 1], and `heads` by class."""

    def __init__(self, inputs: int, hidden: Sequence[int], classes: Iterable[int] = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(into, out) for into, out in pairwise((inputs, *hidden)))
        self.links = nn.ModuleDict()
        self.heads = nn.ModuleDict({str(c): nn.Linear(hidden[-1], 1) for c in classes})

    @property
    def hidden(self) -> list[int]:
        """Units of each layer."""
        return [int(layer.out_features) for layer in self.layers]  # type: ignore[arg-type]

    @property
    def classes(self) -> list[int]:
        """The classes that have a head here."""
        return [int(c) for c in self.heads]

    @property
    def sources(self) -> list[int]:
        """The blocks that it listens to."""
        return [int(s) for s in self.links]


class Columns(Configured, nn.Module):
    """Blocks of equal depth over the same input; reads `values` [B, d] or `pixel_values` as [B, inputs].

    Layer l of a block is the activation of its own layer l - 1 and of layer l - 1 of every block that it listens to,
    l > 0; a class's logit reads the last layer of its block. So links in both directions make no cycle, a block that
    listens to nobody depends on nobody, and its logits keep their bits whatever is added beside it. A class that has
    heads in several blocks is told by the surest of them.

    `blocks`: {"hidden": units of each layer, "classes": …, "sources": …} of each. `classes_total`: the least width of
    the logits. Cost of a row: its products with all weights; one small product for each class.
    """

    def __init__(
        self,
        inputs: int,
        blocks: Sequence[Mapping[str, Any]] = (),
        activation: str = "relu",
        classes_total: int = 0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise EngramError(
                f"there is no activation {activation!r}; choose one of {', '.join(map(str, ACTIVATIONS))}"
            )
        self.inputs = inputs
        self.active = ACTIVATIONS[activation]()
        self.blocks = nn.ModuleList(Block(inputs, given["hidden"], given.get("classes", ())) for given in blocks)
        for target, given in enumerate(blocks):
            for source in given.get("sources", ()):
                self.link(int(source), target)
        self.total = max(classes_total, *(c + 1 for c in self.classes), 0)

    # --- what it is

    @property
    def columns(self) -> list[Block]:
        """The blocks, in order of birth."""
        return list(self.blocks)  # type: ignore[arg-type]

    @property
    def classes(self) -> list[int]:
        """The classes that it can tell, ascending."""
        return sorted({c for block in self.columns for c in block.classes})

    @property
    def vacant(self) -> list[int]:
        """The blocks without a class: their units are free."""
        return [t for t, block in enumerate(self.columns) if not len(block.heads)]

    @property
    def free_units(self) -> int:
        """Hidden units of vacant blocks."""
        return sum(sum(self.columns[t].hidden) for t in self.vacant)

    @property
    def width(self) -> int:
        """Units of the last layers together."""
        return sum(block.hidden[-1] for block in self.columns)

    def groups(self) -> Iterator[Group]:
        """All weights, each in one group."""
        for t, block in enumerate(self.columns):
            yield from (Group(f"blocks.{t}.layers.{k}", t, "within", k) for k in range(len(block.layers)))
            for s, link in zip(block.sources, block.links.values(), strict=True):
                yield from (Group(f"blocks.{t}.links.{s}.{k}", t, "link", k + 1, s) for k in range(len(link)))  # type: ignore[arg-type]
            yield from (Group(f"blocks.{t}.heads.{c}", t, "head", len(block.layers), c) for c in block.classes)

    def weights(self, group: Group) -> list[nn.Parameter]:
        """The parameters of a group."""
        return list(self.get_submodule(group.name).parameters())

    def listeners(self, source: int) -> list[int]:
        """The blocks with a link from this one."""
        return [t for t, block in enumerate(self.columns) if source in block.sources]

    # --- how it changes; torch's layers draw from the global generator: call these under `seeded`

    def put(self, block: Block, at: int | None = None) -> int:
        """Add a block, or let it take the place of a vacant one; its number."""
        if at is None:
            self.blocks.append(block)
            return len(self.blocks) - 1
        self.blocks[at] = block
        return at

    def twin(self, source: int) -> Block:
        """A copy of a block without its heads."""
        block = copy.deepcopy(self.columns[source])
        block.heads = nn.ModuleDict()
        return block

    def know(self, at: int, classes: Iterable[int]) -> None:
        """Heads of a block for those of the classes for which it has none."""
        block = self.columns[at]
        for c in classes:
            if str(c) not in block.heads:
                block.heads[str(c)] = nn.Linear(block.hidden[-1], 1)
            self.total = max(self.total, c + 1)

    @torch.no_grad()
    def link(self, source: int, target: int, like: int | None = None) -> None:
        """Let a block listen to another one: by links of 0, or by the weights within the block `like`, as far as they
        fit. What is linked already stays."""
        into, out = self.columns[source], self.columns[target]
        if source == target or str(source) in out.links:
            return
        link = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in zip(into.hidden, out.hidden[1:], strict=False))
        for k, part in enumerate(link):
            part.weight.zero_()  # type: ignore[operator]
            if like is not None:
                _corner(part.weight, self.columns[like].layers[k + 1].weight)  # type: ignore[arg-type]
        out.links[str(source)] = link

    @torch.no_grad()
    def widen(self, at: int, units: int) -> None:
        """So many more units in each layer of a block. Nothing listens to them yet: what the network says stays."""
        block, depth = self.columns[at], len(self.columns[at].layers)
        for k in range(depth):
            block.layers[k] = _wider(block.layers[k], units, units if k else 0)
        for link in block.links.values():
            for k in range(depth - 1):
                link[k] = _wider(link[k], units, 0)  # type: ignore[operator,index]
        for c in block.classes:
            block.heads[str(c)] = _wider(block.heads[str(c)], 0, units)
        for other in (self.columns[t].links[str(at)] for t in self.listeners(at)):
            for k in range(depth - 1):
                other[k] = _wider(other[k], 0, units)  # type: ignore[operator,index]

    def retire(self, classes: Collection[int]) -> None:
        """Take the heads of classes away."""
        for block in self.columns:
            for c in set(block.classes) & set(classes):
                del block.heads[str(c)]

    @torch.no_grad()
    def clear(self, at: int) -> None:
        """Nothing of a block is left but room for its units: no link from it or to it, and all weights 0."""
        for t in self.listeners(at):
            del self.columns[t].links[str(at)]
        block = self.columns[at]
        block.links, block.heads = nn.ModuleDict(), nn.ModuleDict()
        for p in block.parameters():
            p.zero_()

    # --- what it says

    def forward(
        self,
        *,
        labels: Tensor | None = None,
        task: Tensor | None = None,
        among: Collection[int] | None = None,
        **inputs: Any,
    ) -> Output:
        """Logits [B, W] over class ids, -inf where there is no head, and the last layers side by side.

        `among`: these classes alone; blocks that they do not depend on are left out. `task` belongs to the common call.
        `labels` adds the loss.
        """
        wanted = self.classes if among is None else sorted(set(among) & set(self.classes))
        blocks = [t for t, b in enumerate(self.columns) if among is None or set(b.classes) & set(wanted)]
        tops = self._tops(blocks, flat(self, self.inputs, **_known(inputs)))
        logits = self._dense(tops, wanted)
        loss = None if labels is None else supervised_loss(logits, labels)
        return Output(loss=loss, logits=logits, pooler_output=torch.cat(list(tops.values()), 1))

    def describe(self) -> dict[str, Any]:
        """As it is now."""
        blocks = [{"hidden": b.hidden, "classes": b.classes, "sources": b.sources} for b in self.columns]
        return {**super().describe(), "blocks": blocks, "classes_total": self.total}

    def _tops(self, blocks: Sequence[int], x: Tensor) -> dict[int, Tensor]:
        """The last layer [B, n] of blocks, computed with what they depend on alone."""
        needed = [set(blocks)]
        for _ in range(len(self.columns[0].layers) - 1):
            needed.append(needed[-1].union(*(self.columns[t].sources for t in needed[-1])))
        states = dict.fromkeys(needed[-1], x)
        for k, need in enumerate(reversed(needed)):
            states = {t: self._layer(t, k, states) for t in sorted(need)}
        return states

    def _layer(self, at: int, k: int, before: Mapping[int, Tensor]) -> Tensor:
        block = self.columns[at]
        total = block.layers[k](before[at])
        for s, link in zip(block.sources, block.links.values(), strict=True):
            total = total + link[k - 1](before[s]) if k else total  # type: ignore[index]
        return self.active(total)

    def _dense(self, tops: Mapping[int, Tensor], classes: Sequence[int]) -> Tensor:
        """[B, W]; each head by itself, so that its bits do not depend on how many others there are."""
        x = next(iter(tops.values()))
        dense = x.new_full((len(x), self.total), -torch.inf)
        if not classes:
            return dense
        said = torch.cat([self._logit(c, tops) for c in classes], 1)
        return dense.index_copy(1, torch.tensor(classes, device=x.device), said.to(dense))

    def _logit(self, c: int, tops: Mapping[int, Tensor]) -> Tensor:
        """The logit of a class [B, 1]: the largest of its heads'."""
        found = [self.columns[t].heads[str(c)](h) for t, h in tops.items() if str(c) in self.columns[t].heads]
        return found[0] if len(found) == 1 else torch.stack(found).amax(0)


def _known(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {"values": inputs.get("values"), "pixel_values": inputs.get("pixel_values")}


def _corner(weight: Tensor, other: Tensor) -> None:
    """Copy as much of another matrix as fits."""
    rows, columns = (min(a, b) for a, b in zip(weight.shape, other.shape, strict=True))
    weight[:rows, :columns] = other[:rows, :columns]


def _wider(layer: Any, out: int, into: int) -> nn.Linear:
    """A linear layer with more outputs, as torch starts them, and more inputs, which its old outputs do not read."""
    new = nn.Linear(layer.in_features + into, layer.out_features + out, bias=layer.bias is not None)
    new.weight[: layer.out_features] = 0
    _corner(new.weight, layer.weight)
    if layer.bias is not None:
        new.bias[: layer.out_features] = layer.bias
    return new
