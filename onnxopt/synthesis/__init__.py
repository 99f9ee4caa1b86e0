"""Valid and telling samples for a model nobody gave data for, made from the graph itself."""

from onnxopt.synthesis.samples import synthesize

__all__ = ["synthesize"]
