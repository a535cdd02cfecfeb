"""Signatures of bundles: genuine keys and certificates, offline."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crt_export.cli import main

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("model_signing") is None and os.environ.get("CRT_EXPORT_TEST_INSTALLED") != "1",
    reason="model-signing is not installed: the extra sign, which make test installs",
)
Answer = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bundle(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "validate" / "golden" / "bundle-v1", tmp_path / "bundle"))


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Answer:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def write_key(folder: Path, name: str, password: bytes | None = None) -> Any:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / f"{name}.pem").write_bytes(key.private_bytes(pem, form, hidden))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return key


def write_certificate(folder: Path, name: str, key: Any, issuer: str, issuer_key: Any, *, root: bool) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    usage = {
        "digital_signature": not root, "content_commitment": False, "key_encipherment": False,
        "data_encipherment": False, "key_agreement": False, "key_cert_sign": root, "crl_sign": root,
        "encipher_only": False, "decipher_only": False,
    }  # fmt: skip
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=root, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if not root:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
    certificate = builder.sign(issuer_key, hashes.SHA256())
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def identity_of(bundle: Path) -> str:
    return hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()


def test_owner_of_the_key_is_recognised_and_nobody_else(bundle: Path, tmp_path: Path, answer: Answer) -> None:
    write_key(tmp_path, "ours")
    write_key(tmp_path, "theirs")
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    code, out, err = answer("sign", bundle, "--key", tmp_path / "ours.pem")
    assert (code, err) == (0, "")
    assert out == f"signed {identity_of(bundle)}: wrote {bundle}.sig\n"
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
    code, out, _ = answer("verify", bundle, "--key", tmp_path / "ours.pub")
    assert (code, out.split(":")[0]) == (0, f"verified {identity_of(bundle)}")
    code, out, _ = answer("verify", bundle, "--key", tmp_path / "ours.pub", "--json")
    assert (code, json.loads(out)["identity"], json.loads(out)["verified"]) == (0, identity_of(bundle), True)
    code, out, err = answer("verify", bundle, "--key", tmp_path / "theirs.pub")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {bundle}: the signature does not hold (")


def test_signature_is_of_this_bundle_only(
    bundle: Path, tmp_path: Path, answer: Answer, sign_again: Callable[[Path], None]
) -> None:
    write_key(tmp_path, "ours")
    signature = tmp_path / "kept.sig"
    assert answer("sign", bundle, "--key", tmp_path / "ours.pem", "--signature", signature)[0] == 0
    check = ("verify", bundle, "--key", tmp_path / "ours.pub", "--signature", signature)
    assert answer(*check)[0] == 0
    assert not Path(f"{bundle}.sig").exists()
    path = bundle / "report.json"
    path.write_bytes(path.read_bytes() + b"\n")
    code, _, err = answer(*check)
    assert (code, "report.json" in err) == (2, True)  # the manifest is the signed one, a file is not
    sign_again(bundle)
    code, _, err = answer(*check)
    assert (code, "the signature does not hold" in err) == (2, True)


def test_certificates(bundle: Path, tmp_path: Path, answer: Answer) -> None:
    authority, other = write_key(tmp_path, "authority"), write_key(tmp_path, "other")
    write_certificate(tmp_path, "authority", authority, "authority", authority, root=True)
    write_certificate(tmp_path, "other", other, "other", other, root=True)
    write_certificate(tmp_path, "signer", write_key(tmp_path, "signer"), "authority", authority, root=False)
    code, _, err = answer(
        "sign", bundle, "--key", tmp_path / "signer.pem", "--certificate", tmp_path / "signer.crt",
        "--chain", tmp_path / "authority.crt",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert answer("verify", bundle, "--chain", tmp_path / "authority.crt")[0] == 0
    code, _, err = answer("verify", bundle, "--chain", tmp_path / "other.crt")
    assert (code, "the signature does not hold" in err) == (2, True)


def test_encrypted_key(bundle: Path, tmp_path: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    write_key(tmp_path, "ours", b"secret")
    for password in ("", "wrong"):
        monkeypatch.setenv("CRT_EXPORT_KEY_PASSWORD", password)
        code, _, err = answer("sign", bundle, "--key", tmp_path / "ours.pem")
        assert (code, "cannot be signed with this key" in err) == (2, True)
    assert not Path(f"{bundle}.sig").exists()
    monkeypatch.setenv("CRT_EXPORT_KEY_PASSWORD", "secret")
    assert answer("sign", bundle, "--key", tmp_path / "ours.pem")[0] == 0
    assert answer("verify", bundle, "--key", tmp_path / "ours.pub")[0] == 0


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\x00\xff", b'{"dsseEnvelope": 1}', b" " * (1 << 20) + b" "])
def test_damaged_signature_is_refused(bundle: Path, tmp_path: Path, answer: Answer, content: bytes) -> None:
    write_key(tmp_path, "ours")
    Path(f"{bundle}.sig").write_bytes(content)
    code, out, err = answer("verify", bundle, "--key", tmp_path / "ours.pub")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sign", "{bundle}", "--key", "absent.pem"), "expected a PEM file"),
        (("sign", "{bundle}", "--key", "{bundle}/manifest.json"), "cannot be signed with this key"),
        (("sign", "{bundle}", "--key", "{tmp}/ours.pem", "--signature", "{bundle}/x.sig"), "lies in"),
        (("sign", "{tmp}", "--key", "{tmp}/ours.pem"), "is not a bundle"),
        (("verify", "{bundle}"), "either a public key or certificates"),
        (("verify", "{bundle}", "--key", "{tmp}/ours.pub"), "'crt-export sign' makes one"),
    ],
)
def test_unusable_arguments(
    bundle: Path, tmp_path: Path, answer: Answer, arguments: tuple[str, ...], message: str
) -> None:
    write_key(tmp_path, "ours")
    code, _, err = answer(*(argument.format(bundle=bundle, tmp=tmp_path) for argument in arguments))
    assert (code, message in err) == (2, True), err


def test_inspect_shows_the_identity(bundle: Path, answer: Answer) -> None:
    assert f"identity {identity_of(bundle)} " in answer("inspect", bundle)[1]
    assert json.loads(answer("inspect", bundle, "--json")[1])["identity"] == identity_of(bundle)
