"""A certificate holds for the bytes that were signed, the key that signed them, and the files they speak of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engram.core.certificate import PREDICATE, STATEMENT, digests, issue, keygen, verify
from engram.errors import EngramError

SAID = {"method": {"name": "forget.SSD"}, "exact": False, "audit": {"verdict": "unknown"}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(bytes(range(200)))
    (folder / "model" / "config.json").write_text("{}")
    keygen(folder / "desk.key")
    (folder / "certificate.json").write_text(issue(folder / "model", SAID, folder / "desk.key"))
    return folder


def check(home: Path, **other: Path) -> dict[str, Any]:
    paths = {"certificate": home / "certificate.json", "key": home / "desk.pub", "model": home / "model", **other}
    return verify(**paths)


def test_it_is_an_in_toto_statement_in_a_dsse_envelope(home: Path) -> None:
    import base64

    envelope = json.loads((home / "certificate.json").read_text())
    assert envelope["payloadType"] == "application/vnd.in-toto+json" and len(envelope["signatures"]) == 1
    statement = json.loads(base64.b64decode(envelope["payload"]))
    assert (statement["_type"], statement["predicateType"]) == (STATEMENT, PREDICATE)
    assert {s["name"]: s["digest"]["sha256"] for s in statement["subject"]} == digests(home / "model")
    assert check(home) == statement["predicate"] == SAID


def test_any_changed_byte_of_the_certificate_is_refused(home: Path, tmp_path: Path) -> None:
    content = (home / "certificate.json").read_bytes()
    changed = tmp_path / "changed.json"
    for place in range(len(content)):
        changed.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(EngramError):
            check(home, certificate=changed)
    changed.write_bytes(content + b"\n")
    with pytest.raises(EngramError, match="byte for byte"):
        check(home, certificate=changed)


def test_any_changed_file_of_the_model_is_refused(home: Path, tmp_path: Path) -> None:
    import shutil

    for name in ("model.safetensors", "config.json"):
        copy = tmp_path / name
        shutil.copytree(home / "model", copy)
        content = bytearray((copy / name).read_bytes())
        content[1] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(EngramError, match=f"other contents of {name}"):
            check(home, model=copy)
    more = tmp_path / "more"
    shutil.copytree(home / "model", more)
    (more / "adapter.safetensors").write_bytes(b"x")
    with pytest.raises(EngramError, match="other contents of adapter"):
        check(home, model=more)
    other = tmp_path / "other"
    other.mkdir()
    (other / "weights").write_bytes(b"x")
    with pytest.raises(EngramError, match="about another model"):
        check(home, model=other)


def test_another_key_is_refused(home: Path, tmp_path: Path) -> None:
    keygen(tmp_path / "other.key")
    with pytest.raises(EngramError, match="not signed with the key"):
        check(home, key=tmp_path / "other.pub")


def test_what_is_no_key_no_certificate_and_no_model_is_named(home: Path, tmp_path: Path) -> None:
    with pytest.raises(EngramError, match="holds no public key"):
        check(home, key=home / "certificate.json")
    with pytest.raises(EngramError, match="is no certificate"):
        check(home, certificate=home / "desk.pub")
    with pytest.raises(EngramError, match="cannot be read"):
        check(home, certificate=tmp_path / "nothing.json")
    with pytest.raises(EngramError, match="holds no private key"):
        issue(home / "model", SAID, home / "desk.pub")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EngramError, match="no files"):
        issue(tmp_path / "empty", SAID, home / "desk.key")


def test_a_key_of_another_kind_is_refused(home: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    (tmp_path / "ec.key").write_bytes(pem)
    with pytest.raises(EngramError, match="Ed25519"):
        issue(home / "model", SAID, tmp_path / "ec.key")


def test_a_key_is_never_written_over(home: Path) -> None:
    before = (home / "desk.key").read_bytes()
    with pytest.raises(EngramError, match="exists"):
        keygen(home / "desk.key")
    assert (home / "desk.key").read_bytes() == before
    assert (home / "desk.key").stat().st_mode & 0o077 == 0
