"""The command line: thin commands over the library, one file each."""

from onnxopt.cli.main import main

__all__ = ["main"]
