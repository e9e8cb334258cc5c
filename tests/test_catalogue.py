"""The catalogue: complete, consistent in itself, and clear about names that do not exist."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from engram import catalogue
from engram.catalogue import (
    ASKS,
    NEEDS,
    STATUSES,
    WINGS,
    Method,
    Paper,
    find,
    methods,
    paper,
    papers,
    possible,
)
from engram.errors import EngramError

NOTHING = frozenset[str]()
EXTRA = Method("forget.Amnesia", "forget", "elsewhere.amnesia", "from elsewhere", (frozenset({"history"}),))


def unlisted(rows: Iterable[Paper], listed: Iterable[Method]) -> list[str]:
    """The classes of papers that work which are no method of the catalogue."""
    names = {row.name for row in listed}
    return [name for row in rows if row.status.startswith("works") for name in row.classes if name not in names]


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A dictionary: name of an entry point of engram.methods -> what loading it gives, or raises."""
    found: dict[str, object] = {}

    class Planted(EntryPoint):
        def load(self) -> object:
            loaded = found[self.name]
            if isinstance(loaded, Exception):
                raise loaded
            return loaded

    def entry_points(group: str) -> EntryPoints:
        return EntryPoints(Planted(name, f"{name}.catalogue:METHODS", group) for name in found)

    monkeypatch.setattr(catalogue, "entry_points", entry_points)
    catalogue._others.cache_clear()
    yield found
    catalogue._others.cache_clear()


def test_there_are_54_papers_in_their_wings() -> None:
    assert Counter(row.wing for row in papers()) == {
        "learn": 15,
        "keep": 18,
        "forget": 10,
        "audit": 6,
        "protect": 1,
        "recall": 4,
    }
    assert len(papers()) == 54


@pytest.mark.parametrize("field", ["slug", "title", "arxiv", "claim"])
def test_no_two_papers_share(field: str) -> None:
    assert len({getattr(row, field) for row in papers()}) == 54


@pytest.mark.parametrize("row", papers(), ids=lambda row: row.slug)
def test_a_paper_is_well_formed(row: Paper) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row.slug)
    assert re.fullmatch(r"\d{2}(0[1-9]|1[0-2])\.\d{5}", row.arxiv)
    assert row.year == 2000 + int(row.arxiv[:2])
    assert row.wing in WINGS and row.status in STATUSES
    assert row.classes and all(re.fullmatch(rf"({'|'.join(WINGS)})\.[A-Z]\w*", name) for name in row.classes)
    assert row.claim == row.claim.strip() and "\n" not in row.claim and len(row.claim) <= 130


def test_a_class_implements_one_paper() -> None:
    counts = Counter(name for row in papers() for name in row.classes)
    assert [name for name, times in counts.items() if times > 1] == []


def test_every_class_of_a_paper_that_works_is_a_method() -> None:
    assert unlisted(papers(), methods()) == []


def test_the_rule_notices_a_paper_that_works_with_a_class_nobody_wrote() -> None:
    ghost = Paper("ghost", "Ghost", 2020, "2001.00001", "keep", "claims", ("keep.NMC", "keep.Ghost"), "works")
    assert unlisted([ghost], methods()) == ["keep.Ghost"]


@pytest.mark.parametrize("row", methods(), ids=lambda row: row.name)
def test_a_method_is_well_formed(row: Method) -> None:
    assert row.name.startswith(f"{row.wing}.") and row.wing in WINGS
    assert row.module.startswith(f"engram.{row.wing}.") or not row.module.startswith("engram.")
    assert row.summary and "\n" not in row.summary and len(row.summary) <= 110
    alternatives = [*row.needs, *(needs for _, sets in row.variants for needs in sets)]
    assert row.needs and all(needs <= {*NEEDS, *ASKS} for needs in alternatives)
    assert row.paper is None or row.name in paper(row.paper).classes


def test_names_and_modules_of_methods_are_unique() -> None:
    assert len({row.name for row in methods()}) == len(methods())
    assert len({row.name.lower() for row in methods()}) == len(methods())


def test_methods_of_a_wing() -> None:
    assert {row.wing for row in methods("audit")} == {"audit"}
    assert sum(len(methods(wing)) for wing in WINGS) == len(methods())
    with pytest.raises(EngramError, match=r"unknown wing 'forgt'; did you mean 'forget'"):
        methods("forgt")


@pytest.mark.parametrize("name", ["ssd", "SSD", "forget.SSD", "forget.ssd", "Forget.SSD"])
def test_find_takes_a_name_with_and_without_its_wing(name: str) -> None:
    assert find(name).name == "forget.SSD"


@pytest.mark.parametrize("name", ["rehearsal-free", "rehearsal_free", "keep.rehearsalfree"])
def test_find_overlooks_hyphens(name: str) -> None:
    assert find(name).name == "keep.RehearsalFree"


def test_find_says_which_wings_have_the_name() -> None:
    with pytest.raises(EngramError, match=r"'Finetune'.*keep\.Finetune or forget\.Finetune"):
        find("Finetune")
    assert find("forget.Finetune").wing == "forget"
    assert find("keep.finetune").wing == "keep"


