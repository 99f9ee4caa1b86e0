"""What a model is: ops, bytes, MACs, memory."""

from onnxopt.inspection.contents import Totals, Unused, totals
from onnxopt.inspection.overview import Cost, Inspection, Port, inspect, macs

__all__ = ["Cost", "Inspection", "Port", "Totals", "Unused", "inspect", "macs", "totals"]
