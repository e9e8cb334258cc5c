"""Readers: files made here, what they become, and a clear sentence for every kind of damage."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn import datasets as sets
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from engram.data.preprocessing import Preprocessing
from engram.data.readers import read, read_with, train_test
from engram.data.table import Table, Target
from engram.errors import EngramError

CSV = """id,age,colour,weight,label
a,20,red,1.5,yes
b,30,blue,2.5,no
c,40,red,3.5,
d,50,green,4.5,yes
"""


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.csv", CSV)


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def parquet(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def picture(pixels: np.ndarray, kind: str = "PNG", **how: Any) -> bytes:
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, kind, **how)
    return held.getvalue()


def pictures(n: int, shape: tuple[int, ...] = (5, 7, 3), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def refused(source: str | Path, message: str, **settings: Any) -> None:
    with pytest.raises(EngramError, match=message):
        read(source, **settings)


# scikit-learn's sets


def test_digits_are_images_between_0_and_1() -> None:
    found, plain = read("sklearn:digits"), sets.load_digits()
    assert found.inputs["pixel_values"].dtype == torch.float32
    assert np.array_equal(found.inputs["pixel_values"].numpy(), plain.images[:, None].astype(np.float32) / 16)
    assert found.labels is not None and found.labels.tolist() == plain.target.tolist()
    assert found.ids[:2] == ("digit-0000", "digit-0001") and found.ids[-1] == "digit-1796"
    assert found.names[3] == "three" and set(found.where("label == 'three'").labels.tolist()) == {3}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["wine", "breast_cancer", "iris"])
def test_tables_of_classes_are_standardised(name: str) -> None:
    found, plain = read(f"sklearn:{name}"), getattr(sets, f"load_{name}")()
    assert found.target == Target.CLASSES and found.labels is not None
    assert found.labels.tolist() == plain.target.tolist()
    assert list(found.names.values()) == list(plain.target_names)
    expected = StandardScaler().fit_transform(plain.data)
    assert np.allclose(found.inputs["values"].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("name", "k"), [("diabetes", 1), ("linnerud", 3)])
def test_tables_of_numbers_keep_them_as_they_are(name: str, k: int) -> None:
    found, plain = read(f"sklearn:{name}"), getattr(sets, f"load_{name}")()
    assert found.target == Target.NUMBERS and found.labels is not None and found.names == {}
    assert torch.equal(found.labels, torch.tensor(plain.target.reshape(-1, k)).float())
    assert found.shapes == {"values": (plain.data.shape[1],)}


def test_the_first_rows_alone() -> None:
    assert read("sklearn:iris", limit=7).ids[-1] == "iris-0006" and len(read("sklearn:iris", limit=999)) == 150
    refused("sklearn:iris", "limit=0 leaves no rows", limit=0)
    refused("sklearn:digit", "unknown scikit-learn data set 'digit'; did you mean 'digits'")


# columns and labels


def test_columns_become_numbers_and_categories(csv: Path) -> None:
    found, plan = read_with(csv)
    numbers = np.array([[20, 30, 40, 50], [1.5, 2.5, 3.5, 4.5]])
    ages, weights = ((x - x.mean()) / x.std() for x in numbers)
    colours = [[0, 0, 1], [1, 0, 0], [0, 0, 1], [0, 1, 0]]  # blue, green, red
    assert np.allclose(found.inputs["values"], np.column_stack([ages, colours, weights]), atol=1e-6)
    assert found.inputs["values"].dtype == torch.float32
    assert found.ids == tuple("abcd") and found.extra == {}
    assert found.labels is not None and found.labels.tolist() == [1, 0, -1, 1]
    assert found.names == {0: "no", 1: "yes"}
    assert plan.columns == ("age", "colour", "weight") and plan.categories == {"colour": ("blue", "green", "red")}


def test_only_the_columns_that_are_asked_for(csv: Path) -> None:
    found = read(csv, values=["weight"], standardise=False)
    assert found.inputs["values"].flatten().tolist() == [1.5, 2.5, 3.5, 4.5]
    assert torch.equal(torch.as_tensor(found.extra["age"]), torch.tensor([20, 30, 40, 50]))
    assert found.extra["colour"] == ["red", "blue", "red", "green"]
    refused(csv, "rows.csv: unknown column 'wait'; did you mean 'weight'", values=["wait"])
    assert read(csv, values=[]).inputs == {}


def test_a_constant_column_is_zero(tmp_path: Path) -> None:
    found = read(write(tmp_path / "x.csv", "a,b,label\n7,1,x\n7,3,y\n"))
    assert found.inputs["values"].tolist() == [[0, -1], [0, 1]]


@pytest.mark.parametrize(
    ("values", "ids", "names"),
    [
        ([0, 2, 1], [0, 2, 1], ["0", "1", "2"]),
        ([10, 2, 5], [2, 0, 1], ["2", "5", "10"]),
        ([True, False, True], [1, 0, 1], ["False", "True"]),
        ([-1, 1, 1], [0, 1, 1], ["-1", "1"]),
        ([-1, 1, 0], [-1, 1, 0], ["0", "1"]),
        ([None, 1, 0], [-1, 1, 0], ["0", "1"]),
        (["b", "", "a"], [1, -1, 0], ["a", "b"]),
        (["b", None, "a"], [1, -1, 0], ["a", "b"]),
    ],
)
def test_classes_by_value(tmp_path: Path, values: list[Any], ids: list[int], names: list[str]) -> None:
    found = read(parquet(tmp_path / "x.parquet", {"x": [1.0, 2.0, 3.0], "label": values}))
    assert found.target == Target.CLASSES and found.labels is not None and found.labels.tolist() == ids
    assert list(found.names.values()) == names


def test_labels_that_are_numbers(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", {"x": [1.0, 2.0], "y": [0.5, None], "z": [3, 4], "label": ["u", "v"]})
    one = read(path, label="y")
    assert one.target == Target.NUMBERS and torch.equal(one.labels.isnan(), torch.tensor([[False], [True]]))  # type: ignore[union-attr]
    both = read(path, label=["z", "y"], values=["x"])
    assert both.labels is not None and both.labels[0].tolist() == [3, 0.5]
    assert read(path, label="z", values=["x"]).target == Target.CLASSES
    assert read(path, label=["z"], values=["x"]).labels.tolist() == [[3], [4]]  # type: ignore[union-attr]
    refused(path, "the column 'label' .string. holds no numbers", label=["label"], values=["x"])


def test_which_column_is_the_label(tmp_path: Path, csv: Path) -> None:
    assert read(csv, label="colour").names == {0: "blue", 1: "green", 2: "red"}
    unlabelled = read(csv, label=False)
    assert unlabelled.target == Target.NONE and unlabelled.names == {}
    assert unlabelled.shapes == {"values": (5,)} and unlabelled.extra == {"label": ["yes", "no", "", "yes"]}
    none = write(tmp_path / "none.csv", "a,b\n1,2\n")
    refused(none, "there is no label column 'label'; say with label= .--label. which it is of a, b, or .* label=False")
    refused(none, "there is no label column 'c'", label="c")
    refused(write(tmp_path / "x.csv", "a,label\n1,\n2,\n"), "no row has a label in the column 'label'")


def test_ids(tmp_path: Path) -> None:
    one = parquet(tmp_path / "one.parquet", {"x": [1.0, 2.0], "key": [7, 8], "label": ["a", "b"]})
    assert read(one, id="key").ids == ("7", "8")
    assert read(one, values=["x"]).ids == ("row-000000", "row-000001")
    one.rename(tmp_path / "other.parquet")
    assert read(tmp_path / "other.parquet", values=["x"], limit=1).ids == ("row-000000",)
    refused(tmp_path / "other.parquet", "unknown column 'kay'; did you mean 'key'", id="kay")
    double = parquet(tmp_path / "double.parquet", {"x": [1.0, 2.0], "id": ["a", "a"], "label": ["a", "b"]})
    refused(double, "double.parquet: the id 'a' stands in the table more than once")
    lacking = parquet(tmp_path / "lacking.parquet", {"x": [1.0, 2.0], "id": ["a", None], "label": ["a", "b"]})
    refused(lacking, "row 1 .counted from 0. has no id in the column 'id'")


def test_texts_are_kept_and_other_columns_beside_them(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "text": "good\u2028one", "label": "pos", "stars": 5, "tags": ["x", "y"], "when": None},
        {"id": "b", "text": "bad one", "label": "neg", "stars": None, "tags": [], "when": "2020-01-01"},
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    for found in (
        read(write(tmp_path / "x.jsonl", lines)),
        read(write(tmp_path / "bom.jsonl", "\ufeff" + lines)),
        read(write(tmp_path / "x.json", json.dumps(rows))),
    ):
        assert found.inputs == {} and found.ids == ("a", "b") and found.names == {0: "neg", 1: "pos"}
        assert found.extra["text"] == ["good\u2028one", "bad one"]
        assert torch.as_tensor(found.extra["stars"]).isnan().tolist() == [False, True]
        assert found.extra["tags"] == ['["x", "y"]', "[]"] and found.extra["when"] == ["", "2020-01-01"]
    other = read(tmp_path / "x.jsonl", text="when", values=["stars"], limit=1)
    assert other.extra["text"] == [""] and other.shapes == {"values": (1,)}


def test_many_texts_are_no_categories(tmp_path: Path) -> None:
    names = [f"name {row}" for row in range(300)]
    path = parquet(tmp_path / "x.parquet", {"name": names, "x": np.arange(300.0), "label": np.arange(300) % 2})
    refused(path, "the column 'name' holds 300 different texts, too many .* text= .* values=")
    assert read(path, id="name").ids[299] == "name 299"


def test_types_that_say_the_same_in_another_way(tmp_path: Path) -> None:
    columns = {
        "a": pa.array(["u", "v", "u"]).dictionary_encode(),
        "b": pa.array(["u", "v", "u"], pa.large_string()),
        "c": pa.array([True, None, False]),
        "d": pa.array([[1, 2], [3, 4], [5, 6]]),
        "e": pa.array([1, 2, 3], pa.uint16()),
        "label": pa.array(["x", "y", "x"]).dictionary_encode(),
    }
    found = read(parquet(tmp_path / "x.parquet", columns), values=["a", "b", "d"], standardise=False)
    assert found.inputs["values"].tolist() == [[1, 0, 1, 0, 1, 2], [0, 1, 0, 1, 3, 4], [1, 0, 1, 0, 5, 6]]
    assert torch.as_tensor(found.extra["c"])[[0, 2]].tolist() == [1, 0]
    assert torch.equal(torch.as_tensor(found.extra["e"]), torch.tensor([1, 2, 3]))
    assert found.labels is not None and found.labels.tolist() == [0, 1, 0]


# preprocessing


def test_new_rows_are_treated_as_the_training_rows_were(tmp_path: Path, csv: Path) -> None:
    train, plan = read_with(csv)
    other = write(tmp_path / "test.csv", "label,more,weight,colour,age\nyes,1,2.5,green,30\n,2,1.5,red,20\n")
    test, same = read_with(other, preprocessing=plan)
    assert same == plan and test.labels is not None and test.labels.tolist() == [1, -1]
    assert test.names == train.names and set(test.extra) == {"more"}
    assert torch.equal(test.inputs["values"][1], train.inputs["values"][0])
    assert torch.equal(test.inputs["values"][0, [0, 1, 2, 3, 4]], torch.tensor(
        [train.inputs["values"][1, 0], 0, 1, 0, train.inputs["values"][1, 4]]
    ))  # fmt: skip
    assert read(other, preprocessing=plan, label=False).target == Target.NONE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("age,colour,weight,label\n1,red,2,maybe\n", "unknown class 'maybe'; .* those of the training rows"),
        ("age,colour,label\n1,red,yes\n", "the column 'weight', which the training rows had, is missing"),
        ("age,colour,weight,label\n1,mauve,2,yes\n", "in the column 'colour': unknown category 'mauve'"),
        (
            "age,colour,weight,label\nold,red,2,yes\n",
            "'age' held numbers in the training rows and holds string",
        ),
        ("age,colour,weight,label\n1,5,2,yes\n", "'colour' held text in the training rows and holds int64"),
        ("age,colour,weight\n1,red,2\n", "there is no label column 'label'"),
        ("age,colour,weight,label\n1,red,2,0.5\n", "the column 'label' holds double; .* had classes"),
        (
            "age,colour,weight,label\n1,red,2,yes\n,red,2,no\n",
            "'age' has a missing or infinite .* 'row-000001'",
        ),
    ],
)
def test_rows_that_differ_from_the_training_rows(csv: Path, tmp_path: Path, text: str, message: str) -> None:
    _, plan = read_with(csv)
    refused(write(tmp_path / "test.csv", text), f"test.csv: .*{message}", preprocessing=plan)


def test_classes_that_a_file_lacks_keep_their_ids(tmp_path: Path, csv: Path) -> None:
    _, plan = read_with(csv, label="colour", values=["age"])
    test = read(write(tmp_path / "t.csv", "age,colour\n1,red\n2,red\n"), preprocessing=plan)
    assert test.labels is not None and test.labels.tolist() == [2, 2] and len(test.names) == 3


def test_a_preprocessing_comes_back_from_its_file(tmp_path: Path, csv: Path) -> None:
    plans = [read_with(source)[1] for source in (csv, "sklearn:digits", "sklearn:linnerud")]
    for plan in [*plans, Preprocessing()]:
        plan.save(tmp_path / "model")
        assert Preprocessing.load(tmp_path / "model") == plan
        assert json.loads((tmp_path / "model" / "preprocessing.json").read_text()) == plan.to_dict()
    with pytest.raises(EngramError, match="unknown key of a preprocessing 'clases'; did you mean 'classes'"):
        Preprocessing.from_dict({"clases": []})


@pytest.mark.parametrize("text", [None, "", '{"classes": [', '{"clases": []}', "[1]"])
def test_a_damaged_preprocessing_names_its_file(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        write(tmp_path / "preprocessing.json", text)
    with pytest.raises(EngramError, match=r"preprocessing.json cannot be read"):
        Preprocessing.load(tmp_path)


# images


def image_file(path: Path, cells: list[bytes], **columns: Any) -> Path:
    images = [{"bytes": cell, "path": None} for cell in cells]
    return parquet(path, {"image": images, "label": [row % 2 for row in range(len(cells))], **columns})


def test_images_of_a_parquet_file(tmp_path: Path) -> None:
    pixels = pictures(3)
    for name, how in {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}}.items():
        path = image_file(tmp_path / "x.parquet", [picture(x, name, **how) for x in pixels])
        found, plan = read_with(path)
        assert torch.equal(found.inputs["pixel_values"], torch.from_numpy(pixels).permute(0, 3, 1, 2))
        assert found.inputs["pixel_values"].dtype == torch.uint8 and found.extra == {}
        assert plan.image_shape == (3, 5, 7) and plan.image == "image" and not plan.resized


def test_jpegs_are_near_and_stand_upright(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 16 * 24 * 3).reshape(16, 24, 3).astype(np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: turn a quarter to the right
    cells = [
        picture(smooth, "JPEG", quality=95),
        picture(np.rot90(smooth).copy(), "JPEG", quality=95, exif=turned),
    ]
    found = read(image_file(tmp_path / "x.parquet", cells)).inputs["pixel_values"].float()
    plain = torch.from_numpy(smooth).permute(2, 0, 1).float()
    assert (found - plain).abs().mean() < 5


def test_grey_images_and_a_colour_among_them(tmp_path: Path) -> None:
    grey, colour = pictures(2, (4, 4)), pictures(1, (4, 4, 3))
    cells = [picture(grey[0]), picture(grey[1])]
    one, plan = read_with(image_file(tmp_path / "one.parquet", cells))
    assert torch.equal(one.inputs["pixel_values"], torch.from_numpy(grey)[:, None])
    path = image_file(tmp_path / "three.parquet", [*cells, picture(colour[0])])
    three = read(path).inputs["pixel_values"]
    assert three.shape == (3, 3, 4, 4) and torch.equal(three[0], one.inputs["pixel_values"][0].expand(3, 4, 4))
    assert torch.equal(three[2], torch.from_numpy(colour[0]).permute(2, 0, 1))
    assert read(path, preprocessing=plan).inputs["pixel_values"].shape == (3, 1, 4, 4)


def test_the_first_image_of_another_size_is_named_unless_all_are_resized(tmp_path: Path) -> None:
    cells = [picture(x) for x in (*pictures(2), pictures(1, (8, 6, 3))[0])]
    path = image_file(tmp_path / "x.parquet", cells, id=["a", "b", "c"])
    refused(path, r"x.parquet: the image 'c' has 8×6 pixels .* first one 5×7; .*image_size=")
    found, plan = read_with(path, image_size=[4, 6])
    assert found.inputs["pixel_values"].shape == (3, 3, 4, 6) and plan.image_shape == (3, 4, 6) and plan.resized
    assert read(path, image_size=5).inputs["pixel_values"].shape == (3, 3, 5, 5)
    assert read(path, preprocessing=plan, limit=1).inputs["pixel_values"].shape == (1, 3, 4, 6)
    _, plain = read_with(path, limit=2)
    other = image_file(tmp_path / "y.parquet", cells[2:])
    refused(other, r"the shape \(3, 8, 6\), those of the training rows \(3, 5, 7\)", preprocessing=plain)
    refused(path, "image_size=0 is no size", image_size=0)
    refused(path, r"image_size=\[1, 2, 3\] is no size", image_size=[1, 2, 3])


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (picture(pictures(1, (64, 64, 3))[0])[:900], "the image 'b' cannot be read"),
        (b"no picture", "the image 'b' cannot be read"),
        (b"", "the row 'b' has no image"),
        (
            picture(pictures(1, (5, 7))[0].astype(np.uint16)),
            "the image 'b' has mode I;16; give images of 8 bits",
        ),
    ],
    ids=["cut off", "other bytes", "nothing", "16 bits"],
)
def test_a_damaged_image_is_named(tmp_path: Path, cell: bytes, message: str) -> None:
    path = image_file(tmp_path / "x.parquet", [picture(pictures(1)[0]), cell], id=["a", "b"])
    refused(path, f"x.parquet: {message}")


def test_two_columns_of_images(tmp_path: Path) -> None:
    cell = [picture(pictures(1)[0])]
    path = parquet(tmp_path / "x.parquet", {"left": cell, "right": cell, "label": ["a"]})
    refused(path, "the columns left, right hold images; say which one with image= .--image.")
    assert read(path, image="right").shapes == {"pixel_values": (3, 5, 7)}


def test_a_folder_with_a_subfolder_for_each_class(tmp_path: Path) -> None:
    pixels = pictures(3)
    for name, x in zip(("dog/2.png", "cat/1.png", "cat/sub/3.PNG"), pixels, strict=True):
        write(tmp_path / name, picture(x))
    write(tmp_path / "cat/notes.txt", "not a picture")
    write(tmp_path / ".hidden/4.png", b"no picture")
    found = read(tmp_path)
    assert found.ids == ("cat/1.png", "cat/sub/3.PNG", "dog/2.png") and found.names == {0: "cat", 1: "dog"}
    assert found.labels is not None and found.labels.tolist() == [0, 0, 1]
    assert torch.equal(found.inputs["pixel_values"], torch.from_numpy(pixels[[1, 2, 0]]).permute(0, 3, 1, 2))


def test_a_folder_of_images_without_classes(tmp_path: Path) -> None:
    refused(tmp_path, "holds no images; an image folder has one subfolder for each class")
    write(tmp_path / "1.png", picture(pictures(1)[0]))
    refused(tmp_path, "there is no label column 'label'")
    assert read(tmp_path, label=False).ids == ("1.png",)
    write(tmp_path / "2.png", b"")
    refused(tmp_path, "the image '2.png' cannot be read", label=False)


def test_a_column_of_paths(tmp_path: Path) -> None:
    write(tmp_path / "pictures/1.png", picture(pictures(1)[0]))
    path = write(tmp_path / "x.csv", "file,label\npictures/1.png,a\n")
    assert read(path, image="file").shapes == {"pixel_values": (3, 5, 7)}
    refused(
        write(tmp_path / "y.csv", "file,label\npictures/2.png,a\n"),
        "'row-000000' cannot be read",
        image="file",
    )
    refused(write(tmp_path / "z.csv", "file,label\n5,a\n"), "'file' holds int64, no images", image="file")


# the hub's library


def hub_set() -> datasets.Dataset:
    features = datasets.Features(
        {
            "label": datasets.ClassLabel(names=["dog", "cat"]),
            "image": datasets.Image(),
            "n": datasets.Value("int32"),
        }
    )
    images = [Image.fromarray(x) for x in pictures(3)]
    return datasets.Dataset.from_dict({"label": [1, 0, -1], "image": images, "n": [4, 5, 6]}, features)


def looks_like_pictures(found: Table) -> bool:
    assert found.labels is not None
    pixels = torch.from_numpy(pictures(3)).permute(0, 3, 1, 2)
    return (
        torch.equal(found.inputs["pixel_values"], pixels)
        and found.names == {0: "dog", 1: "cat"}
        and found.labels.tolist() == [1, 0, -1]
        and torch.as_tensor(found.extra["n"]).tolist() == [4, 5, 6]
    )


def test_a_file_that_the_library_wrote_says_what_its_classes_are_called(tmp_path: Path) -> None:
    hub_set().to_parquet(tmp_path / "x.parquet")
    assert looks_like_pictures(read(tmp_path / "x.parquet"))


def test_a_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return hub_set()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert looks_like_pictures(read("hub:someone/pictures")) and looks_like_pictures(read("hub:pictures@test"))
    assert asked == [("someone/pictures", "train"), ("pictures", "test")]


def test_a_set_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> datasets.Dataset:
        raise ConnectionError(f"could not reach {name}\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    refused("hub:a/b", "the hub's data set 'a/b' cannot be loaded: could not reach a/b$")
    refused("hub:", "needs the name of a data set")


def test_a_label_beyond_the_names_that_the_source_states(tmp_path: Path) -> None:
    hub_set().to_parquet(tmp_path / "x.parquet")
    columns = pq.read_table(tmp_path / "x.parquet")
    wrong = columns.set_column(0, "label", pa.array([0, 1, 2])).replace_schema_metadata(columns.schema.metadata)
    pq.write_table(wrong, tmp_path / "y.parquet")
    refused(tmp_path / "y.parquet", "the label 2 has no name; the source names 2 classes")


# damaged files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.txt",
            "hello",
            r"x.txt is of no kind that can be read; give .parquet, .csv, .jsonl, .json, or a folder",
        ),
        *((f"x.{kind}", "", f"x.{kind} is empty") for kind in ("csv", "parquet", "jsonl", "json")),
        ("x.csv", "a,label\n", "x.csv holds no rows"),
        ("x.json", "[]", "x.json holds no rows"),
        ("x.jsonl", "\n\n", "x.jsonl holds no rows"),
        ("x.csv", "a,label\n1,x\n2\n", "x.csv cannot be read as csv: .*Row #3: Expected 2 columns, got 1"),
        ("x.csv", 'a,label\n1,x\n2,"y', "x.csv is damaged or cut off: a quotation mark is never closed"),
        ("x.csv", b"a,label\n1,\xff\xfe\n", "x.csv cannot be read as csv: .*utf-8"),
        ("x.csv", "0,0,0\n1,2,3\n", "more than one column '0'; is the first line, the column names, missing"),
        (
            "x.csv",
            "a,label\n1,x\nnan,y\n",
            "x.csv: the column 'a' has a missing or infinite value in row 'row-000001'",
        ),
        (
            "x.csv",
            "a,label\ninf,x\n1,y\n",
            "x.csv: the column 'a' has a missing or infinite value in row 'row-000000'",
        ),
        ("x.csv", "label\nx\n", "x.csv: no column is left to learn from"),
        ("x.jsonl", '{"a": 1, "label": 2}\n\n{"a": 1, "lab\n', "x.jsonl: line 3 is no JSON"),
        ("x.jsonl", '{"a": 1, "label": 2}\n[1, 2]\n', "x.jsonl: line 2 is no object"),
        (
            "x.jsonl",
            '{"a": 1, "label": 2}\n{"a": "x", "label": 2}\n',
            "x.jsonl: column 'a' mixes kinds of values",
        ),
        ("x.jsonl", b'{"a": "\xff"}', "x.jsonl cannot be read as jsonl: .*utf-8"),
        ("x.json", '[{"a": 1}', "x.json cannot be read as json"),
        ("x.json", '{"a": [1, 2]}', "x.json is no list of objects"),
        ("x.parquet", b"PAR1 and then nonsense PAR1", "x.parquet cannot be read as parquet"),
    ],
)
def test_damage_is_named_with_its_file(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    refused(write(tmp_path / name, content), message)


def test_a_parquet_file_that_was_cut_off(tmp_path: Path) -> None:
    whole = parquet(tmp_path / "x.parquet", {"x": np.arange(1000.0), "label": np.arange(1000) % 3}).read_bytes()
    for share in (0.3, 0.9, 0.999):
        refused(write(tmp_path / "cut.parquet", whole[: int(len(whole) * share)]), "cut.parquet cannot be read")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "x.csv", "there is no file or folder .*x.csv")


def test_a_file_with_a_byte_order_mark_and_one_with_line_breaks_in_its_values(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", '\ufeffid,text,label\na,"two\nlines, ""quoted""",x\nb,,y\n')
    found = read(path)
    assert found.ids == ("a", "b") and found.extra["text"] == ['two\nlines, "quoted"', ""]