@pytest.mark.parametrize(("name", "near"), [("Retrian", "Retrain"), ("forget.Retrian", "forget.Retrain")])
def test_find_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(EngramError, match=rf"unknown method '{name}'; did you mean '{near}'"):
        find(name)


def test_a_wing_that_lacks_the_method_is_an_error() -> None:
    with pytest.raises(EngramError, match="unknown method"):
        find("keep.SSD")


def test_paper_by_slug() -> None:
    assert paper("ssd").arxiv == "2308.07707"
    with pytest.raises(EngramError, match="did you mean 'nmc-baseline'"):
        paper("nmc-basline")


def test_ssd_can_do_with_statistics_or_with_retained_rows() -> None:
    def ssd(*have: str) -> catalogue.Possible:
        return next(row for row in possible(have, "forget") if row.method.name == "forget.SSD")

    stored = ssd("forget-rows", "forget-labels", "statistics")
    assert stored.usable and stored.needs == {"forget-rows", "forget-labels", "statistics"}
    both = ssd("forget-rows", "forget-labels", "retain-rows", "retain-labels", "statistics")
    assert both.needs == stored.needs  # the first that is satisfied
    kept = ssd("forget-rows", "forget-labels", "retain-rows", "retain-labels")
    assert kept.usable and kept.needs == {"forget-rows", "forget-labels", "retain-rows", "retain-labels"}
    short = ssd("forget-rows", "forget-labels")
    assert not short.usable and short.missing == {"statistics"}
    assert ssd("forget-rows", "retain-rows", "retain-labels").missing == {"forget-labels"}


def test_a_setting_other_than_the_default_may_do() -> None:
    choosy = Method(
        "forget.Choosy",
        "forget",
        "m",
        "s",
        (frozenset({"oracles"}),),
        variants=(("repair=False", (NOTHING,)),),
    )
    found = catalogue._nearest(choosy, set())
    assert found.usable and found.setting == "repair=False"
    assert catalogue._nearest(choosy, {"oracles"}).setting == ""


def test_what_needs_nothing_is_always_possible() -> None:
    usable = {row.method.name for row in possible([], "keep") if row.usable}
    trained = ("Finetune", "Replay", "DERpp", "MIR", "GSS", "Joint", "TAME", "TaskFreeMAS")
    names = (*trained, "NMC", "ACU", "SLDA", "JointHead", "KeyValueBottleneck")
    assert usable == {f"keep.{name}" for name in names}


def test_rows_of_a_request_serve_probes_too() -> None:
    rows = possible(["model", "test", "forget-rows"], "audit")
    assert {row.method.name for row in rows if row.usable} == {
        "audit.Accuracy",
        "audit.Membership",
        "audit.Memorization",
        "audit.Representation",
        "audit.ZRF",
    }


def test_a_recipe_makes_oracles_for_a_probe_but_not_for_a_forgetter() -> None:
    held = ["model", "test", "forget-rows", "retain-rows"]
    gap = "audit.RetrainGap"
    assert next(row for row in possible(held) if row.method.name == gap).missing == {"oracles"}
    assert next(row for row in possible([*held, "recipe"]) if row.method.name == gap).usable
    retrain = next(row for row in possible([*held, "retain-labels", "oracles"]) if row.method.name == "forget.Retrain")
    assert retrain.missing == {"recipe"}


def test_more_at_hand_never_makes_less_possible() -> None:
    held: set[str] = set()
    before: set[str] = set()
    for name in (*NEEDS, *ASKS):
        held.add(name)
        now = {row.method.name for row in possible(held) if row.usable}
        assert before <= now
        before = now
    assert before == {row.name for row in methods()}


def test_an_unknown_need_is_named() -> None:
    with pytest.raises(EngramError, match=r"unknown need 'forget-row'; did you mean 'forget-rows'"):
        possible(["model", "forget-row"])


def test_methods_of_other_packages_are_listed_found_and_checked(others: dict[str, object]) -> None:
    others["amnesia"] = EXTRA
    assert methods()[-1] == EXTRA and EXTRA in methods("forget") and EXTRA not in methods("keep")
    assert find("amnesia") is EXTRA
    assert next(row for row in possible(["history"]) if row.method is EXTRA).usable


@pytest.mark.parametrize(
    ("loaded", "reason"),
    [
        (ImportError("no module named gone"), "no module named gone"),
        ((7,), "is no engram.catalogue.Method"),
        (Method("Amnesia", "forget", "m", "s", (NOTHING,)), "must be the wing"),
        (
            Method("forget.Amnesia", "forget", "m", "s", (frozenset({"luck"}),)),
            r"known needs, not \['luck'\]",
        ),
        (Method("forget.Amnesia", "forget", "m", "s", ()), "one or more sets"),
        (Method("forget.SSD", "forget", "m", "s", (NOTHING,)), "there is a method forget.SSD already"),
    ],
)
def test_a_faulty_row_of_another_package_is_left_out_with_a_warning(
    others: dict[str, object], loaded: object, reason: str
) -> None:
    own = len(catalogue.METHODS)
    others["faulty"] = loaded
    with pytest.warns(UserWarning, match=rf"'faulty'.*{reason}"):
        assert len(methods()) == own
