"""The comparison's arithmetic by hand, its recipes, Winograd's convolution against torch's."""

import pytest
import torch

from asr_core import build
from compressors import recipe, winograd
from compressors.comparison import Line, files
from compressors.published import CONFORMER, Published
from compressors.table import Speed, markdown, trades, verdict

LINES = [
    Line("original", "the original", [], "onnx-fp32", size_mb=8.0, wer=0.05, delta_wer=0.0, interval=[0.0, 0.0]),
    Line(
        "int8",
        "int8",
        ["quantise"],
        "onnx-int8",
        body_mb=0.75,
        embedding_mb=1.25,
        size_mb=2.5,
        wer=0.06,
        delta_wer=0.01,
        interval=[-0.01, 0.02],
        kl=2e-5,
    ),
    Line("zeros", "zeros", ["prune"], "onnx-fp32", size_mb=8.0, wer=0.15, delta_wer=0.1, interval=[0.05, 0.2]),
    Line("odd", "odd", ["prune"], "onnx-fp32", problem="it broke"),
]
SPEEDS = {"int8.onnx-int8": Speed(1.5, 0.02), "zeros.onnx-fp32": Speed(1.0, 0.03)}
INT8 = Published("INT8", CONFORMER, ("quantise",), 2.95, 1.14, 0.318)


def test_what_is_gained_and_lost_is_beside_the_original_of_the_same_target():
    _, int8, zeros = trades(LINES, SPEEDS)
    assert (int8.smaller, int8.faster, int8.worse) == pytest.approx((3.2, 1.5, 0.2))
    assert (zeros.smaller, zeros.faster, zeros.worse) == pytest.approx((1.0, 1.0, 2.0))


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        (INT8, "beaten by int8 (onnx-int8): 3.20× smaller, 1.50× as fast, WER +20.0%"),
        (Published("INT8", CONFORMER, ("quantise",), 3.5, 1.6, 0.1), "**not beaten** (size, speed, WER); nearest: int8"),
        (Published("pruning", CONFORMER, ("prune",), worse=0.92), "**not beaten** (WER); nearest: zeros"),
        (Published("low rank", CONFORMER, ("lowrank",), 2.18), "not measured"),
    ],
)
def test_a_published_point_is_beaten_only_in_everything_it_tells(theirs, says):
    assert verdict(theirs, trades(LINES, SPEEDS)).startswith(says)


def test_the_table_has_every_line_and_says_what_is_missing():
    text = markdown(LINES, SPEEDS, [])
    row = "| int8 | onnx-int8 | 0.75 | 1.25 | 2.50 | 3.20× | 6.00 | +1.00 [-1.00, +2.00] | – | – | 2e-05 | 20 | 1.50× | – |"
    assert row in text.splitlines()
    assert "- odd, onnx-fp32: it broke" in text


@pytest.mark.parametrize("file", files([]), ids=lambda file: file.stem)
def test_the_carried_recipes_are_valid(file):
    whole = recipe.read_whole(file)
    assert whole.title != file.stem
    for artifact in whole.artifacts:
        target, _, precision = artifact.partition("-")
        build.check_precision(target, precision)


@pytest.mark.parametrize(("width", "length"), [(1, 2), (7, 10), (128, 3000)])
def test_winograd_is_a_convolution(width, length):
    layer = torch.nn.Conv1d(5, width, 3, padding=1).double()
    x = torch.randn(2, 5, length, dtype=torch.float64)
    got = winograd.convolve(x, winograd.transformed(layer.weight), layer.bias)
    torch.testing.assert_close(got, layer(x), rtol=1e-12, atol=1e-12)
