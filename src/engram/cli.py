"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engram import __version__, catalogue, comparing
from engram import commands as commands_of_the_desk
from engram.errors import EngramError

EXIT_WRONG = 2
EXIT_INTERRUPTED = 130
COLUMNS = ("id", "label", "text", "image")
PRECISIONS = ("float32", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. What the user can mend ends in one sentence and exit code 2."""
    parser = _parser()
    known, rest = parser.parse_known_args(argv)
    if not hasattr(known, "do"):
        parser.print_help()
        return 0
    try:
        if rest and known.command != "run":
            raise EngramError(f"unexpected argument {rest[0]!r}; see engram {known.command} --help")
        return known.do(known, rest) or 0
    except EngramError as error:
        print(f"engram: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_WRONG
    except BrokenPipeError:  # the reader (head, less) has had enough
        sys.stderr.close()
        return 0
    except OSError as error:
        print(f"engram: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        return EXIT_WRONG
    except KeyboardInterrupt:
        print(f"engram: interrupted; {_afterwards(known)}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _afterwards(given: argparse.Namespace) -> str:
    """What the user of a command that was interrupted can do."""
    if hasattr(given, "resume"):
        return "the same command with --resume goes on with what was begun"
    return f"the same command {'goes on with it' if given.command == 'compare' else 'starts anew'}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="engram",
        description="Learn, keep, forget, protect, recall and audit the knowledge in a trained model.",
    )
    parser.add_argument("--version", action="version", version=f"engram {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, do: Callable[..., int | None], text: str, **json: Any) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text)
        found.set_defaults(do=do)
        found.add_argument("--json", **(json or {"action": "store_true", "help": "print JSON"}))
        found.add_argument("--quiet", action="store_true", help="print results only")
        return found

    run = command("run", _run, "Run a timeline: learn and forget events with audits between them, and a report.")
    run.add_argument("config", help="a YAML file, or the name of one that comes with engram: quickstart or facts")
    run.add_argument("--out", default=None, metavar="DIR", help="the run directory (default: runs/NAME)")
    run.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    run.add_argument("--seed", type=int, help="another seed than the config's")
    run.add_argument("--device", help="cpu, cuda, …")
    run.add_argument("--precision", choices=PRECISIONS, help="bfloat16: training by autocast")
    run.add_argument("--batch-size", type=int, metavar="ROWS", help="the batch size of every learner that has one")
    run.add_argument("--show-content", action="store_true", help="show the forgotten records in the report")
    commands_of_the_desk.ledger_place(run, needed=False)
    run.epilog = (
        "Any value of the config can be set: --key.sub=value, as in --learners.network.epochs=5 (lists: --events.1…)."
    )

    papers = command("papers", _papers, "The papers that engram brings together, and what works.")
    papers.add_argument("--wing", help=", ".join(catalogue.WINGS))
    methods = command(
        "methods", _methods, "The methods, with what each cannot do without; or one method and its settings."
    )
    methods.add_argument("method", nargs="?", help="one method, as in SSD or forget.Finetune: its settings")
    methods.add_argument("--wing", help=", ".join(catalogue.WINGS))
    methods.add_argument("--have", metavar="NEED,…", help="list what is possible with these, as in model,forget-rows")

    report = command("report", _report, "Render the report of runs again, or compare runs.")
    report.add_argument("runs", nargs="+", metavar="DIR", help="the directory of a run that is finished")
    report.add_argument("--show-content", action="store_true", help="show the forgotten records in the report")
    to_file = "write the claims to FILE; without one, print JSON"
    reproduce = command(
        "reproduce",
        _reproduce,
        "A paper's own claims as a small experiment.",
        nargs="?",
        const=True,
        metavar="FILE",
        help=to_file,
    )
    reproduce.add_argument("slug", nargs="?", help="the paper, as in `engram papers`")
    reproduce.add_argument("--scale", choices=("smoke", "small", "full"), default="small", help="1, 3 or 5 seeds")
    reproduce.epilog = "Exit code: 0 all claims within their bands, 1 not all (2: the command was wrong)."

    commands_of_the_desk.add(command)
    comparing.add(command)
    learn = command("learn", _learn, "Go on learning: a learner's directory takes in a new table.")
    learn.add_argument(
        "--learner", required=True, metavar="DIR", help="a learner's directory (DIR/models/NAME of a run)"
    )
    commands_of_the_desk.ledger_place(learn, needed=False)
    learn.add_argument("--out", required=True, metavar="DIR", help="where the learner goes that has learnt more")
    learn.add_argument(
        "--batch-size", type=int, metavar="ROWS", help="becomes the learner's batch_size, for later tasks too"
    )
    predict = command("predict", _predict, "Predict the rows of a table with a saved model or learner.")
    predict.epilog = "Prints a JSON object a line, or with --json all in one list; with --out the lines go there."
    predict.add_argument("--model", required=True, metavar="DIR", help="a saved model, or a learner's directory")
    predict.add_argument("--out", metavar="FILE", help="write the predictions there, a JSON object a line")
    predict.add_argument("--batch-size", type=int, default=256, metavar="ROWS", help="rows at once (default: 256)")
    for sub in (learn, predict):
        sub.add_argument("--data", required=True, metavar="SOURCE", help="a file, a folder of images, or sklearn:NAME")
        sub.add_argument("--precision", choices=PRECISIONS, default="float32", help="bfloat16: by autocast")
        commands_of_the_desk.columns(sub, *COLUMNS)
    commands_of_the_desk.work(learn)
    commands_of_the_desk.device(predict)
    return parser


def _run(given: argparse.Namespace, rest: list[str]) -> None:
    from engram.core.running import Running, override, read_config
    from engram.engine.progress import Silent, Terminal
    from engram.report.page import write_report

    settings = ("seed", "device", "precision", "batch_size")
    changes = {key: getattr(given, key) for key in settings if getattr(given, key) is not None}
    config = override(read_config(given.config), {**changes, **_dotted(rest)})
    out = Path(given.out or f"runs/{Path(given.config).stem}")
    running = Running(
        config,
        out,
        resume=given.resume,
        progress=Silent() if given.quiet else Terminal(),
        show_content=given.show_content,
    )
    ledger = commands_of_the_desk.opened(given)
    if not given.quiet and not given.json:
        print("\n".join([f"{out} is finished"] if running.finished else running.outline()), flush=True)
    records = running.reread() if running.finished else running.execute()
    page = write_report(out, show_content=given.show_content)
    if ledger is not None:
        from engram.core.registered import register

        register(running, records, ledger)
    running.finish()
    if given.json:
        print(json.dumps({"directory": str(out), "report": str(page), "events": records}, indent=1))
        return
    print(_summary(records))
    print(f"report: {page}")


def _summary(records: list[dict[str, Any]]) -> str:
    """The last event of each learner in a few columns."""
    lines = [f"{'learner':<12} {'event':<28} {'accuracy':>9} {'seconds':>8}  verdicts"]
    for record in records:
        if record["kind"] == "learn" and record is not _last_learning(records, record["learner"]):
            continue
        right, n = (sum(entry[key] for entry in record["accuracy"]) for key in ("hits", "n"))
        verdicts = [f["verdict"] for f in record.get("findings", []) if f["verdict"] != "none"]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("pass", "fail", "unknown") if v in verdicts)
        accuracy = f"{right / n:>9.3f}" if n else f"{'-':>9}"
        title = "learnt all tasks" if record["kind"] == "learn" else record["title"]
        lines.append(f"{record['learner']:<12} {title:<28} {accuracy} {record['cost']['seconds']:>8.1f}  {counts}")
    return "\n".join(lines)


def _last_learning(records: list[dict[str, Any]], learner: str) -> dict[str, Any]:
    return [r for r in records if r["kind"] == "learn" and r["learner"] == learner][-1]


def _papers(given: argparse.Namespace, rest: list[str]) -> None:
    found = [paper for paper in catalogue.papers() if given.wing in (None, paper.wing)]
    if not found:
        raise EngramError(f"there is no wing {given.wing!r}; there are {', '.join(catalogue.WINGS)}")
    if given.json:
        print(json.dumps([vars(paper) for paper in found], indent=1))
        return
    for paper in found:
        print(f"{paper.slug:<36} {paper.wing:<8} {paper.year}  {paper.status:<24} {paper.claim}")


def _methods(given: argparse.Namespace, rest: list[str]) -> None:
    if given.method:
        print(_settings(given.method, given.json))
        return
    have = {name.strip() for name in given.have.split(",")} if given.have is not None else None
    options = catalogue.possible(have or set(), given.wing)
    if given.json:
        print(json.dumps([_option(option, have) for option in options if have is None or option.usable], indent=1))
        return
    if have is not None and not any(option.usable for option in options):
        print(
            f"no method of this wing can do with {', '.join(sorted(have)) or 'nothing'}; without --have all are listed"
        )
    for option in options:
        if have is None or option.usable:
            needs = " or ".join(" + ".join(sorted(n)) or "nothing special" for n in option.method.needs)
            setting = f" [{option.setting}]" if have is not None and option.setting else ""
            print(f"{option.method.name + setting:<28} {option.method.summary}\n{'':<28}   needs: {needs}")


def _option(option: catalogue.Possible, have: set[str] | None) -> dict[str, Any]:
    row = option.method
    plain = {"name": row.name, "wing": row.wing, "paper": row.paper, "summary": row.summary, "exact": row.exact}
    return {**plain, "needs": [sorted(n) for n in row.needs], "setting": option.setting}


def _settings(name: str, as_json: bool) -> str:
    """One method's settings with their defaults, and its docstring."""
    import dataclasses
    import inspect

    from engram.core.settings import describe, load_class

    cls = load_class(name)
    if as_json:
        return json.dumps(describe(cls()), indent=1)
    defaults = describe(cls())
    types = {field.name: field.type for field in dataclasses.fields(cls) if field.init}
    lines = [inspect.getdoc(inspect.getmodule(cls)) or "", "", inspect.getdoc(cls) or "", "", "settings:"]
    lines += [f"  {key}: {types[key]} = {json.dumps(defaults[key])}" for key in types]
    return "\n".join(lines)


def _report(given: argparse.Namespace, rest: list[str]) -> None:
    from engram.report.page import write_comparison, write_report

    pages = [write_report(run, show_content=given.show_content) for run in given.runs]
    if len(pages) > 1:
        pages.append(write_comparison(given.runs))
    print(json.dumps([str(page) for page in pages]) if given.json else "\n".join(str(page) for page in pages))


def _reproduce(given: argparse.Namespace, rest: list[str]) -> int:
    from engram.files import refuse_existing, write_atomic
    from engram.reproduce.claims import reproduce, table

    if given.slug is None:
        raise EngramError("say which paper, and say it first, as in engram reproduce ssd --json FILE")
    file = None if given.json in (None, True) else Path(given.json)
    if file is not None:
        refuse_existing(file, "--json FILE")
    claims = reproduce(given.slug, given.scale)
    content = json.dumps([claim.as_dict() for claim in claims], indent=1)
    print(content if given.json is True else table(given.slug, given.scale, claims))
    if file is not None:
        write_atomic(file, content + "\n")
    return 0 if all(claim.inside for claim in claims) else 1


def _learn(given: argparse.Namespace, rest: list[str]) -> None:
    from engram.core.onward import learn_more

    ledger = commands_of_the_desk.opened(given)
    learner, rows = learn_more(
        given.learner,
        given.data,
        given.out,
        seed=given.seed,
        device=given.device,
        precision=given.precision,
        batch_size=given.batch_size,
        ledger=ledger,
        **_columns(given),
    )
    text = {"learner": learner, "rows": rows, "directory": given.out}
    print(json.dumps(text) if given.json else f"{learner} took in {rows} rows; it stands in {given.out}")


def _predict(given: argparse.Namespace, rest: list[str]) -> None:
    from engram.core.onward import predict_rows
    from engram.files import refuse_existing, write_atomic

    if given.out:
        refuse_existing(given.out)
    how: dict[str, Any] = {key: getattr(given, key) for key in ("device", "precision", "batch_size")}
    found = predict_rows(given.model, given.data, **how | _columns(given))
    lines = "\n".join(json.dumps(row) for row in found)
    if not given.out:
        print(json.dumps(found, indent=1) if given.json else lines)
        return
    write_atomic(Path(given.out), lines + "\n")
    if given.json:
        print(json.dumps({"file": given.out, "rows": len(found)}))
    elif not given.quiet:
        print(f"predictions of {len(found)} rows stand in {given.out}")


def _columns(given: argparse.Namespace) -> dict[str, str]:
    return {key: value for key in COLUMNS if (value := getattr(given, key)) is not None}


def _dotted(rest: Sequence[str]) -> dict[str, Any]:
    """--key.sub=value and --key.sub value pairs; values are read as YAML."""
    found: dict[str, Any] = {}
    words = iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise EngramError(f"unexpected argument {word!r}; a config value is set with --key.sub=value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, "")
        if not key or value == "":
            raise EngramError(f"--{key} needs a value, as in --{key or 'key'}=value")
        found[key] = commands_of_the_desk.yaml_of(f"--{key}", value)
    return found


if __name__ == "__main__":
    sys.exit(main())
