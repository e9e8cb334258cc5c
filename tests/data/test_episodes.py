"""Episodes: labels, what is disjoint and what is the same, and that each is a function of (seed, i)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.data.episodes import Episode, episodes, feasible
from engram.data.table import MISSING, Table
from engram.errors import EngramError
from engram.testing import holds

ROWS = 12


def table(classes: int = 12) -> Table:
    labels = torch.arange(classes).repeat(ROWS) * 3 + 5
    values = torch.arange(float(len(labels)))[:, None]
    return Table({"values": values}, labels, tuple(f"row-{k}" for k in range(len(labels))), {}, {5: "five"})


def one(**given: Any) -> Episode:
    plain = {"ways": 2, "shots": 1, "queries": 2, "count": 1, "seed": 0}
    return next(episodes(table(), **{**plain, **given}))


def original(rows: Table) -> list[int]:
    return [int(id.removeprefix("row-")) % 12 * 3 + 5 for id in rows.ids]


@holds("cfsl-instances", 1)
@given(
    ways=st.integers(1, 3),
    shots=st.integers(1, 3),
    queries=st.integers(1, 3),
    change=st.integers(1, 2),
    blocks=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_the_class_test(ways: int, shots: int, queries: int, change: int, blocks: int, seed: int) -> None:
    episode = one(ways=ways, shots=shots, queries=queries, sets=blocks * change, change=change, seed=seed)
    assert len(episode.supports) == blocks * change and episode.labels == tuple(range(ways * blocks))
    assert sorted(episode.classes.values()) == list(range(ways * blocks)) == list(episode.queries.classes)
    ids = [id for part in (*episode.supports, episode.queries) for id in part.ids]
    assert len(set(ids)) == len(ids) == blocks * change * ways * (shots + queries)
    for s, support in enumerate(episode.supports):
        first = ways * (s // change)
        assert support.classes == tuple(range(first, first + ways))
        assert torch.bincount(support.labels - first).tolist() == [shots] * ways  # type: ignore[operator]
    for rows in (*episode.supports, episode.queries):
        assert [episode.classes[c] for c in original(rows)] == rows.labels.tolist()  # type: ignore[union-attr]
    count = queries * change
    assert torch.bincount(episode.queries.labels).tolist() == [count] * ways * blocks  # type: ignore[arg-type]


@holds("cfsl-instances", 1)
@pytest.mark.parametrize(("ways", "shots", "sets"), [(1, 12, 1), (1, 3, 4), (1, 1, 12), (3, 2, 5)])
def test_in_the_instance_test_every_row_is_a_label_and_is_asked_about(ways: int, shots: int, sets: int) -> None:
    episode = one(ways=ways, shots=shots, sets=sets, instances=True)
    total = ways * shots * sets
    assert len(episode.supports) == sets and len(episode.classes) == ways and episode.labels == tuple(range(total))
    ids = [id for support in episode.supports for id in support.ids]
    labels = [label for support in episode.supports for label in support.labels.tolist()]  # type: ignore[union-attr]
    assert episode.queries.ids == tuple(ids) and len(set(ids)) == total
    assert episode.queries.labels.tolist() == labels == list(range(total))  # type: ignore[union-attr]
    assert set(original(episode.queries)) == set(episode.classes)


def test_an_episode_is_a_function_of_seed_and_number() -> None:
    given: dict[str, Any] = {"ways": 2, "shots": 1, "queries": 2, "sets": 4, "change": 2}
    few, many = (list(episodes(table(), count=count, seed=3, **given)) for count in (2, 5))
    assert [e.queries.digest for e in few] == [e.queries.digest for e in many[:2]]
    assert len({e.queries.digest for e in many}) == 5
    assert next(episodes(table(), count=1, seed=4, **given)).queries.digest != few[0].queries.digest


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    one()
    assert torch.equal(before, torch.get_rng_state())


def test_names_follow_the_classes_and_rows_without_a_label_do_not_take_part() -> None:
    rows = table(2)
    labels = torch.where(torch.arange(len(rows)) < 4, torch.tensor(MISSING), rows.labels)  # type: ignore[arg-type]
    episode = next(episodes(rows.with_labels(labels), ways=2, shots=8, queries=2, count=1, seed=0))
    assert episode.queries.names == {episode.classes[5]: "five"}
    assert not {f"row-{k}" for k in range(4)} & {*episode.supports[0].ids, *episode.queries.ids}


def test_classes_with_too_few_rows_are_passed_over() -> None:
    rows = table(3)
    thin = rows.without([id for id in rows.of_classes([8]).ids[:9]])
    assert set(next(episodes(thin, ways=2, shots=3, queries=1, count=1, seed=0)).classes) == {5, 11}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ways": 0}, "ways of episodes must be 1 or more, not 0"),
        ({"sets": 3, "change": 2}, "3 support sets cannot change classes every 2 sets"),
        ({"ways": 13}, "an episode needs 13 classes with 3 rows each, and 12 of 12 have so many"),
        ({"shots": 7, "sets": 2, "instances": True}, "needs 2 classes with 14 rows each, and 0 of 12"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(given: dict[str, Any], message: str) -> None:
    plain = {"ways": 2, "shots": 1, "queries": 2, "count": 1, "seed": 0}
    with pytest.raises(EngramError, match=message):
        episodes(table(), **{**plain, **given})


@pytest.mark.parametrize(
    ("counts", "asked", "wanted"),
    [
        ([9, 9, 9], (2, 1, 5), (2, 1, 5)),
        ([9, 9, 9], (5, 1, 5), (3, 1, 5)),
        ([9, 4, 2, 1], (3, 1, 5), (3, 1, 1)),  # the third has two rows, the fourth cannot take part
        ([9, 4, 2, 1], (2, 3, 5), (2, 3, 1)),
        ([9, 4, 2, 1], (2, 9, 5), (2, 3, 1)),
        ([1, 1], (2, 1, 5), (0, 0, 0)),
    ],
)
def test_what_can_be_drawn_of_a_small_table(
    counts: list[int], asked: tuple[int, int, int], wanted: tuple[int, int, int]
) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    rows = Table({"values": torch.zeros(len(labels), 1)}, labels)
    ways, shots, queries = feasible(rows, *asked)
    assert (ways, shots, queries) == wanted
    if ways:
        next(episodes(rows, ways=ways, shots=shots, queries=queries, count=1, seed=0))


def test_numbers_are_no_classes() -> None:
    with pytest.raises(EngramError, match="episodes need class labels; this table's target is numbers"):
        episodes(table().with_labels(torch.zeros(144)), ways=1, shots=1, queries=1, count=1, seed=0)
