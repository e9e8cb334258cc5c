"""The erasure desk: what goes in, what comes out, and what is refused with a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits

import engram
from engram.cli import main
from engram.core.ledger import Ledger
from engram.core.persist import save_learner
from engram.core.stored import read_statistics
from engram.data.readers import read, read_with, train_test
from engram.data.task import Task
from engram.engine.cache import FeatureCache
from engram.engine.optimizer import Optimizer
from engram.engine.recipe import Recipe
from engram.keep.acu import ACU
from engram.keep.key_value import KeyValueBottleneck
from engram.models.io import digest, load

RECIPE = Recipe({"name": "MLP", "hidden": [16]}, Optimizer("adam", lr=0.01), epochs=5)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of four digits, a network and an ACU learner that learnt them, and a list of ids."""
    home = tmp_path_factory.mktemp("desk")
    x, y = load_digits(n_class=4, return_X_y=True)
    names = [("zero", "one", "two", "three")[c] for c in y]
    ids = [f"digit-{k}" for k in range(len(y))]
    rows = pa.table({"id": ids, **{f"p{j}": x[:, j] for j in range(1, 64)}, "label": names})
    pq.write_table(rows.slice(0, 400), home / "train.parquet")
    pq.write_table(rows.slice(400), home / "test.parquet")
    table, preprocessing = read_with(home / "train.parquet")
    engram.save(RECIPE(table, 0), home / "model")
    preprocessing.save(home / "model")
    learner = ACU(size=64)
    learner.learn(Task(table, None, 0, table.classes, table.names))
    save_learner(learner, home / "learner", tasks=1)
    preprocessing.save(home / "learner")
    (home / "ids.txt").write_text("\n".join(f"digit-{k}" for k in range(12)) + "\n\ndigit-3\n")
    (home / "recipe.yaml").write_text(
        "network: {name: MLP, hidden: [16]}\noptimizer: {name: adam, lr: 0.01}\nepochs: 5\n"
    )
    return home


def engram_(desk: Path, command: str, *more: str) -> int:
    words = [word.replace("@", f"{desk}/") for word in command.split()]
    return main([*words, *more])


def forget(
    desk: Path, out: Path, *more: str, model: str = "model", what: Sequence[str] = ("--forget", "@ids.txt")
) -> int:
    named = [word.replace("@", f"{desk}/") for word in what]
    return engram_(desk, f"forget --model @{model} --data @train.parquet --out {out}", *named, *more)


def test_a_model_forgets_and_stays_as_it_was(desk: Path, tmp_path: Path) -> None:
    before = digest(load(desk / "model"))
    assert forget(desk, tmp_path / "new", "--method", "ssd", "--set", "alpha=1.5") == 0
    account = json.loads((tmp_path / "new" / "erasure.json").read_text())
    assert account["request"] == {"records": 12} and account["method"]["alpha"] == 1.5
    assert not account["exact"] and account["residue"] == 12 and account["before"] == before
    assert "digit-3" not in (tmp_path / "new" / "erasure.json").read_text()
    assert digest(load(desk / "model")) == before != digest(load(tmp_path / "new"))
    assert (tmp_path / "new" / "preprocessing.json").exists() and not Path(f"{tmp_path}/new.work").exists()


def test_retraining_with_a_recipe_is_the_recipe_without_the_rows(desk: Path, tmp_path: Path) -> None:
    assert forget(desk, tmp_path / "new", "--recipe", str(desk / "recipe.yaml")) == 0
    account = json.loads((tmp_path / "new" / "erasure.json").read_text())
    assert account["exact"] and account["method"]["name"] == "forget.Retrain" and account["residue"] == 0
    assert "recipe" in account["needed"]


