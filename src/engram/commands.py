"""The commands of the erasure desk: forget, audit, prepare, certificate, ledger."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engram.errors import EngramError

Command = Callable[[str, Callable[..., int | None], str], argparse.ArgumentParser]
EXITS = {"pass": 0, "fail": 1, "unknown": 3}  # 2: a wrong command
COLUMNS = {
    "id": "of the records' ids (default: id, or row numbers)",
    "label": "of labels (default: label)",
    "text": "of texts (default: text)",
    "image": "of images (default: image)",
    "prompt": "of what stands before the text, for language models",
}


def add(command: Command) -> None:
    """Add the commands to the command line."""
    forget = command("forget", _forget, "Make a saved model forget records, classes or a concept; write a new one.")
    forget.add_argument("--model", required=True, metavar="DIR", help="a saved model, or a learner's directory")
    _request(forget)
    forget.add_argument("--method", default="auto", help='a forgetter, as in "ssd" (see engram methods); default: auto')
    forget.add_argument("--ranking", metavar="FILE", help="the order of auto, as engram compare unlearning wrote it")
    forget.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method")
    forget.add_argument("--out", required=True, metavar="DIR", help="where the new model goes")
    forget.add_argument("--resume", action="store_true", help="go on with a request that was interrupted")
    forget.add_argument("--recipe", metavar="FILE", help="how to train one more model (YAML), for methods that retrain")
    forget.add_argument("--statistics", metavar="DIR", help="what engram prepare stored")
    forget.add_argument("--held-out", metavar="SOURCE", help="rows never seen: stop if the forget rows are no likelier")
    forget.add_argument("--force", action="store_true", help="go on all the same")
    forget.add_argument("--reason", default="", help="free text for the ledger; it stays for ever: no names")
    ledger_place(forget, needed=False)

    audit = command("audit", _audit, "Examine a model that was made to forget; the exit code tells the verdict.")
    audit.epilog = "Exit code: 0 pass, 1 fail, 3 unknown (2: the command was wrong)."
    audit.add_argument("--before", required=True, metavar="DIR", help="the model, or learner, as it was")
    audit.add_argument("--after", required=True, metavar="DIR", help="what engram forget made of it")
    _request(audit)
    audit.add_argument("--test", metavar="SOURCE", help="rows that no model was trained on")
    audit.add_argument("--oracle", nargs="+", default=[], metavar="DIR", help="models retrained without the records")
    audit.add_argument("--recipe", metavar="FILE", help="trains such models instead (YAML)")
    audit.add_argument("--probes", nargs="+", metavar="PROBE", help="default: all that can be used of three")
    audit.add_argument("--out", required=True, metavar="DIR", help="where the findings and the report go")
    ledger_place(audit, needed=False)

    prepare = command("prepare", _prepare, "Store today what lets a model forget later, when the data are gone.")
    prepare.add_argument("--model", required=True, metavar="DIR", help="a saved model, or a learner's directory")
    prepare.add_argument("--method", default="ssd", help="the forgetter that it is for (default: ssd)")
    prepare.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method")
    prepare.add_argument("--out", required=True, metavar="DIR", help="where the statistics go")
    _rows(prepare)
    ledger_place(prepare, needed=False)

    protect = command("protect", _protect, "Write a copy of a table of images that is harder to learn from.")
    protect.add_argument("--method", default="bayes-error-noise", help="a protector (default: bayes-error-noise)")
    protect.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method")
    protect.add_argument("--out", required=True, metavar="FILE", help="the copy, a .parquet file")
    _rows(protect)

    certificate = command("certificate", _certificate, "Signed statements of what was asked, done and found.")
    certificate.add_argument("what", choices=("keygen", "issue", "verify"))
    certificate.add_argument("file", nargs="?", metavar="FILE", help="verify: the certificate; keygen: the key to make")
    certificate.add_argument("--model", metavar="DIR", help="issue: what engram forget wrote; verify: check its files")
    certificate.add_argument("--audit", metavar="DIR", help="issue: what engram audit wrote")
    certificate.add_argument("--key", metavar="FILE", help="issue: the private key; verify: the public one")
    certificate.add_argument("--out", default="certificate.json", metavar="FILE", help="issue: the certificate")
    ledger_place(certificate, needed=False)

    ledger = command("ledger", _ledger, "The account of which records went where, and what became of them.")
    ledger.add_argument("what", choices=("show", "verify", "export", "where", "purge", "new-key"))
    ledger.add_argument("record", nargs="?", metavar="ID", help="where, purge: the id of a record")
    ledger.add_argument("--head", metavar="HASH", help="verify: the hash of an entry, known from elsewhere")
    ledger.add_argument("--models", action="store_true", help="purge: delete models and learners too")
    ledger.add_argument("--yes", action="store_true", help="purge: do not ask")
    ledger_place(ledger, needed=True)


def _request(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--forget", metavar="FILE", help="a file with one record id a line")
    what.add_argument("--classes", nargs="+", default=[], metavar="CLASS", help="whole classes, by name or number")
    what.add_argument("--where", metavar="CONDITION", help='records by a column, as in "customer == 17"')
    what.add_argument("--concept", metavar="TEXT", help="a concept, for methods that take one")
    parser.add_argument("--ignore-missing", action="store_true", help="go on without ids that are not in the data")
    _rows(parser)


def _rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="SOURCE", help="the training rows, as far as they are at hand")
    columns(parser, *COLUMNS)
    work(parser)


def columns(parser: argparse.ArgumentParser, *names: str) -> None:
    """The arguments that name columns of the rows."""
    for name in names:
        parser.add_argument(f"--{name}", metavar="COLUMN", help=f"the column {COLUMNS[name]}")


def work(parser: argparse.ArgumentParser) -> None:
    """Seed and device."""
    parser.add_argument("--seed", type=int, default=0, help="every random draw follows from it (default: 0)")
    device(parser)


def device(parser: argparse.ArgumentParser) -> None:
    """Where it computes."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default: cpu)")


