"""Measurement: two models side by side, with a control that says what the machine can tell apart."""

from onnxopt.benchmarking.latency import bench
from onnxopt.benchmarking.machine import Machine, machine
from onnxopt.benchmarking.statistics import Estimate
from onnxopt.benchmarking.timing import Clock, Figures, Timing, Verdict

__all__ = ["Clock", "Estimate", "Figures", "Machine", "Timing", "Verdict", "bench", "machine"]