def test_a_learner_forgets_in_its_own_way_and_goes_on_learning(desk: Path, tmp_path: Path) -> None:
    assert forget(desk, tmp_path / "new", model="learner") == 0
    account = json.loads((tmp_path / "new" / "erasure.json").read_text())
    assert account["exact"] and account["method"]["name"] == "keep.ACU" and account["residue"] == 0
    more = f"learn --learner {tmp_path}/new --data @test.parquet --out {tmp_path}/more"
    assert engram_(desk, more) == 0
    assert forget(desk, tmp_path / "again", "--quiet", model="learner", what=("--classes", "two")) == 0


def test_what_forgetting_cost_the_classes_that_stay_is_told(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, preprocessing = read_with(desk / "train.parquet")
    learner = KeyValueBottleneck.tiny()
    learner.learn(Task(table, None, 0, table.classes, table.names))
    save_learner(learner, tmp_path / "cells", tasks=1)
    preprocessing.save(tmp_path / "cells")
    words = f"forget --model {tmp_path}/cells --data @train.parquet --out {tmp_path}/new --classes two"
    assert engram_(desk, words) == 0
    account = json.loads((tmp_path / "new" / "erasure.json").read_text())
    assert set(account["lost"]) == {"zero", "one", "three"} and not account["exact"]
    assert 0 < max(account["lost"].values()) < 1
    assert "what the classes that stay lost with it" in capsys.readouterr().out
    assert forget(desk, tmp_path / "exact", model="learner") == 0
    assert "lost" not in json.loads((tmp_path / "exact" / "erasure.json").read_text())


def test_the_candidates_are_said_before_work(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert forget(desk, tmp_path / "new") == 0
    said = capsys.readouterr().out
    assert "forget.Retrain               lacks recipe" in said
    assert "taken: forget.SCRUB, the first of the order that can be used" in said


def test_a_ranking_of_one_s_own_is_followed(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = "compare unlearning --data @train.parquet --limit 200 --epochs 1 --requests class --seeds 0 --trials 1"
    assert engram_(desk, f"{compare} --methods Retrain,SSD --quiet --out {tmp_path}/contest") == 0
    ranking = tmp_path / "contest" / "ranking.json"
    assert json.loads(ranking.read_text())["order"] == ["forget.SSD"]
    assert forget(desk, tmp_path / "new", "--ranking", str(ranking)) == 0
    assert "taken: forget.SSD" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "erasure.json").read_text())["method"]["name"] == "forget.SSD"
    assert forget(desk, tmp_path / "other", "--ranking", str(ranking), "--method", "ssd") == 2
    assert "--ranking goes with --method auto" in capsys.readouterr().err
    ranking.write_text("{}")
    assert forget(desk, tmp_path / "other", "--ranking", str(ranking)) == 2
    assert "is no ranking" in capsys.readouterr().err


def test_stored_statistics_give_the_same_weights(desk: Path, tmp_path: Path) -> None:
    assert engram_(desk, f"prepare --model @model --data @train.parquet --method ssd --out {tmp_path}/stored") == 0
    for name, more in (("with", ("--statistics", f"{tmp_path}/stored")), ("without", ())):
        assert forget(desk, tmp_path / name, "--method", "ssd", *more) == 0
    a, b = (load(tmp_path / name).state_dict() for name in ("with", "without"))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    with pytest.raises(engram.errors.EngramError, match="another model"):
        read_statistics(tmp_path / "stored", load(tmp_path / "with"))


@pytest.mark.parametrize(
    "what",
    [("--classes", "three", "zero"), ("--where", "label == one"), ("--where", "p36 > 12"), ("--where", "id != x")],
)
def test_rows_can_be_named_by_class_or_column(what: Sequence[str], desk: Path, tmp_path: Path) -> None:
    rows = pq.read_table(desk / "train.parquet").to_pandas()
    wanted = {
        "three": rows.label.isin(["three", "zero"]).sum(),
        "label == one": (rows.label == "one").sum(),
        "p36 > 12": (rows.p36 > 12).sum(),
        "id != x": 0,
    }[what[1]]
    assert forget(desk, tmp_path / "new", "--method", "ssd", what=what) == (0 if wanted else 2)
    if wanted:
        assert json.loads((tmp_path / "new" / "erasure.json").read_text())["request"]["records"] == wanted


def test_an_interrupted_request_goes_on_and_the_ledger_tells_it_once(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import engram.core.desk as module

    ledger = ("--ledger", f"{tmp_path}/l.sqlite")
    assert forget(desk, tmp_path / "whole", "--method", "ssd") == 0

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.io, "save", killed)
        assert forget(desk, tmp_path / "new", "--method", "ssd", *ledger) == 130
    assert not (tmp_path / "new").exists()
    assert forget(desk, tmp_path / "new", "--method", "ssd", *ledger) == 2  # say --resume
    assert forget(desk, tmp_path / "new", "--method", "ssd", "--resume", "--seed", "3", *ledger) == 2  # another request
    assert forget(desk, tmp_path / "new", "--method", "ssd", "--resume", *ledger) == 0
    assert digest(load(tmp_path / "new")) == digest(load(tmp_path / "whole"))
    kinds = [entry.kind for entry in Ledger(f"{tmp_path}/l.sqlite").entries()]
    assert kinds == ["holder", "request", "action", "holder"]


WRITES = {
    "prepare": ("prepare --model @model --data @train.parquet --method ssd --out", "statistics"),
    "audit": (
        "audit --before @model --after {}/one --data @train.parquet --forget @ids.txt --probes Accuracy --out",
        "findings",
    ),
    "certificate": ("certificate issue --model {}/one --key {}/k.key --out", "certificate"),
    "learn": ("learn --learner @learner --data @test.parquet --out", "learner"),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_killed_before_its_file_stands_is_noted_all_the_same(
    name: str, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert forget(desk, tmp_path / "one", "--method", "ssd") == 0
    assert engram_(desk, f"certificate keygen {tmp_path}/k.key") == 0
    words, kind = WRITES[name]
    Ledger(f"{tmp_path}/l.sqlite")
    command = f"{words} {tmp_path}/new --ledger {tmp_path}/l.sqlite".replace("{}", str(tmp_path))

    def killed(source: object, target: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"engram.files.os.{'replace' if name == 'certificate' else 'rename'}", killed)
        assert engram_(desk, command) == 130
    assert not (tmp_path / "new").exists()
    entries = Ledger(f"{tmp_path}/l.sqlite").entries()
    assert [e.body.get("what", e.kind) for e in entries] == [kind]
    held = [held for id in ("digit-3", "digit-401") for held in Ledger(f"{tmp_path}/l.sqlite").where(id)]
    assert len(held) == (name in ("prepare", "learn")) and not any(one.standing for one in held)
    assert engram_(desk, command) in (0, 3)
    assert (tmp_path / "new").exists()
    Ledger(f"{tmp_path}/l.sqlite").verify()


def test_a_model_is_known_by_its_weights_wherever_it_stands(desk: Path, tmp_path: Path) -> None:
    ledger = ("--ledger", f"{tmp_path}/l.sqlite")
    assert forget(desk, tmp_path / "first", "--method", "ssd", *ledger) == 0
    (tmp_path / "first").rename(tmp_path / "moved")
    again = f"forget --model {tmp_path}/moved --data @train.parquet --forget @ids.txt --out {tmp_path}/second"
    assert engram_(desk, again, "--method", "ssd", "--set", "alpha=1.1", *ledger) == 0
    shutil.copytree(desk / "model", tmp_path / "first")  # another model in the old place
    other = f"forget --model {tmp_path}/first --data @train.parquet --forget @ids.txt --out {tmp_path}/third"
    assert engram_(desk, other, "--method", "ssd", *ledger) == 0
    parents = [entry.body["parent"] for entry in Ledger(f"{tmp_path}/l.sqlite").entries("holder")]
    model, first = 1, 4
    assert parents == [None, model, first, model]


def test_requests_in_sequence_keep_lineage_and_residue(desk: Path, tmp_path: Path) -> None:
    ledger = ("--ledger", f"{tmp_path}/l.sqlite")
    (desk / "later.txt").write_text("digit-20\n")
    assert forget(desk, tmp_path / "first", "--method", "ssd", *ledger) == 0
    again = f"forget --model {tmp_path}/first --data @train.parquet --forget @later.txt --out {tmp_path}/second"
    assert engram_(desk, again, "--method", "ssd", *ledger) == 0
    book = Ledger(f"{tmp_path}/l.sqlite")
    held = {Path(h.path).name: h.forgotten for h in book.where("digit-3")}
    assert held["model"] is None and held["first"] == held["second"] == "forget.SSD, approximate (entry 3)"
    later = {Path(h.path).name: h.forgotten for h in book.where("digit-20")}
    assert later == {"model": None, "first": None, "second": "forget.SSD, approximate (entry 6)"}
    book.verify()


def test_a_certificate_speaks_of_the_audited_weights_alone(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, alpha in (("one", "1.5"), ("two", "1.2")):
        assert forget(desk, tmp_path / name, "--method", "ssd", "--set", f"alpha={alpha}") == 0
    audit = (
        f"audit --before @model --after {tmp_path}/one --data @train.parquet --forget @ids.txt --out {tmp_path}/audit"
    )
    assert engram_(desk, f"{audit} --test @test.parquet") == 3
    assert engram_(desk, audit) == 2  # --out exists
    assert engram_(desk, f"certificate keygen {tmp_path}/k.key") == 0
    issue = f"certificate issue --audit {tmp_path}/audit --key {tmp_path}/k.key"
    assert engram_(desk, f"{issue} --model {tmp_path}/one --out {tmp_path}/one.json") == 0
    assert engram_(desk, f"{issue} --model {tmp_path}/two --out {tmp_path}/two.json") == 2
    assert "about another model" in capsys.readouterr().err
    assert engram_(desk, f"{issue} --model @model --out {tmp_path}/two.json") == 2
    assert "only what engram forget wrote" in capsys.readouterr().err
    verify = f"certificate verify {tmp_path}/one.json --key {tmp_path}/k.pub"
    assert engram_(desk, f"{verify} --model {tmp_path}/one --json") == 0
    stated = json.loads(capsys.readouterr().out)
    assert stated["audit"]["verdict"] == "unknown" and "approximate" in stated["claim"]
    assert engram_(desk, f"{verify} --model {tmp_path}/two") == 2


REFUSED = {
    "unknown id": (["--forget", "@wrong.txt"], [], "1 of 2 ids are not in the data: digit-9999; --ignore-missing"),
    "near id": (["--forget", "@near.txt"], [], "did you mean 'digit-"),
    "empty list": (["--forget", "@empty.txt"], [], "forget set is empty"),
    "no list": (["--forget", "@nothing.txt"], [], "cannot be read"),
    "unknown class": (["--classes", "thre"], [], "three"),
    "unknown column": (["--where", "colour == red"], [], "colour"),
    "unknown method": (["--forget", "@ids.txt"], ["--method", "sdd"], "SSD"),
    "no forgetter": (["--forget", "@ids.txt"], ["--method", "keep.NMC"], "keep.NMC"),
    "unknown setting": (["--forget", "@ids.txt"], ["--method", "ssd", "--set", "alfa=1"], "alpha"),
    "lacks": (["--forget", "@ids.txt"], ["--method", "retrain"], "recipe"),
    "auto has no settings": (["--forget", "@ids.txt"], ["--set", "alpha=1"], "auto"),
    "no concept": (["--concept", "the number two"], [], "takes a concept"),
    "concept for another": (["--concept", "two"], ["--method", "ssd"], "cannot take a concept"),
    "out exists": (["--forget", "@ids.txt"], ["--out", "@model"], "exists"),
    "wrong recipe": (["--forget", "@ids.txt"], ["--recipe", "@ids.txt"], "recipe"),
    "recipe of bytes": (["--forget", "@ids.txt"], ["--recipe", "@train.parquet"], "cannot be read"),
    "no value": (["--forget", "@ids.txt"], ["--method", "ssd", "--set", "alpha"], "--set takes KEY=VALUE"),
    "empty value": (["--forget", "@ids.txt"], ["--method", "ssd", "--set", "alpha=null"], "alpha takes float"),
    "no YAML": (["--forget", "@ids.txt"], ["--method", "ssd", "--set", "alpha=["], "alpha=[ cannot be read as YAML"),
    "no ledger": (["--forget", "@ids.txt"], ["--ledger", "@ids.txt"], "a file of another kind"),
    "out below a file": (["--forget", "@ids.txt"], ["--out", "@ids.txt/new"], "Not a directory"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_ends_in_a_sentence(
    case: str, desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk / "wrong.txt").write_text("digit-1\ndigit-9999\n")
    (desk / "near.txt").write_text("digit-00003\n")
    (desk / "empty.txt").write_text("\n")
    what, more, sentence = REFUSED[case]
    assert forget(desk, tmp_path / "new", *(word.replace("@", f"{desk}/") for word in more), what=what) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("engram: ") and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_what_the_model_does_not_know_need_not_be_forgotten(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pq.read_table(desk / "test.parquet")
    wrong = pa.array(
        [{"zero": "one", "one": "two", "two": "three", "three": "zero"}[c] for c in rows["label"].to_pylist()]
    )
    rows = rows.set_column(rows.column_names.index("label"), "label", wrong)
    pq.write_table(rows.slice(0, 80), tmp_path / "new.parquet")
    (tmp_path / "new.txt").write_text("\n".join(rows["id"].to_pylist()[:40]))
    method = ("--method", "GradientAscent")
    command = f"forget --model @model --data {tmp_path}/new.parquet --forget {tmp_path}/new.txt --out {tmp_path}/out"
    assert engram_(desk, command, *method, "--held-out", f"{desk}/train.parquet") == 2
    assert "there may be nothing to forget; --force goes on" in capsys.readouterr().err
    assert engram_(desk, command, *method, "--held-out", f"{desk}/train.parquet", "--force") == 0
    known = (*method, "--held-out", f"{desk}/test.parquet")
    assert forget(desk, tmp_path / "known", *known) == 0


def test_missing_ids_can_be_passed_over(desk: Path, tmp_path: Path) -> None:
    (desk / "wrong.txt").write_text("digit-1\ndigit-9999\n")
    assert forget(desk, tmp_path / "new", "--method", "ssd", "--ignore-missing", what=("--forget", "@wrong.txt")) == 0


def test_weights_in_pickle_format_are_refused(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(desk / "model", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    assert (
        engram_(desk, f"forget --model {tmp_path}/pickled --data @train.parquet --forget @ids.txt --out {tmp_path}/n")
        == 2
    )
    assert "pickle" in capsys.readouterr().err


def test_a_head_that_does_not_fit_the_labels_is_refused(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, _ = read_with(desk / "train.parquet")
    engram.save(Recipe({"name": "MLP", "hidden": [4]}, epochs=1)(table.of_classes([0, 1]), 0), tmp_path / "small")
    assert (
        engram_(desk, f"forget --model {tmp_path}/small --data @train.parquet --forget @ids.txt --out {tmp_path}/n")
        == 2
    )
    assert "head has" in capsys.readouterr().err


def test_a_ledger_that_is_not_there_is_not_begun_by_looking(desk: Path, tmp_path: Path) -> None:
    assert engram_(desk, f"ledger where d1 --ledger {tmp_path}/none.sqlite") == 2
    assert not (tmp_path / "none.sqlite").exists()


def test_a_learner_is_loaded_and_erased_as_a_learner(desk: Path) -> None:
    learner, model = engram.load(desk / "learner"), engram.load(desk / "model")
    assert isinstance(learner, ACU) and isinstance(model, torch.nn.Module)
    table, _ = read_with(desk / "train.parquet")
    gone = table.take(range(30))
    before = digest(learner.model)
    forgot = engram.erase(learner, forget=gone, retain=table.without(gone.ids))
    assert isinstance(forgot, ACU) and digest(learner.model) == before
    assert not forgot.holds(gone.ids) and len(learner.holds(gone.ids)) == 30
    fresh = ACU(size=64)
    fresh.learn(Task(table.without(gone.ids), None, 0, table.classes, table.names))
    found, wanted = (m.model.state_dict()["head.weight"] for m in (forgot, fresh))
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-9)


def test_a_run_and_what_goes_on_from_it_stand_in_the_ledger(tmp_path: Path) -> None:
    events = [{"learn": 1}, {"forget": {"records": ["digit-0000"], "probes": []}}, {"learn": "all"}]
    config = {
        "data": {"source": "sklearn:digits", "limit": 120, "share": 0.2},
        "stream": {"scenario": "class", "base": 5, "increment": 5},
        "learners": {"exact": "keep.NMC", "net": {"name": "keep.Finetune", "epochs": 1}},
        "forgetter": {"name": "forget.Finetune", "epochs": 1},
        "events": events,
    }
    table = read("sklearn:digits", limit=120)
    train, _ = train_test(table, 0.2)
    gone = train.of_classes([0]).ids[0]
    events[1]["forget"]["records"] = [gone]  # type: ignore[index]
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    place = f"{tmp_path}/l.sqlite"
    command = ["run", f"{tmp_path}/c.yaml", "--out", f"{tmp_path}/run", "--quiet", "--ledger", place]
    assert main(command) == 0
    book = Ledger(place)
    assert main([*command, "--resume"]) == 0 and len(book.entries()) == len(Ledger(place).entries())
    stands = {(h.what, Path(h.path).name, (h.forgotten or "").partition(",")[0]) for h in book.where(gone)}
    assert stands == {  # the exact learner has not learnt it any more; the journal has both states
        ("checkpoint", "journal", ""),
        ("checkpoint", "journal", "forget.Finetune"),
        ("learner", "net", "forget.Finetune"),
    }
    other = train.of_classes([7]).ids[0]
    assert {Path(h.path).name for h in book.where(other)} == {"exact", "net"}
    more = ["learn", "--learner", f"{tmp_path}/run/models/net", "--data", "sklearn:digits", "--out", f"{tmp_path}/more"]
    assert main([*more, "--ledger", place, "--quiet"]) == 0
    assert "more" in {Path(h.path).name for h in book.where(other)}
    book.verify()


def test_cached_features_stand_in_the_ledger(desk: Path, tmp_path: Path) -> None:
    book = Ledger(tmp_path / "l.sqlite")
    table, _ = read_with(desk / "train.parquet")
    cache = FeatureCache(tmp_path / "cache", book)
    for _ in range(2):
        cache.features(load(desk / "model"), table)
    [held] = book.where("digit-7")
    assert held.what == "cache" and held.standing
    book.purge("digit-7")
    assert not Path(held.path).exists()


def test_the_ledger_speaks_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cache").mkdir()
    Ledger(tmp_path / "book.sqlite").add_holder("cache", tmp_path / "cache", ("one", "two"))
    words = ["--ledger", str(tmp_path / "book.sqlite"), "--json"]
    assert main(["ledger", "export", *words]) == 0
    assert [entry["kind"] for entry in json.loads(capsys.readouterr().out)] == ["holder"]
    assert main(["ledger", "purge", "one", *words]) == 2
    assert "say --yes with --json" in capsys.readouterr().err and (tmp_path / "cache").exists()
    assert main(["ledger", "purge", "one", "--yes", *words]) == 0
    [gone] = json.loads(capsys.readouterr().out)
    assert gone["fate"] == "delete" and gone["path"] == str(tmp_path / "cache") and not (tmp_path / "cache").exists()
    assert main(["ledger", "new-key", *words]) == 0
    assert json.loads(capsys.readouterr().out) == {"key": str(tmp_path / "book.sqlite.key")}