def ledger_place(parser: argparse.ArgumentParser, *, needed: bool) -> None:
    """The arguments that name a ledger."""
    default = "ledger.sqlite" if needed else None
    parser.add_argument("--ledger", default=default, metavar="PLACE", help="a file, or a database's URL")
    parser.add_argument("--ledger-key", metavar="FILE", help="the key of its records (default: beside it)")


def _forget(given: argparse.Namespace, rest: list[str]) -> None:
    from engram.core.desk import Desk

    desk = Desk(
        Path(given.model),
        given.data,
        _what(given),
        _columns(given),
        recipe=_path(given.recipe),
        statistics=_path(given.statistics),
        ranking=_path(given.ranking),
        ignore_missing=given.ignore_missing,
        device=given.device,
        seed=given.seed,
    )
    choice = desk.choose(_method(given.method, given.set, given.ranking))
    if given.held_out is not None and not given.force:
        desk.is_known(given.held_out)
    if not (given.quiet or given.json):
        print("\n".join([*choice.lines(), *(f"note: {remark}" for remark in desk.request.remarks())]), flush=True)
    done = desk.forget(
        choice, given.out, resume=given.resume, ledger=opened(given), reason=given.reason, progress=progress_of(given)
    )
    if given.json:
        print(json.dumps({"directory": given.out, **done}, indent=1))
        return
    kind = "exact" if done["exact"] else "approximate: engram audit can say how near it came to retraining"
    print(f"{done['request']['records']} records forgotten by {choice.name} ({kind}); the model stands in {given.out}")
    if done.get("lost"):
        shares = ", ".join(f"{name} {share:.0%}" for name, share in done["lost"].items())
        print(f"what the classes that stay lost with it, of all that was stored of each: {shares}")


def _audit(given: argparse.Namespace, rest: list[str]) -> int:
    from engram.core.examination import Audit
    from engram.report.page import REPORT, write_audit

    audit = Audit(
        Path(given.before),
        Path(given.after),
        given.data,
        _what(given),
        given.test,
        [Path(path) for path in given.oracle],
        _columns(given),
        recipe=_path(given.recipe),
        probes=given.probes,
        ignore_missing=given.ignore_missing,
        device=given.device,
        seed=given.seed,
    )
    ledger = opened(given)

    def finish(folder: Path, found: dict[str, Any]) -> None:
        """The page, and the ledger's entry, before the audit stands there: a kill leaves nothing out."""
        write_audit(folder)
        if ledger is not None:
            held = ledger.holder_of(given.after, found["after"])
            names = {finding["name"]: finding["verdict"] for finding in found["findings"]}
            ledger.add("findings", {"holder": held and held.number, "verdict": found["verdict"], "findings": names})

    found = audit.examine(given.out, progress_of(given), finish)
    if given.json:
        print(json.dumps(found, indent=1))
    else:
        for remark in found["remarks"]:
            print(f"note: {remark}")
        print(_findings(found) + f"\nverdict: {found['verdict']}\nreport: {Path(given.out) / REPORT}")
    return EXITS[found["verdict"]]


