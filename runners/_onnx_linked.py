"""ONNX Runtime over graphs that point into a checkpoint's own weights: they are run like those that have copies."""

from runners.onnx import open  # noqa: A004 - as every runner's entry is called

__all__ = ["open"]
