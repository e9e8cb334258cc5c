"""Models as files: the same bits back, and nothing half-done."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engram.errors import EngramError
from engram.files import new_directory, replace_directory, write_atomic
from engram.models import (
    CCT,
    MLP,
    ConvNet,
    CosineHead,
    Identity,
    LinearHead,
    MatrixHead,
    NearestMeanHead,
    Predictor,
    ResNet,
    ValueHead,
    ViT,
    Wrapper,
    digest,
    load,
    pack,
    register_loadable,
    save,
    unpack,
)
from engram.models.config import Configured
from engram.models.loadable import LOADABLE, loadable

Make = Callable[..., Any]


def whole(width: int, head: nn.Module) -> Predictor:
    return Predictor(MLP(4, hidden=(width,), norm="batch"), head)


def solved() -> Predictor:
    head = MatrixHead(3, bias=True)
    head.set([5, 2], torch.eye(3)[:, :2], torch.ones(2))
    head.retire([5])
    return whole(3, head)


def nearest() -> Predictor:
    head = NearestMeanHead(3, normalise=False)
    head.set([1], torch.full((1, 3), 1 / 3, dtype=torch.float64))
    return whole(3, head)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: whole(3, LinearHead(3, (4, 1), classes_total=9)),
    "cosine": lambda: whole(3, CosineHead(3, (0,), scale=2.0, frozen=True)),
    "matrix": solved,
    "nearest": nearest,
    "values": lambda: whole(3, ValueHead(3, 2)),
    "identity": lambda: Predictor(Identity(4), LinearHead(4)),
    "convnet": lambda: ConvNet(1, widths=(3,), norm="group"),
    "resnet": lambda: ResNet(1, blocks=1, widths=(2, 4)),
    "vit": lambda: ViT(image_size=4, width=4, depth=1, heads=1),
    "cct": lambda: CCT(image_size=4, width=4, depth=1, heads=1),
    "guard": lambda: Wrapper(whole(3, LinearHead(3, (0, 1)))),
    "half": lambda: whole(3, LinearHead(3, (0, 1))).to(torch.bfloat16),
}


@pytest.mark.parametrize("name", MODELS)
def test_saved_models_come_back_bit_by_bit(name: str, make: Make, tmp_path: Path) -> None:
    model = make(MODELS[name])
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    assert type(again) is type(model)
    assert digest(again) == digest(model)
    assert again.describe() == model.describe()
    assert {k: v.dtype for k, v in again.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
    assert not again.training
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_a_grown_and_retired_head_comes_back(make: Make, tmp_path: Path, predictor: Predictor) -> None:
    predictor.head.grow([9, 0], torch.Generator().manual_seed(1))
    predictor.head.retire([1])
    save(predictor, tmp_path / "m")
    again: Any = load(tmp_path / "m")
    x = torch.ones(1, 5)
    assert torch.equal(again(values=x).logits, predictor(values=x).logits)
    assert again.head.classes.tolist() == [4, 1, 9, 0]
    again.head.grow([1], torch.Generator().manual_seed(2))  # and goes on as the first would
    predictor.head.grow([1], torch.Generator().manual_seed(2))
    assert digest(again) == digest(predictor)


def test_a_fresh_process_reads_the_same(predictor: Predictor, tmp_path: Path) -> None:
    save(predictor, tmp_path / "m")
    code = (
        "import sys, torch\nfrom engram.models import load, digest\n"
        "before = torch.get_rng_state()\n"
        f"model = load({str(tmp_path / 'm')!r})\n"
        "assert torch.equal(before, torch.get_rng_state())\n"
        "print(digest(model), 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [digest(predictor), "False"]


def test_transformers_models_come_back(
    tiny_vit: nn.Module, tiny_gpt: Any, tmp_path: Path, moved_by: Callable[[Callable[[], object]], list[str]]
) -> None:
    for name, model in (("vit", tiny_vit), ("gpt", tiny_gpt)):
        save(model, tmp_path / name)
        again = load(tmp_path / name)
        assert type(again) is type(model)
        assert digest(again) == digest(model)
        assert not again.training
        assert digest(unpack(*pack(model))) == digest(model)
        assert moved_by(lambda name=name: load(tmp_path / name)) == []
    tied = unpack(*pack(tiny_gpt))
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert "lm_head.weight" not in pack(tiny_gpt)[1]


def test_transformers_models_inside_engrams(tiny_vit: Any, tiny_gpt: Any, make: Make, tmp_path: Path) -> None:
    classifier = make(lambda: Predictor(tiny_vit.vit, LinearHead(16, (0, 1))))
    for model in (Wrapper(tiny_gpt), classifier, tiny_vit.vit):  # the last two have no pooler
        save(model, tmp_path / "m")
        again = load(tmp_path / "m")
        assert type(again) is type(model)
        assert digest(again) == digest(model)
    ids = torch.tensor([[1, 2]])
    save(Wrapper(tiny_gpt), tmp_path / "m")
    assert torch.equal(load(tmp_path / "m")(input_ids=ids).logits, tiny_gpt(input_ids=ids).logits)


def test_packed_tensors_are_copies(predictor: Predictor) -> None:
    config, tensors = pack(predictor)
    assert json.loads(json.dumps(config)) == config
    before = digest(predictor)
    for tensor in tensors.values():
        tensor.zero_()
    assert digest(predictor) == before
    other = unpack(config, tensors)
    for tensor in tensors.values():
        tensor.fill_(1)
    assert other.head.weight.abs().sum() == 0


def test_the_digest_sees_every_bit_and_no_order(predictor: Predictor) -> None:
    class Renamed(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            for name in names:
                self.register_buffer(name, torch.zeros(2, dtype=torch.float64))

    assert digest(Renamed("a", "b")) == digest(Renamed("b", "a"))
    assert digest(Renamed("a", "b")) != digest(Renamed("a", "c"))
    assert digest(Renamed("a")) != digest(Renamed("a").to(torch.float32))
    before = digest(predictor)
    predictor.head.bias.data[0] = torch.nextafter(predictor.head.bias.data[0], torch.tensor(9.0))
    assert digest(predictor) != before
    empty = Renamed("a")
    empty.a = torch.zeros(0, 2)
    other = Renamed("a")
    other.a = torch.zeros(2, 0)
    assert digest(empty) != digest(other)


# what is damaged


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def reshape(path: Path) -> None:
    save_file({**load_file(path), "head.weight": torch.zeros(2, 9)}, path)


def drop(path: Path) -> None:
    save_file({k: v for k, v in load_file(path).items() if k != "head.bias"}, path)


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated": ("model.safetensors", truncate, r"cannot read .*model\.safetensors"),
    "emptied": ("model.safetensors", lambda path: path.write_bytes(b""), r"cannot read .*model\.safetensors"),
    "lost": ("model.safetensors", Path.unlink, r"cannot read .*model\.safetensors"),
    "reshaped": ("model.safetensors", reshape, "weights do not fit Predictor.*head.weight"),
    "incomplete": ("model.safetensors", drop, "weights do not fit Predictor.*head.bias"),
    "no config": ("config.json", Path.unlink, r"holds no saved model \(config\.json is missing\); give one"),
    "no json": ("config.json", truncate, r"cannot read .*config\.json"),
    "a list": ("config.json", lambda path: path.write_text("[]"), r"config\.json holds no config"),
    "format": ("config.json", lambda path: edit(path, format=99), "config of format 1"),
    "class": ("config.json", lambda path: edit(path, **{"class": "os.system"}), "unknown class.*'os.system'"),
    "nested": ("config.json", lambda path: edit(path, head={"class": "Popen"}), "unknown class.*'Popen'"),
    "argument": ("config.json", lambda path: edit(path, depth=3), "does not fit Predictor.*'depth'"),
    "value": (
        "config.json",
        lambda path: edit(path, head={"class": "LinearHead", "width": -2}),
        "not fit LinearHead",
    ),
    "hub": (
        "config.json",
        lambda path: edit(path, head={"class": "transformers", "architecture": "x", "config": {}}),
        "unknown model type of transformers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_error_that_names_the_place(kind: str, predictor: Predictor, tmp_path: Path) -> None:
    name, damage, message = DAMAGE[kind]
    save(predictor, tmp_path / "model")
    damage(tmp_path / "model" / name)
    with pytest.raises(EngramError, match=rf"(?s){message}") as caught:
        load(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value)


def test_transformers_weights_are_never_made_up(tiny_vit: Any, tmp_path: Path) -> None:
    save(tiny_vit, tmp_path / "vit")
    path = tmp_path / "vit" / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if name != "classifier.bias"}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(EngramError, match=r"lacks weights .*classifier\.bias"):
        load(tmp_path / "vit")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(EngramError, match="vit"):
        load(tmp_path / "vit")
    save(tiny_vit, tmp_path / "vit")
    edit(tmp_path / "vit" / "config.json", architectures=["AutoTokenizer"])
    with pytest.raises(EngramError, match="no model class 'AutoTokenizer'"):
        load(tmp_path / "vit")


def test_what_cannot_be_saved(predictor: Predictor, tiny_vit: Any, tmp_path: Path) -> None:
    with pytest.raises(EngramError, match="Sequential cannot be saved"):
        save(nn.Sequential(), tmp_path / "m")

    class Own(type(tiny_vit)):  # type: ignore[misc]
        pass

    tiny_vit.__class__ = Own
    with pytest.raises(EngramError, match="not a class of transformers itself"):
        save(tiny_vit, tmp_path / "m")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    with pytest.raises(EngramError, match="no saved model"):
        save(predictor, tmp_path / "work")
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert (tmp_path / "work" / "thesis.tex").read_text() == "years"


def test_third_parties_register_their_classes(make: Make, tmp_path: Path) -> None:
    class Doubled(Configured, nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    model = make(lambda: Doubled(MLP(2, hidden=())))
    save(model, tmp_path / "m")
    with pytest.raises(EngramError, match="unknown class of a saved model 'Doubled'"):
        load(tmp_path / "m")
    try:
        assert register_loadable(Doubled) is Doubled
        assert digest(load(tmp_path / "m")) == digest(model)
        register_loadable(Doubled)  # twice is once
        with pytest.raises(EngramError, match="a loadable class MLP exists already"):
            register_loadable(type("MLP", (), {}))
    finally:
        LOADABLE.pop("Doubled")


@pytest.mark.parametrize("name", LOADABLE)
def test_the_fixed_list_is_right(name: str) -> None:
    assert loadable(name).__name__ == name
    assert issubclass(loadable(name), Configured)
    assert register_loadable(loadable(name)) is loadable(name)


# a disk that refuses


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_full_disk_leaves_the_old_model(
    call: str, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(predictor, tmp_path / "m")
    before = digest(predictor)
    predictor.head.retire([4])
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(EngramError, match=r"could not write .*m: No space left.*unchanged"):
            save(predictor, tmp_path / "m")
    assert digest(load(tmp_path / "m")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_file_that_may_not_grow(predictor: Predictor, tmp_path: Path) -> None:
    """The system itself refuses, in the middle of the weights."""
    save(predictor, tmp_path / "m")
    code = (
        "import resource, signal\nfrom engram.errors import EngramError\n"
        "from engram.models import load, save\n"
        f"model = load({str(tmp_path / 'm')!r})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))\n"
        f"try:\n    save(model, {str(tmp_path / 'm')!r})\n"
        "except EngramError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "could not write" in done.stdout
    assert digest(load(tmp_path / "m")) == digest(predictor)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_the_second_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "goal").mkdir()
    (tmp_path / "goal" / "old").write_text("old")
    rename, calls = os.rename, []

    def second_fails(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            full()
        rename(*args)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(EngramError, match="No space left"), new_directory(tmp_path / "goal") as fresh:
        (fresh / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["goal", "old"]


def test_a_directory_is_filled_and_then_takes_the_place(tmp_path: Path) -> None:
    goal = tmp_path / "deep" / "goal"
    for text in ("one", "two"):
        with new_directory(goal) as fresh:
            (fresh / "part").mkdir()
            (fresh / "part" / text).write_text(text)
        assert [path.name for path in goal.rglob("*")] == ["part", text]
    with pytest.raises(KeyError), new_directory(goal):
        raise KeyError("interrupted")
    assert [path.name for path in goal.parent.iterdir()] == ["goal"]
    assert (goal / "part" / "two").read_text() == "two"
    (tmp_path / "file").write_text("kept")
    with pytest.raises(EngramError, match="is a file, not a directory"), new_directory(tmp_path / "file"):
        pass
    replace_directory(goal, tmp_path / "moved")
    assert (tmp_path / "moved" / "part" / "two").read_text() == "two"


def test_one_file_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "notes.txt"
    write_atomic(path, "first: é")
    assert path.read_bytes() == "first: é".encode()
    write_atomic(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(EngramError, match=r"notes\.txt: No space left.*unchanged"):
                write_atomic(path, "second")
        assert path.read_bytes() == b"\x00\x01"
    assert [entry.name for entry in path.parent.iterdir()] == ["notes.txt"]
