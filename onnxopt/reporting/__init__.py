"""What a run says: one report, as a table for people and as a dict for machines."""

from onnxopt.reporting.report import SCHEMA, Report, Size, measure_size, session_file

__all__ = ["SCHEMA", "Report", "Size", "measure_size", "session_file"]
