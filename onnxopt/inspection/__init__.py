"""What a model is: ops, bytes, MACs, memory; and what a target will not like in it."""

from onnxopt.inspection.contents import Totals, Unused, totals
from onnxopt.inspection.lints import Finding, lint
from onnxopt.inspection.overview import Cost, Inspection, Port, inspect, macs

__all__ = ["Cost", "Finding", "Inspection", "Port", "Totals", "Unused", "inspect", "lint", "macs", "totals"]
