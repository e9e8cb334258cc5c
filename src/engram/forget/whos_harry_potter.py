"""Who's Harry Potter?: fine-tuning on what a model that never read the text would most plausibly say in its place.

Eldan, Russinovich: Who's Harry Potter? Approximate Unlearning in LLMs. arXiv 2310.02238.

With the model M, a copy R of it that was trained on the text once more, and x' the text x with its names replaced:

    v_generic = v_base - alpha * relu(v_reinforced - v_base),    v_base = M(x'), v_reinforced = R(x)

read at places that stand for one another. Its argmax is the new label of the next token; M is fine-tuned on x with
these labels. What R says louder than M is what the text taught; where a name would come, M speaks of its replacement.
Two rules keep the labels consistent within a row: a term is left out of the loss from its second time on (that is
copied from the row, not remembered), and once a term has been read its replacement is held down, so that nobody learns
to change from the one to the other.

There is no official code; the paper is followed. Reconstructed are: how much the replacement is held down (`lower`);
that this concerns only those of its tokens which the translated row has no other use for; that the inner tokens of a
term carry no label; and that a label has to be within `within` logits of the best one of M (else tokens that were never
trained win at a large alpha). `mode="decode"` is the variant of MUSE (Shi et al., arXiv 2407.06460): nothing is trained
into M and no name replaced; every token is chosen from v_generic, with M and R reading the same text.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engram.core.forgetter import rows
from engram.core.request import Request
from engram.core.unlearning import usual_loss
from engram.data.anchors import anchored, read_dictionary
from engram.data.table import IGNORED, MISSING, Batch, Table, Target
from engram.engine import lm
from engram.engine.fit import fit
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.predict import evaluating
from engram.engine.run import Run
from engram.engine.teacher import RowCache
from engram.environment import require
from engram.errors import EngramError, unknown
from engram.forget.language import Retaining, of_same_rows
from engram.models.generic import GenericLogits, generic

MODES = ("weights", "decode")
ALPHA = {"weights": 5.0, "decode": 1.0}
AT_ONCE = 16  # rows that labels are made for together: several times their places times the vocabulary in memory


@dataclass(kw_only=True, eq=False)
class WhosHarryPotter(Retaining):
    """`mode`: "weights" fine-tunes; "decode" gives a `models.generic.GenericLogits` around the model and its reinforced
    copy: it saves, loads and generates, and both hold all that they ever knew.

    `dictionary`: names with their replacements, a mapping or a JSON or YAML file (see `data.anchors`), which needs the
    `tokenizer` (an object, a directory or a hub name; a fast one); None compares the rows with themselves, which alone
    serves classifiers too. `alpha`: None is 5 for weights and 1 for decode. `centre`: take each place's mean off both
    logits before they are compared. `lower`, `within`: see above, in logits; `within` None looks everywhere. `soft`:
    train on softmax(v_generic) in place of its argmax. `reinforcement`, `reinforce_epochs`: how R is trained, in
    batches of `batch_size` too. `retain_weight`, `retain_term`: what may hold the model on other text; the paper has
    none. Rows are best whole blocks of the text (`data.text.blocks`).

    Learning rates are those for a pretrained model of billions of weights; a small one wants 1e-4 to 1e-3.
    Cost: `reinforce_epochs` + `epochs` passes over the forget rows, forward and backward, two forward; a third copy of
    the model while labels are made. Labels take n T integers, soft ones n T V numbers.
    """

    mode: Literal["weights", "decode"] = "weights"
    dictionary: Any = None
    tokenizer: Any = None
    alpha: float | None = None
    centre: bool = False
    lower: float = 10.0
    within: float | None = 10.0
    soft: bool = False
    reinforcement: Optimizer = field(default_factory=lambda: Optimizer("adamw", lr=3e-6))
    reinforce_epochs: int = 3
    optimizer: Optimizer = field(default_factory=lambda: Optimizer("adamw", lr=1e-6))
    epochs: int = 2
    batch_size: int = 128
    retain_weight: float = 0.0

    @classmethod
    def tiny(cls) -> WhosHarryPotter:
        """A setting for checks on a handful of rows."""
        plan = Optimizer(lr=1e-2)
        return cls(reinforcement=plan, reinforce_epochs=2, optimizer=plan, epochs=2, batch_size=8)

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        self.check(request)
        run = run or Run()
        return self._guarded(model, request, run) if self.mode == "decode" else super().forget(model, request, run)

    def check(self, request: Request) -> None:
        """Besides what all forgetters check: EngramError for an unknown mode, labels that are numbers, and a dictionary
        without its tokenizer or where it plays no part."""
        super().check(request)
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)
        if self.dictionary is not None and self.mode == "decode":
            raise EngramError('mode="decode" replaces no names; leave the dictionary out, or use mode="weights"')
        if self.dictionary is not None and self.tokenizer is None:
            raise EngramError("a dictionary is of words, and the rows are of tokens: give the `tokenizer` too")
        if rows(request.forget).target == Target.NUMBERS:
            raise EngramError("the labels are numbers, and there is no generic one among them; use forget.Blindspot")

    def targets(self, model: nn.Module, request: Request, run: Run) -> None:
        super().targets(model, request, run)
        table = self.compared(rows(request.forget))
        found = run.phase("generic predictions", lambda: self.predictions(model, table, run))
        self.relabelled = table.with_labels(found["labels"])
        self.probabilities = RowCache(found["probabilities"]) if self.soft else None

    def compared(self, table: Table) -> Table:
        """The rows with what their translation says of them, if there is a dictionary."""
        if self.dictionary is None:
            return table
        tokenizer = self.tokenizer
        if isinstance(tokenizer, str):
            tokenizer = require("transformers").AutoTokenizer.from_pretrained(tokenizer)
        return anchored(table, read_dictionary(self.dictionary), tokenizer)

    def reinforced(self, model: nn.Module, table: Table, run: Run) -> nn.Module:
        """A copy that was trained on the rows once more, in the usual way."""
        new = copy.deepcopy(model).eval()
        trainable = {id(p) for p in self.params(new)}
        for p in new.parameters():
            p.requires_grad_(id(p) in trainable and p.requires_grad)
        order = run.number("order of reinforcement")
        fit(
            lambda batch: usual_loss(new, batch),
            lambda epoch: table.batches(self.batch_size, seed=order, epoch=epoch, shard=run.shard),
            model=new,
            optimizer=self.reinforcement,
            epochs=self.reinforce_epochs,
            run=run,
            name="reinforce",
        )
        return new.requires_grad_(False)

    def predictions(self, model: nn.Module, table: Table, run: Run) -> dict[str, Tensor]:
        """`labels`, [n] or [n, T] in the form of the table's own; and where `soft`, `probabilities` [n, C] or, of the
        next token, [n, T, V]."""
        reinforced = self.reinforced(model, table, run)
        labels, soft = [], []
        with evaluating(model.to(run.device)):
            for batch in table.batches(AT_ONCE, shuffle=False):
                moved = batch.to(run.device)
                v = self.generic(model, reinforced, moved)
                labels.append(_labels(v.argmax(-1), moved).cpu())
                soft += [v.float().softmax(-1).cpu()] if self.soft else []
        run.cost.rows += 2 * len(table)
        return {"labels": torch.cat(labels), **({"probabilities": torch.cat(soft)} if self.soft else {})}

    def generic(self, model: nn.Module, reinforced: nn.Module, batch: Batch) -> Tensor:
        """v_generic for the places of the rows, [B, C] or [B, T, V]; -inf where no label is looked for."""
        base, own = _base(model, batch), reinforced(**batch.inputs).logits
        v = generic(base, own, self._alpha, self.centre)
        if "lowered_ids" in batch.extra:
            v = v - self.lower * _held_down(batch, v)
        far = base < base.amax(-1, keepdim=True) - (torch.inf if self.within is None else self.within)
        return v.masked_fill(far, -torch.inf)

    def terms(self, model: nn.Module, forget: Batch, retain: Batch | None) -> Mean:
        batch = of_same_rows(self.relabelled, forget)
        loss = usual_loss(model, batch) if self.probabilities is None else self._soft(model, batch)
        return self.with_retain(loss, model, retain)

    def _soft(self, model: nn.Module, batch: Batch) -> Mean:
        """Cross-entropy against the generic distribution, mean over the places that have a label."""
        assert self.probabilities is not None and batch.labels is not None
        wanted = self.probabilities(batch)
        found = torch.log_softmax(model(**batch.inputs).logits.float(), -1)
        losses = -torch.where(wanted > 0, wanted * found, 0.0).sum(-1)
        if batch.labels.ndim == 1:
            return _over(losses, batch.labels != MISSING)
        return _over(losses[:, :-1], batch.labels[:, 1:] != IGNORED)

    def _guarded(self, model: nn.Module, request: Request, run: Run) -> nn.Module:
        run.report.say(
            "decode mode: no weight forgets anything; the answer alone is another, for as long as it is used"
        )
        with run.scope("forget"):
            start = model
            if self.lora:
                with run.seeded("adapters"):
                    start = lm.adapted(model, self.lora)
            reinforced = self.reinforced(start, rows(request.forget), run)
        reinforced = lm.merged(reinforced) if self.lora else reinforced
        return GenericLogits(copy.deepcopy(model).to(run.device), reinforced, self._alpha, self.centre)

    @property
    def _alpha(self) -> float:
        return ALPHA[self.mode] if self.alpha is None else self.alpha


def _base(model: nn.Module, batch: Batch) -> Tensor:
    """What the model says of the translated rows, at the places of the rows; of the rows themselves without any."""
    if "partner" not in batch.extra:
        return model(**batch.inputs).logits
    device = batch.inputs["input_ids"].device
    ids, mask, partner = (batch.extra[name].to(device) for name in ("translated_ids", "translated_mask", "partner"))
    told = model(input_ids=ids, attention_mask=mask).logits
    return told.gather(1, partner.clamp(min=0)[..., None].expand(-1, -1, told.shape[-1]))


def _held_down(batch: Batch, v: Tensor) -> Tensor:
    """1 for the tokens of replacements, at places where their terms have been read, [B, T, V]."""
    tokens, start = (batch.extra[name].to(v.device) for name in ("lowered_ids", "lowered_from"))
    row, k = (tokens >= 0).nonzero(as_tuple=True)
    held = torch.zeros_like(v)
    places = torch.arange(v.shape[1], device=v.device)
    held[row, :, tokens[row, k]] = (places >= start[row, k][:, None]).to(v.dtype)
    return held


def _labels(best: Tensor, batch: Batch) -> Tensor:
    """The labels of a batch with the best answers [B] or [B, T] in place of the old, and none where none is wanted."""
    assert batch.labels is not None
    if batch.labels.ndim == 1:
        return torch.where(batch.labels != MISSING, best, MISSING)
    asked = batch.labels[:, 1:] != IGNORED
    if "partner" in batch.extra:
        partner, repeated = (batch.extra[name].to(best.device) for name in ("partner", "repeated"))
        asked = asked & (partner[:, :-1] >= 0) & ~repeated[:, 1:]
    new = torch.full_like(batch.labels, IGNORED)
    new[:, 1:] = torch.where(asked, best[:, :-1], IGNORED)
    return new


def _over(losses: Tensor, asked: Tensor) -> Mean:
    return Mean.over(losses[asked].sum(), asked.sum())
