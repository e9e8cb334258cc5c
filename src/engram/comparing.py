"""The command that sets methods side by side: compare unlearning, continual or language."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from engram.commands import Command, progress_of, yaml_of
from engram.errors import EngramError, at_least


def add(command: Command) -> None:
    """Add the command to the command line."""
    compare = command("compare", _compare, "Many methods under one protocol: a table of every trial, a leaderboard.")
    compare.add_argument("what", choices=("unlearning", "continual", "language"))
    compare.add_argument(
        "--data", nargs="+", default=["sklearn:digits"], metavar="SOURCE", help="continual: one or several"
    )
    compare.add_argument("--test", nargs="+", default=[], metavar="SOURCE", help="default: a share of the rows")
    compare.add_argument("--limit", type=int, help="the first so many rows")
    compare.add_argument("--image-size", type=int, metavar="PIXELS", help="bring images to this height and width")
    compare.add_argument("--network", default="MLP", help='a name, or YAML as in "{name: ConvNet, widths: [16, 32]}"')
    compare.add_argument("--epochs", type=int, help="of training; default: 20, language: 22")
    compare.add_argument("--batch-size", type=int, metavar="ROWS", help="continual: of every learner that has one")
    compare.add_argument("--methods", nargs="+", default=[], metavar="METHOD", help="default: all that can be used")
    compare.add_argument(
        "--requests", nargs="+", default=["random", "class", "subclass"], metavar="KIND", help="of these three"
    )
    compare.add_argument(
        "--stream",
        nargs=2,
        type=int,
        action="append",
        metavar=("BASE", "INCREMENT"),
        help="continual: classes of the first and of each further task, default: 2 2; give it again for more streams",
    )
    compare.add_argument("--model", metavar="NAME", help="language: a directory or hub name to start from")
    compare.add_argument(
        "--authors", type=_count, default=20, metavar="N", help="language: how many are learnt, or all"
    )
    compare.add_argument(
        "--fractions", nargs="+", type=float, default=[0.1, 0.2, 0.5], help="language: to be forgotten"
    )
    compare.add_argument("--points", nargs="+", type=int, default=[2, 5, 10], help="language: epochs that are measured")
    compare.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2; class orders: 1993 1994 1995")
    compare.add_argument("--trials", type=int, help="settings that are tried for a method; default: 5, language: 3")
    compare.add_argument("--budget", type=float, help="seconds for these trials; default: 60, language: 600")
    compare.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    compare.add_argument("--device", default="cpu", help="language: cpu, cuda, …")
    compare.add_argument("--estimate", action="store_true", help="try a little, say what all of it will take, and stop")
    compare.add_argument("--out", metavar="DIR", help="goes on where there is one; --estimate needs none")


def _count(text: str) -> int | None:
    if text != "all" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor all")
    return None if text == "all" else int(text)


def _apart(words: list[str]) -> list[str]:
    """Words that may also have been given in one, with commas between them."""
    return [word for joined in words for word in joined.split(",") if word]


def _compare(given: argparse.Namespace, rest: list[str]) -> None:
    from engram.report import page

    shared = {"trials": given.trials, "budget": given.budget, "jobs": given.jobs, "epochs": given.epochs}
    shared = {key: value for key, value in shared.items() if value is not None}
    shared |= {"seeds": tuple(given.seeds)} if given.seeds else {}
    for name in ("trials", "jobs", "epochs", "batch_size", "limit", "image_size", "budget"):
        if (value := getattr(given, name)) is not None:
            at_least(f"--{name.replace('_', '-')}", value, 0 if name == "budget" else 1)
    if given.out is None and not given.estimate:
        raise EngramError("say where the comparison shall stand, with --out DIR")
    given.out = given.out or "."  # an estimate writes nothing
    given.methods, given.requests = (_apart(words) for words in (given.methods, given.requests))
    contest = CONTESTS[given.what](given, shared)
    if given.estimate or not (given.quiet or given.json):
        print(contest.estimate(), flush=True)
    if given.estimate:
        if tried := contest.trial():
            print(tried)
        return
    module = import_module(f"engram.compare.{given.what}")
    summary = module.summarise(contest.execute())
    network = given.network if given.what != "language" else given.model or "a GPT-2 from nothing"
    intro = f"{', '.join(given.data)}; {network}; seeds {', '.join(map(str, contest.plan.seeds))}"
    place = page.write_leaderboard(Path(given.out) / "leaderboard.html", summary, intro=intro)
    print(json.dumps(summary, indent=1) if given.json else "\n".join([*module.table_rows(summary), f"page: {place}"]))


def _single(given: argparse.Namespace) -> tuple[str, str | None]:
    """The one source, and its test rows."""
    if len(given.data) > 1 or len(given.test) > 1:
        raise EngramError(f"compare {given.what} takes one --data; several are for compare continual")
    return given.data[0], given.test[0] if given.test else None


def _forgetters(given: argparse.Namespace, shared: dict[str, Any]) -> Any:
    from engram.compare.unlearning import Comparison, Contest

    plan = Comparison(
        *_single(given),
        limit=given.limit,
        image_size=given.image_size,
        network=yaml_of("--network", given.network),
        methods=tuple(given.methods),
        requests=tuple(given.requests),
        **shared,
    )
    return Contest(plan, given.out, progress=progress_of(given))


def _learners(given: argparse.Namespace, shared: dict[str, Any]) -> Any:
    from engram.compare.continual import Comparison, Contest, Stream

    if given.test and len(given.test) != len(given.data):
        raise EngramError(f"{len(given.data)} --data and {len(given.test)} --test; give one for each, or none")
    pairs = zip(given.data, given.test or [None] * len(given.data), strict=True)
    common = {"network": yaml_of("--network", given.network), "epochs": shared.pop("epochs", 20)}
    plan = Comparison(
        tuple(
            Stream(data, test, base, increment, given.limit, given.image_size)
            for data, test in pairs
            for base, increment in given.stream or [(2, 2)]
        ),
        learners=tuple(given.methods),
        common=common | ({} if given.batch_size is None else {"batch_size": given.batch_size}),
        **shared,
    )
    return Contest(plan, given.out, progress=progress_of(given))


def _speakers(given: argparse.Namespace, shared: dict[str, Any]) -> Any:
    from engram.compare.language import Comparison, Contest

    plan = Comparison(
        _single(given)[0],
        model=given.model,
        authors=given.authors,
        fractions=tuple(given.fractions),
        points=tuple(given.points),
        methods=tuple(given.methods),
        device=given.device,
        **shared,
    )
    return Contest(plan, given.out, progress=progress_of(given))


CONTESTS: dict[str, Callable[[argparse.Namespace, dict[str, Any]], Any]] = {
    "unlearning": _forgetters,
    "continual": _learners,
    "language": _speakers,
}
