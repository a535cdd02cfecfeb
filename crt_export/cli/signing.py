"""``crt-export sign`` and ``verify``: who vouches for a bundle."""

from __future__ import annotations

import os
from pathlib import Path

import click

from crt_export.cli.console import write_json, write_text
from crt_export.cli.options import PATH, json_option

_PASSWORD = "CRT_EXPORT_KEY_PASSWORD"
_SIGNATURE = click.option(
    "--signature", type=PATH, metavar="FILE", help="The signature. Default: BUNDLE.sig, beside the bundle."
)


@click.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--key",
    type=PATH,
    required=True,
    metavar="PRIVATE.pem",
    help=f"The signer's private key (elliptic curve); the password of an encrypted one is taken from {_PASSWORD}.",
)
@click.option("--certificate", type=PATH, metavar="CERT.pem", help="The signer's certificate, to be verified by it.")
@click.option("--chain", type=PATH, multiple=True, metavar="CA.pem", help="A certificate above it; may be repeated.")
@_SIGNATURE
@json_option
def sign(
    bundle: Path, key: Path, certificate: Path | None, chain: tuple[Path, ...], signature: Path | None, as_json: bool
) -> None:
    """Sign the manifest of BUNDLE, which holds the SHA-256 of every other file. Works offline, with keys in files."""
    from crt_export.bundle.signature import Signer, sign_bundle

    signer = Signer(key=key, password=os.environ.get(_PASSWORD) or None, certificate=certificate, chain=chain)
    written, identity = sign_bundle(bundle, signer, signature)
    if as_json:
        write_json({"path": str(bundle), "signature": str(written), "identity": identity})
    else:
        write_text(f"signed {identity}: wrote {written}")


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--key", type=PATH, metavar="PUBLIC.pem", help="The public key whose owner is trusted.")
@click.option("--chain", type=PATH, multiple=True, metavar="CA.pem", help="A certificate to trust; may be repeated.")
@_SIGNATURE
@json_option
def verify(bundle: Path, key: Path | None, chain: tuple[Path, ...], signature: Path | None, as_json: bool) -> None:
    """Check the signature of BUNDLE and every file against the signed manifest; exit code 2 if anything is off."""
    from crt_export.bundle.signature import Trust, verify_bundle

    opened, identity = verify_bundle(bundle, Trust(key=key, chain=chain), signature)
    if as_json:
        write_json({"path": str(bundle), "identity": identity, "files": len(opened.names), "verified": True})
    else:
        write_text(f"verified {identity}: the signature holds, all {len(opened.names)} files are as they were signed")
