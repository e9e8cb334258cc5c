"""Certificates of erasure: a signed statement of what was asked, done and found, about these very weights.

An in-toto Statement (version 1) in a DSSE envelope, signed with Ed25519. Its subjects are the files of the model's
directory by SHA-256; its predicate says what was measured, and claims no more than that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram.environment import require
from engram.errors import EngramError
from engram.files import sha256, write_atomic

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:engram:erasure:v1"
PAYLOAD = "application/vnd.in-toto+json"


def keygen(path: str | Path) -> tuple[Path, Path]:
    """A new Ed25519 key pair: the private key at `path` (PEM, readable by its owner alone), the public one beside it
    (`.pub`). EngramError if a key is there already."""
    serialization = require("cryptography.hazmat.primitives.serialization", "service")
    ed25519 = require("cryptography.hazmat.primitives.asymmetric.ed25519", "service")
    private, public = Path(path), Path(path).with_suffix(".pub")
    for file in (private, public):
        if file.exists():
            raise EngramError(f"{file} exists; a key that has signed something must not be lost: choose another name")
    key = ed25519.Ed25519PrivateKey.generate()
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    write_atomic(private, secret, mode=0o600)
    write_atomic(public, key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def issue(model: str | Path, predicate: Mapping[str, Any], key: str | Path) -> str:
    """The certificate of a model's directory, as the text of its file; `key`: the private key's file."""
    dsse, signer = require("securesystemslib.dsse", "service"), require("securesystemslib.signer", "service")
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in digests(model).items()],
        "predicateType": PREDICATE,
        "predicate": dict(predicate),
    }
    content = json.dumps(statement, ensure_ascii=False, sort_keys=True).encode()
    envelope = dsse.Envelope(content, PAYLOAD, {})
    envelope.sign(signer.CryptoSigner(_key(key, private=True)))
    return _text(envelope.to_dict())


def verify(certificate: str | Path, key: str | Path, model: str | Path | None = None) -> dict[str, Any]:
    """The predicate of a certificate that holds: byte for byte as issued, signed with the key, and, given `model`,
    about exactly the files of that directory. EngramError says what does not hold. `key`: the public key's file."""
    dsse, signer = require("securesystemslib.dsse", "service"), require("securesystemslib.signer", "service")
    exceptions = require("securesystemslib.exceptions", "service")
    path = Path(certificate)
    try:
        text = path.read_text(encoding="utf-8")
        envelope = dsse.Envelope.from_dict(json.loads(text))
        written = _text(envelope.to_dict())
    except OSError as error:
        raise EngramError(f"the certificate {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, exceptions.Error) as error:
        raise EngramError(f"{path} is no certificate: {error}") from error
    if written != text:
        raise EngramError(f"the certificate {path} was changed: it is not byte for byte as it was issued")
    try:
        envelope.verify([signer.SSlibKey.from_crypto(_key(key, private=False))], 1)
    except exceptions.Error as error:
        raise EngramError(f"the certificate {path} was not signed with the key {key}, or was changed since") from error
    statement = json.loads(envelope.payload)
    if envelope.payload_type != PAYLOAD or statement.get("predicateType") != PREDICATE:
        raise EngramError(f"{path} certifies something else: {statement.get('predicateType')}")
    if model is not None:
        _about(statement, Path(model), path)
    return dict(statement["predicate"])


def digests(directory: str | Path) -> dict[str, str]:
    """SHA-256 of every file of a directory, by its name within; EngramError if there is none."""
    folder = Path(directory)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        raise EngramError(f"{folder} holds no files, so there is no model to certify")
    return {file.relative_to(folder).as_posix(): sha256(file) for file in files}


def _about(statement: Mapping[str, Any], model: Path, certificate: Path) -> None:
    stated = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    found = digests(model)
    differing = sorted(name for name in stated.keys() | found.keys() if stated.get(name) != found.get(name))
    if differing:
        what = "another model" if set(differing) >= set(stated) else f"other contents of {', '.join(differing)}"
        raise EngramError(f"the certificate {certificate} is about {what} than what stands in {model}")


def _text(envelope: Mapping[str, Any]) -> str:
    return json.dumps(envelope, indent=1, sort_keys=True) + "\n"


def _key(path: str | Path, *, private: bool) -> Any:
    serialization = require("cryptography.hazmat.primitives.serialization", "service")
    ed25519 = require("cryptography.hazmat.primitives.asymmetric.ed25519", "service")
    exceptions = require("cryptography.exceptions", "service")
    try:
        content = Path(path).read_bytes()
        if private:
            key = serialization.load_pem_private_key(content, password=None)
        else:
            key = serialization.load_pem_public_key(content)
    except (OSError, ValueError, TypeError, exceptions.UnsupportedAlgorithm) as error:
        kind = "private" if private else "public"
        raise EngramError(f"{path} holds no {kind} key that can be read (PEM, no password): {error}") from error
    wanted = ed25519.Ed25519PrivateKey if private else ed25519.Ed25519PublicKey
    if not isinstance(key, wanted):
        raise EngramError(f"{path} holds a key of another kind than Ed25519; make one with engram certificate keygen")
    return key