def test_line_breaks_in_the_values_of_a_large_file(tmp_path: Path) -> None:
    lines = "\n".join(str(number) for number in range(100))
    path = write(tmp_path / "x.csv", "text,label\n" + "".join(f'"{lines}",a\n' for _ in range(9000)))
    assert set(read(path).extra["text"]) == {lines}  # the file is read in blocks of 1 MiB


# training and test


def test_the_split_of_scikit_learn_to_the_row() -> None:
    digits = read("sklearn:digits")
    train, test = train_test(digits, 0.3, 0, how="sklearn")
    plain = sets.load_digits()
    expected = train_test_split(plain.data, plain.target, test_size=0.3, stratify=plain.target, random_state=0)
    assert np.array_equal(train.inputs["pixel_values"].flatten(1).numpy() * 16, expected[0])
    assert np.array_equal(test.inputs["pixel_values"].flatten(1).numpy() * 16, expected[1])
    assert train.labels is not None and train.labels.tolist() == expected[2].tolist()
    numbers = train_test(read("sklearn:diabetes"), 0.25, 3, how="sklearn")[1]
    assert len(numbers) == 111


def test_the_split_by_ids_takes_its_share_of_every_class() -> None:
    digits = read("sklearn:digits")
    train, test = train_test(digits, 0.3, seed=1)
    assert sorted(train.ids + test.ids) == list(digits.ids)
    sizes, tested = (Counter(rows.labels.tolist()) for rows in (digits, test))  # type: ignore[union-attr]
    assert tested == {c: int(0.3 * n + 0.5) for c, n in sizes.items()}
    assert train.ids == tuple(sorted(train.ids)) and test.ids != train_test(digits, 0.3, seed=2)[1].ids