def _findings(found: dict[str, Any]) -> str:
    lines = []
    for finding in found["findings"]:
        low, high = finding["interval"] or (float("nan"),) * 2
        mean = sum(finding["reference"]) / len(finding["reference"]) if finding["reference"] else float("nan")
        verdict = "" if finding["verdict"] == "none" else finding["verdict"]
        lines.append(f"{finding['name']:<44} {finding['value']:>8.3f}  [{low:.3f}, {high:.3f}] {mean:>8.3f}  {verdict}")
    return "\n".join([f"{'finding':<44} {'value':>8}  {'95 % interval':<15} {'oracles':>8}  verdict", *lines])


def _prepare(given: argparse.Namespace, rest: list[str]) -> None:
    from engram.core.desk import prepare

    method = _method(given.method, given.set)
    where = (given.seed, given.device, opened(given))
    kinds, table = prepare(Path(given.model), given.data, method, given.out, _columns(given), *where)
    print(json.dumps(kinds) if given.json else f"{', '.join(kinds)} of {len(table)} rows stand in {given.out}")


def _protect(given: argparse.Namespace, rest: list[str]) -> None:
    import torch

    from engram.core.protector import Protector
    from engram.core.settings import make, name_of
    from engram.data.readers import read_with
    from engram.data.writers import parquet
    from engram.engine.run import Run
    from engram.files import refuse_existing, write_atomic

    if Path(given.out).suffix.lower() != ".parquet":
        raise EngramError(
            f"{given.out}: protected rows are written as Parquet; give --out a name that ends in .parquet"
        )
    method = make(_method(given.method, given.set), wing="protect")
    if not isinstance(method, Protector):
        raise EngramError(f"{name_of(method)} is no protector; engram methods --wing protect lists them")
    columns: dict[str, Any] = {**_columns(given)}
    refuse_existing(given.out)
    table, plan = read_with(given.data, **columns)
    found = method.protect(table, Run(seed=given.seed, device=given.device, progress=progress_of(given)))
    names = {"id": columns.get("id", "id"), "label": plan.label[0], "image": plan.image or "image"}
    write_atomic(given.out, parquet(found, **names))
    before, after = (one.batch(torch.arange(len(one))).inputs["pixel_values"] for one in (table, found))
    change = float((after.double() - before.double()).abs().max())
    told = {"method": name_of(method), "file": given.out, "rows": len(found), "largest_change": change}
    print(
        json.dumps(told) if given.json else f"{len(found)} rows, changed by at most {change:.4g}, stand in {given.out}"
    )


def _certificate(given: argparse.Namespace, rest: list[str]) -> None:
    from engram.core import certificate

    if given.what == "keygen":
        private, public = certificate.keygen(given.file or given.key or "desk.key")
        print(
            json.dumps([str(private), str(public)]) if given.json else f"private key: {private}\npublic key: {public}"
        )
    elif given.what == "issue":
        _issue(given)
    else:
        stated = certificate.verify(
            _needed(given.file, "the certificate's file"), _needed(given.key, "--key"), given.model
        )
        about = f"and of the files in {given.model}" if given.model else "(give --model to check the weights too)"
        print(json.dumps(stated, indent=1) if given.json else f"the certificate holds: byte for byte as signed {about}")


def _issue(given: argparse.Namespace) -> None:
    from engram.core import certificate
    from engram.core.examination import predicate
    from engram.files import refuse_existing, write_atomic

    model, key = _needed(given.model, "--model"), _needed(given.key, "--key")
    stated = predicate(model, given.audit)
    text = certificate.issue(model, stated, key)
    refuse_existing(given.out)
    ledger = opened(given)
    if ledger is not None:  # before the file: a kill between the two leaves no certificate that nobody noted
        import hashlib

        held = ledger.holder_of(model, stated["after"])
        digest = hashlib.sha256(text.encode()).hexdigest()
        ledger.add("certificate", {"holder": held and held.number, "sha256": digest})
    write_atomic(given.out, text)
    print(json.dumps({"certificate": given.out}) if given.json else f"certificate: {given.out}")


