"""The examination of a model that was made to forget, and what may be certified of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engram.core.desk import Desk, What
from engram.core.environment import environment
from engram.core.forgetter import Forgetter
from engram.core.needs import Need
from engram.core.reading import rows_for
from engram.core.request import Classes
from engram.core.settings import make
from engram.core.stored import ACCOUNT, account_of, home_of, model_in, read_json
from engram.core.verbs import examine
from engram.core.verdict import overall
from engram.data.table import Table
from engram.engine.progress import Progress
from engram.engine.run import Run
from engram.errors import EngramError
from engram.files import check_sums, new_directory, refuse_existing
from engram.models import io
from engram.models.guards import is_guard

FORMAT = 1
AUDIT = "audit.json"


@dataclass
class Audit:
    """The examination of a model that was made to forget. `oracles`: directories of models retrained without the rows;
    at least five give verdicts. `test`: rows that no model was trained on."""

    before: Path
    after: Path
    data: str
    what: What
    test: str | None = None
    oracles: Sequence[Path] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    recipe: Path | None = None
    probes: Sequence[str] | None = None
    ignore_missing: bool = False
    device: str = "cpu"
    seed: int = 0

    def examine(
        self,
        out: str | Path,
        progress: Progress | None = None,
        finish: Callable[[Path, dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Probe the model and write the findings (`audit.json`) into the directory `out`; what it holds. `finish` is
        called with the directory and the findings before it stands under its name: what it adds comes with it."""
        target = Path(out)
        refuse_existing(target)
        desk = Desk(
            self.before,
            self.data,
            self.what,
            self.columns,
            recipe=self.recipe,
            ignore_missing=self.ignore_missing,
            device=self.device,
            seed=self.seed,
        )
        after = model_in(self.after)
        test = None if self.test is None else rows_for(home_of(self.before), desk.model, self.test, **self.columns)
        request = desk.request
        classes = request.what.labels if isinstance(request.what, Classes) else None
        run = Run(seed=self.seed, device=self.device, progress=progress)
        account = account_of(self.after)
        findings = examine(
            after,
            before=desk.model,
            forget=request.forget,
            retain=request.retain,
            test=test,
            classes=classes,
            oracles=[model_in(path) for path in self.oracles],
            recipe=request.at_hand.get(Need.RECIPE),
            forgetter=_forgetter(account.get("method")),
            probes=self.probes,
            run=run,
        )
        found = {
            "format": FORMAT,
            "request": {**self.what.words(), "records": len(request.ids)},
            "remarks": request.remarks(),
            "method": account.get("method"),
            "exact": account.get("exact", False),
            "weights_hold_it": is_guard(after),
            "residue": account.get("residue"),
            "before": io.digest(desk.model),
            "after": io.digest(after),
            "rows": {"forget": len(request.ids), "retain": _count(request.retain), "test": _count(test)},
            "oracles": len(self.oracles),
            "findings": [finding.as_dict() for finding in findings],
            "verdict": str(overall(findings)),
            "cost": asdict(run.cost),
            "environment": environment(self.device),
        }
        with new_directory(target) as fresh:
            (fresh / AUDIT).write_text(json.dumps(found, indent=1, ensure_ascii=False))
            if finish is not None:
                finish(fresh, found)
        return found


def _forgetter(described: Mapping[str, Any] | None) -> Forgetter | None:
    """The method that made the model, if it was a forgetter."""
    if described is None or not str(described.get("name", "")).startswith("forget."):
        return None
    made: Forgetter = make(dict(described))
    return made


def predicate(model: str | Path, audit: str | Path | None) -> dict[str, Any]:
    """What a certificate says of a model that `forget` wrote: what was asked and done, and what the audit found, if it
    was about these weights. EngramError if the model has no account, or the audit is of another model."""
    account = account_of(Path(model))
    if not account:
        raise EngramError(f"{model} has no {ACCOUNT}: only what engram forget wrote can be certified")
    stated = {
        "claim": _GUARDED if account["weights_hold_it"] else _CLAIMS[account["exact"]],
        **{key: account[key] for key in ("request", "method", "needed", "exact", "weights_hold_it", "residue")},
        "before": account["before"],
        "after": io.digest(model_in(Path(model))),
        "ledger": account.get("ledger"),
        "environment": account["environment"],
    }
    if audit is None:
        return {**stated, "audit": None}
    found = read_json(Path(audit) / AUDIT)
    check_sums(audit)
    if found.get("after") != stated["after"]:
        raise EngramError(f"the audit in {audit} is about another model than {model}")
    findings = [{k: v for k, v in finding.items() if k != "curve"} for finding in found["findings"]]
    kept = {key: found[key] for key in ("verdict", "rows", "oracles")}
    return {**stated, "audit": {**kept, "findings": findings}}


_CLAIMS = {
    True: "The method is exact: its result is that of never having learnt the records, up to the rounding it states.",
    False: "The method is approximate: nothing is claimed beyond the findings of the audit.",
}
_GUARDED = (
    "The weights still hold what was forgotten; a guard around them hides it. "
    "Nothing is claimed beyond the findings of the audit."
)


def _count(table: Table | None) -> int:
    return 0 if table is None else len(table)
