"""The journal by itself; how a run uses it, and what it does about damaged entries, stands in the tests of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engram.engine import journal as module
from engram.engine.journal import ENTRY, Journal, flatten, unflatten
from engram.errors import EngramError
from engram.models.build import build
from engram.stats.seeds import generator

COST = {"seconds": 1.5, "steps": 2, "rows": 3, "flops": 0.0}
PLACES = pytest.mark.parametrize("on_disk", [True, False], ids=["on disk", "in memory"])

PLAIN: list[Any] = [
    None,
    True,
    -3,
    0.1,
    float("inf"),
    "é\n/..",
    [],
    (),
    {},
    [1, (2, [3]), {"a": (None,)}],
    (1,),
    ("__tuple__",),
    {1: "one", "1": "two", -2: {}},
    {"__tensor__": "t0", "__module__": 1, "__tuple__": [2], "keys": 3, "values": 4},
]


def place(on_disk: bool, folder: Path) -> Journal:
    return Journal(folder / "journal" if on_disk else None)


def network() -> nn.Module:
    spec = {"name": "MLP", "hidden": [4], "norm": "batch"}
    return build(spec, inputs={"values": (6,)}, classes=(0, 2), generator=generator("weights"))


@PLACES
@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values_come_back_with_their_types(value: Any, on_disk: bool, tmp_path: Path) -> None:
    place(on_disk, tmp_path).store(("a",), value, COST)
    journal = place(on_disk, tmp_path)
    if not on_disk:
        journal.store(("a",), value, COST)
    found = journal.load(("a",))
    assert found is not None and repr(found) == repr((value, COST))


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6, dtype=torch.int64).reshape(2, 3).T,  # not contiguous
        torch.tensor(1.5, dtype=torch.float64),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.tensor([float("nan"), 1.0]).bfloat16(),
        torch.ones(2, requires_grad=True),
    ],
    ids=["strides", "scalar", "empty", "bool", "bfloat16", "gradient"],
)
def test_tensors_come_back_bit_by_bit(value: Tensor, tmp_path: Path) -> None:
    place(True, tmp_path).store(("a",), [value, {"b": (value,)}], COST)
    found = place(True, tmp_path).load(("a",))
    assert found is not None
    for tensor in (found[0][0], found[0][1]["b"][0]):
        assert tensor.dtype == value.dtype and tensor.shape == value.shape and not tensor.requires_grad
        assert torch.equal(tensor.nan_to_num(7.0), value.detach().nan_to_num(7.0))


def test_a_stored_tensor_does_not_follow_its_source() -> None:
    tensors: dict[str, Tensor] = {}
    source = torch.zeros(3)
    tree = flatten([source, source[:2]], tensors)
    source += 1
    assert [value.tolist() for value in unflatten(tree, tensors)] == [[0, 0, 0], [0, 0]]


def test_a_module_comes_back_as_a_whole(tmp_path: Path) -> None:
    model = network()
    model.head.retire([2])  # type: ignore[operator,union-attr]
    place(True, tmp_path).store(("a",), {"model": model}, COST)
    found = place(True, tmp_path).load(("a",))
    assert found is not None
    again = found[0]["model"]
    assert type(again) is type(model) and again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({1, 2}, "cannot journal a set"),
        ([Path("a")], "cannot journal a PosixPath"),
        ({"a": {(1, 2): 3}}, r"the key \(1, 2\)"),
    ],
)
def test_what_cannot_be_kept_is_named_and_leaves_nothing(value: Any, words: str, tmp_path: Path) -> None:
    journal = place(True, tmp_path)
    with pytest.raises(TypeError, match=words):
        journal.store(("a",), value, COST)
    assert journal.load(("a",)) is None and list(tmp_path.rglob("*.*")) == []


# --- paths


@PLACES
def test_entries_stand_apart_and_what_is_not_there_is_none(on_disk: bool, tmp_path: Path) -> None:
    journal = place(on_disk, tmp_path)
    names = ["a", "a b", "a/b", "..", ".", "", "é", "x" * 300, "x" * 301]
    paths = [*((name,) for name in names), ("a", "b"), ("a", ".."), ("a", "")]
    for k, path in enumerate(paths):
        journal.store(path, k, COST)
    assert [journal.load(path) for path in paths] == [(k, COST) for k in range(len(paths))]
    assert journal.load(("b",)) is None and journal.load(("a", "b", "c")) is None
    assert not on_disk or [p.name for p in tmp_path.iterdir()] == ["journal"]  # nothing was written beside it


@PLACES
def test_storing_deletes_what_is_below_and_nothing_beside(on_disk: bool, tmp_path: Path) -> None:
    journal = place(on_disk, tmp_path)
    for path in [("a", "b"), ("a", "c", "d"), ("ab",)]:
        journal.store(path, torch.ones(2), COST)
    journal.store(("a",), 1, COST)
    assert journal.load(("a",)) == (1, COST) and journal.load(("ab",)) is not None
    assert journal.load(("a", "b")) is None and journal.load(("a", "c", "d")) is None


@PLACES
def test_forgetting_takes_a_path_and_all_below(on_disk: bool, tmp_path: Path) -> None:
    journal = place(on_disk, tmp_path)
    for path in [("a",), ("a", "b"), ("ab",)]:
        journal.store(path, torch.ones(2), COST)
    journal.forget(("a",))
    assert journal.load(("a",)) is None and journal.load(("a", "b")) is None and journal.load(("ab",)) is not None
    journal.forget(("never",))


# --- files


def test_a_new_value_replaces_the_old_files(tmp_path: Path) -> None:
    journal = place(True, tmp_path)
    for k in range(3):
        journal.store(("a",), torch.full((2,), float(k)), COST)
    found = journal.load(("a",))
    assert found is not None and found[0].tolist() == [2, 2]
    assert sorted(p.suffix for p in (tmp_path / "journal" / "a").iterdir()) == [".json", ".safetensors"]


@pytest.mark.parametrize("fails", [0, 1], ids=["tensors", "json"])
def test_a_write_that_fails_leaves_the_old_value(fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = place(True, tmp_path)
    journal.store(("a",), torch.zeros(2), COST)
    real, calls = module.write_atomic, []

    def full(path: Path, data: bytes | str) -> None:
        calls.append(path)
        if len(calls) == fails + 1:
            raise EngramError("could not write")
        real(path, data)

    monkeypatch.setattr(module, "write_atomic", full)
    with pytest.raises(EngramError, match="could not write"):
        journal.store(("a",), torch.ones(2), COST)
    found = journal.load(("a",))
    assert found is not None and found[0].tolist() == [0, 0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"x": 1}',
        '{"path": ["a"], "cost": {}, "digest": "0123456789abcdef0", "value": 1}',
        '{"path": ["a"], "cost": {}, "digest": 5, "value": 1}',
    ],
    ids=["empty", "list", "null", "other keys", "other tensors", "a digest that is none"],
)
def test_a_foreign_file_is_refused_and_named(text: str, tmp_path: Path) -> None:
    journal = place(True, tmp_path)
    journal.store(("a",), torch.zeros(2), COST)
    (tmp_path / "journal" / "a" / ENTRY).write_text(text)
    with pytest.raises(EngramError, match=r"the journal entry .*a cannot be read .*delete it to redo it"):
        journal.load(("a",))


@pytest.mark.parametrize("key", ["cost", "value"])
def test_an_entry_without_one_of_its_parts_is_refused_and_named(key: str, tmp_path: Path) -> None:
    journal = place(True, tmp_path)
    journal.store(("a",), torch.zeros(2), COST)
    file = tmp_path / "journal" / "a" / ENTRY
    entry = json.loads(file.read_text())
    del entry[key]
    file.write_text(json.dumps(entry))
    with pytest.raises(EngramError, match=r"a cannot be read .*delete it to redo it"):
        journal.load(("a",))
