"""The signature of a bundle: who vouches for its manifest, which holds the SHA-256 of every other file.

A signature in the OpenSSF Model Signing format over ``manifest.json`` alone, made and checked offline with keys or
certificates in files; nothing is looked up and nothing is sent. It is written beside the bundle, since nothing is ever
written into one.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crt_export.bundle.read import BundleFiles, open_bundle
from crt_export.bundle.schema import MANIFEST_NAME
from crt_export.environment import require_extra
from crt_export.errors import BundleError, InputError, MissingDependencyError, problem_list

_MAX_SIGNATURE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Signer:
    """What a bundle is signed with.

    Attributes:
        key: A private key on an elliptic curve, PEM.
        password: Of the key, where it is encrypted.
        certificate: The signer's certificate, PEM; None signs with the bare key.
        chain: Certificates between the signer's and the root, PEM, one a file.

    Raises:
        InputError: A file does not exist, or there is a chain and no certificate.
    """

    key: Path
    password: str | None = None
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        """Check the values."""
        problems = _missing([self.key, *([self.certificate] if self.certificate else []), *self.chain])
        if self.chain and self.certificate is None:
            problems.append("there is a chain of certificates and no certificate of the signer")
        if self.certificate is not None and self.password is not None:
            problems.append(
                "a key that goes with a certificate cannot be encrypted: model-signing takes no password there"
            )
        if problems:
            raise InputError(problem_list("signing", problems))


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Whose signature is accepted: the owner of a public key, or of a certificate that these ones issued.

    Attributes:
        key: A public key, PEM.
        chain: Root and intermediate certificates, PEM, one a file. The system's own are never used.

    Raises:
        InputError: Both or neither are given, or a file does not exist.
    """

    key: Path | None = None
    chain: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        """Check the values."""
        problems = _missing([*([self.key] if self.key else []), *self.chain])
        if (self.key is None) == (not self.chain):
            problems.append("give either a public key or certificates to trust")
        if problems:
            raise InputError(problem_list("verifying", problems))


def signature_path(bundle: Path) -> Path:
    """Where the signature of a bundle lies if nobody says otherwise: beside it, with ``.sig`` after its name."""
    place = bundle.absolute()
    return place.with_name(f"{place.name}.sig")


def sign_bundle(bundle: Path, signer: Signer, signature: Path | None = None) -> tuple[Path, str]:
    """Sign a bundle's manifest, after every file was found as the manifest says.

    Args:
        bundle: The bundle folder.
        signer: Key or certificate.
        signature: The file to write; None is :func:`signature_path`.

    Returns:
        The file that was written, and the identity of what was signed: the SHA-256 (hex) of the manifest.

    Raises:
        BundleError: There is no bundle, or it is damaged.
        InputError: The key cannot be used, or the signature cannot be written.
        MissingDependencyError: The extra ``sign`` is not installed.
    """
    signing = _library("signing")
    from crt_export.report.output import check_outputs, write_output

    place = signature_path(bundle) if signature is None else signature
    check_outputs([place], inputs=[bundle, signer.key, signer.certificate, *signer.chain])
    with _manifest_copy(bundle) as (manifest, identity, _):
        config = signing.Config()
        with _explained(InputError, f"{signer.key}: the bundle cannot be signed with this key"):
            if signer.certificate is None:
                # 1.1.1 is annotated with str and hands it on to a function that takes bytes.
                password: Any = None if signer.password is None else signer.password.encode()
                config.use_elliptic_key_signer(private_key=signer.key, password=password)
            else:
                config.use_certificate_signer(
                    private_key=signer.key, signing_certificate=signer.certificate, certificate_chain=signer.chain
                )
            made = manifest.with_suffix(".sig")
            config.sign(manifest, made)
        write_output(place, made.read_bytes())
    return place, identity


def verify_bundle(bundle: Path, trust: Trust, signature: Path | None = None) -> tuple[BundleFiles, str]:
    """Check a bundle's signature, and every file against the signed manifest.

    Args:
        bundle: The bundle folder.
        trust: Whose signature is accepted.
        signature: The file; None is :func:`signature_path`.

    Returns:
        The bundle, and the identity that was signed: give it to ``load_bundle(..., identity=...)``, which refuses
        whatever else may lie there by then.

    Raises:
        BundleError: There is no bundle, it is damaged, or the signature is another's, another bundle's or damaged.
        InputError: A key or certificate cannot be used, or there is no signature.
        MissingDependencyError: The extra ``sign`` is not installed.
    """
    verifying = _library("verifying")
    content = _signature(signature_path(bundle) if signature is None else signature)
    with _manifest_copy(bundle) as (manifest, identity, opened):
        copy = manifest.with_suffix(".sig")
        copy.write_bytes(content)
        config = verifying.Config()
        with _explained(InputError, "the key or a certificate cannot be used"):
            if trust.key is not None:
                config.use_elliptic_key_verifier(public_key=trust.key)
            else:
                config.use_certificate_verifier(certificate_chain=trust.chain)
        with _explained(BundleError, f"{bundle}: the signature does not hold"):
            config.verify(manifest, copy)
    return opened, identity


@contextmanager
def _manifest_copy(bundle: Path) -> Iterator[tuple[Path, str, BundleFiles]]:
    """The very bytes of the manifest that every file was checked against, in a file of their own."""
    opened = open_bundle(bundle, allow_unvalidated=True)
    opened.verify_all()
    with tempfile.TemporaryDirectory(prefix="crt-export-") as folder:
        copy = Path(folder) / MANIFEST_NAME
        content = (opened.path / MANIFEST_NAME).read_bytes()
        if hashlib.sha256(content).hexdigest() != opened.identity:
            raise BundleError(f"{bundle} was exchanged while it was read: try again")
        copy.write_bytes(content)
        yield copy, opened.identity, opened


def _signature(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_SIGNATURE_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"{path}: expected the signature of a bundle, which cannot be read ({error.strerror}); "
            "'crt-export sign' makes one, --signature names another"
        ) from None
    if len(content) > _MAX_SIGNATURE_BYTES:
        raise InputError(f"{path} is larger than {_MAX_SIGNATURE_BYTES >> 20} MiB, so it is no signature of a bundle")
    return content


def _library(part: str) -> Any:
    import importlib

    purpose = "signing bundles and verifying signatures"
    require_extra(("model-signing",), purpose)
    logging.getLogger("model_signing").addHandler(logging.NullHandler())
    try:
        return importlib.import_module(f"model_signing.{part}")
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs model-signing, which cannot be imported ({error}): pip install 'crt-export[sign]'"
        ) from error


@contextmanager
def _explained(kind: Callable[[str], Exception], what: str) -> Iterator[None]:
    """The library raises a dozen classes for keys, certificates and signatures that it does not like."""
    try:
        yield
    except Exception as error:
        raise kind(f"{what} ({str(error) or type(error).__name__})") from error


def _missing(files: Sequence[Path]) -> list[str]:
    return [f"{file}: expected a PEM file, found nothing there" for file in files if not file.is_file()]
