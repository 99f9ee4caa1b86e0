"""Proof: the numbers of two models, compared on samples, with a tolerance measured on the original itself."""

from onnxopt.verification.baseline import Baseline, verify
from onnxopt.verification.verdict import Kind, OutputVerdict, Verdict

__all__ = ["Baseline", "Kind", "OutputVerdict", "Verdict", "verify"]