def _ledger(given: argparse.Namespace, rest: list[str]) -> int | None:
    from engram.core.ledger import Ledger

    if "://" not in given.ledger and not Path(given.ledger).exists():
        raise EngramError(f"there is no ledger {given.ledger}; engram forget --ledger {given.ledger} … begins one")
    ledger = Ledger(given.ledger, given.ledger_key)
    if given.what in ("where", "purge"):
        record = _needed(given.record, "the id of a record")
        ledger.verify()
        show = _purge if given.what == "purge" else _where
        return show(ledger, record, given)
    if given.what == "export":
        print(f"[{', '.join(ledger.export())}]" if given.json else "\n".join(ledger.export()))
    elif given.what == "new-key":
        ledger.new_key()
        said = f"a new key stands in {ledger.key_file}; records so far cannot be looked up any more"
        print(json.dumps({"key": str(ledger.key_file)}) if given.json else said)
    elif given.what == "verify":
        last = ledger.verify(given.head)
        where = {"entries": last.number if last else 0, "head": last.hash if last else None}
        print(
            json.dumps(where) if given.json else f"{where['entries']} entries, nothing changed; head: {where['head']}"
        )
    else:
        entries = ledger.entries()
        print(json.dumps([vars(e) for e in entries], indent=1) if given.json else "\n".join(map(_line, entries)))
    return None


def _line(entry: Any) -> str:
    shown = {key: value for key, value in entry.body.items() if key not in ("members", "environment", "cost")}
    return f"{entry.number:>4}  {entry.time}  {entry.kind:<12} {json.dumps(shown, ensure_ascii=False)}"


def _where(ledger: Any, record: str, given: argparse.Namespace) -> int:
    found = ledger.where(record)
    if given.json:
        print(json.dumps([vars(holding) for holding in found], indent=1))
    else:
        print("\n".join(map(_holding, found)) or "nothing in this ledger has learnt that record")
    return 0


def _purge(ledger: Any, record: str, given: argparse.Namespace) -> int:
    found = [holding for holding in ledger.where(record) if holding.standing]
    if given.json:
        if not given.yes:
            raise EngramError("purge deletes files: say --yes with --json, where nobody is asked")
        ledger.purge(record, models=given.models)
        print(json.dumps([{**vars(holding), "fate": _fate(holding, given.models)} for holding in found], indent=1))
        return 0
    if not found:
        print("nothing that still stands has learnt that record")
        return 0
    print("\n".join(f"{_fate(holding, given.models):<6}: {_holding(holding)}" for holding in found), flush=True)
    if not given.yes and not _agreed():
        print("nothing was deleted")
        return 1
    ledger.purge(record, models=given.models)
    print(f"{len(found)} deleted or flagged")
    return 0


def _fate(holding: Any, models: bool) -> str:
    return "flag" if holding.what in ("model", "learner") and not models else "delete"


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise EngramError("purge deletes files: say --yes where nobody can be asked")
    try:
        return input("go on? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _holding(holding: Any) -> str:
    state = "" if holding.standing else " (gone)"
    forgotten = f"; forgotten by {holding.forgotten}" if holding.forgotten else ""
    return f"entry {holding.entry}: {holding.what} {holding.path}{state}{forgotten}"


def _what(given: argparse.Namespace) -> Any:
    from engram.core.desk import What

    return What(_path(given.forget), tuple(given.classes), given.where, given.concept)


def _method(name: str, settings: list[str], ranking: str | None = None) -> Any:
    """The name, or {"name": …, setting: value}; values are read as YAML."""
    for setting in settings:
        if not all(setting.partition("=")):
            raise EngramError(f"--set takes KEY=VALUE, as in --set epochs=3, not {setting!r}")
    pairs = dict(setting.partition("=")[::2] for setting in settings)
    if name != "auto" and ranking is not None:
        raise EngramError("--ranking goes with --method auto, not with one of your own choice")
    if name == "auto" and pairs:
        raise EngramError("--set goes with a --method of your own choice, not with auto")
    values = {key: yaml_of(key, value) for key, value in pairs.items()}
    return {"name": name, **values} if values else name


def yaml_of(key: str, text: str) -> Any:
    """A value of the command line, read as YAML."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise EngramError(f"{key}={text} cannot be read as YAML: {str(error).splitlines()[0]}") from error


def _columns(given: argparse.Namespace) -> dict[str, str]:
    return {key: value for key in COLUMNS if (value := getattr(given, key)) is not None}


def opened(given: argparse.Namespace) -> Any:
    """The ledger that a command line names, verified; None if it names none."""
    if given.ledger is None:
        return None
    from engram.core.ledger import Ledger

    ledger = Ledger(given.ledger, given.ledger_key)
    ledger.verify()
    ledger.check_key()
    return ledger


def progress_of(given: argparse.Namespace) -> Any:
    from engram.engine.progress import Silent, Terminal

    return Silent() if given.quiet or given.json else Terminal()


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _needed(value: str | None, name: str) -> str:
    if value is None:
        raise EngramError(f"{name} is missing; see --help of the command")
    return value