def test_the_split_by_ids_does_not_depend_on_order_and_hardly_on_other_rows() -> None:
    digits = read("sklearn:digits")
    before = set(train_test(digits, 0.3)[1].ids)
    assert set(train_test(digits.take(torch.arange(1797).flip(0)), 0.3)[1].ids) == before
    for gone in ("digit-0000", "digit-0011"):
        after = set(train_test(digits.without([gone]), 0.3)[1].ids)
        assert len(after - before) <= 1 and len(before - after - {gone}) <= 1


def test_small_classes_and_rows_without_classes() -> None:
    rows = Table({"values": torch.zeros(7, 1)}, torch.tensor([0, 0, 0, 0, 1, 1, 2]))
    train, test = train_test(rows, 0.1)
    assert train.classes == (0, 1, 2) and test.classes == (0, 1) and len(test) == 2
    assert len(train_test(rows.unlabelled(), 0.3)[1]) == 2
    with pytest.raises(EngramError, match=r"scikit-learn cannot split these 7 rows: .*1 member"):
        train_test(rows, 0.3, how="sklearn")
    with pytest.raises(EngramError, match="1 rows cannot be split"):
        train_test(rows.take([0]), 0.5)
    for share in (0, 1, 1.5):
        with pytest.raises(EngramError, match="leaves one side empty"):
            train_test(rows, share)
    with pytest.raises(EngramError, match="unknown way to split 'sklean'; did you mean 'sklearn'"):
        train_test(rows, 0.3, how="sklean")  # type: ignore[arg-type]
