"""What values the tensors of a model take on samples, and the ranges to quantize them in."""

from onnxopt.calibration.exposing import exposable
from onnxopt.calibration.histogram import Histogram
from onnxopt.calibration.ranges import METHODS, Range, choose_range
from onnxopt.calibration.running import calibrate
from onnxopt.calibration.splitting import split, spread
from onnxopt.calibration.statistics import Statistics
from onnxopt.calibration.tensors import ChannelStatistics, TensorStatistics

__all__ = [
    "METHODS",
    "ChannelStatistics",
    "Histogram",
    "Range",
    "Statistics",
    "TensorStatistics",
    "calibrate",
    "choose_range",
    "exposable",
    "split",
    "spread",
]
