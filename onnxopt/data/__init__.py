"""Samples to prove, calibrate and evaluate on: the user's own, or synthetic ones.

A sample is a complete feed, one array per graph input. It comes from a folder of ``.npz`` (a file a sample),
one ``.npz`` (samples along the first axis), a folder of ``.npy`` or images (models with one input), Python,
or `synthesize`, which makes valid ones from the graph alone.
"""

from onnxopt.data.contract import parse_shape
from onnxopt.data.images import Images
from onnxopt.data.preprocess import Preprocess, read_preprocess
from onnxopt.data.python import python_target
from onnxopt.data.samples import Feeds, Samples
from onnxopt.data.sources import FeedSource, read_feeds
from onnxopt.synthesis import synthesize

__all__ = [
    "FeedSource",
    "Feeds",
    "Images",
    "Preprocess",
    "Samples",
    "parse_shape",
    "python_target",
    "read_feeds",
    "read_preprocess",
    "synthesize",
]
