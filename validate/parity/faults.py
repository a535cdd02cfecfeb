"""The faults that the gate must catch, each written into the built ONNX files of a bundle or the files beside them.

A fault names the lowest level of the ladder that catches it, per precision, and what the sentence must say. Whatever a
fault does, the bundle is signed again afterwards (:mod:`fault_bundle`): no hash gives it away.
"""

from __future__ import annotations

from fault import Fault
from faults_of_arithmetic import ARITHMETIC
from faults_of_caches import CACHES
from faults_of_contract import CONTRACT
from faults_of_files import FILES
from faults_of_state import STATE
from faults_of_weights import WEIGHTS

__all__ = ["FAULTS", "Fault"]

FAULTS: tuple[Fault, ...] = (*WEIGHTS, *STATE, *CACHES, *ARITHMETIC, *CONTRACT, *FILES)
