"""The bundle: one folder that holds everything a deployment needs, and proves that it is whole.

Writing (:mod:`~crt_export.bundle.write`)::

    .NAME.partial-PID  --commit: fsync files, manifest.json last-->  swapped with NAME  -->  old NAME removed

Reading (:mod:`~crt_export.bundle.read`)::

    folder, held open  -->  manifest.json  --digests, schema, names-->  BundleFiles: every file held open
    BundleFiles  --.content(), .held_graph(): no link, size, SHA-256-->  the bytes that were hashed

Whatever kills a build, NAME is the old bundle or the new one, entire. Where the file system cannot swap two
folders in one step (:mod:`~crt_export.bundle.recovery`) the old one is set aside for an instant; a crash in
that instant is repaired by the next opening or the next build (:mod:`~crt_export.bundle.recovery`).

Standard library only: an application that embeds the runtime imports this package.
"""

from __future__ import annotations

from crt_export.bundle.external_data import ExternalTensor, external_tensors
from crt_export.bundle.files import BundleFiles
from crt_export.bundle.held import HeldGraph, HeldWeights
from crt_export.bundle.manifest import read_manifest
from crt_export.bundle.read import open_bundle
from crt_export.bundle.schema import MANIFEST_NAME, SCHEMA_VERSION, TOOL_NAME
from crt_export.bundle.write import Staging, check_output, stage_bundle

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "TOOL_NAME",
    "BundleFiles",
    "ExternalTensor",
    "HeldGraph",
    "HeldWeights",
    "Staging",
    "check_output",
    "external_tensors",
    "open_bundle",
    "read_manifest",
    "stage_bundle",
]
