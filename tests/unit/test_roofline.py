"""The bytes of a decode step, against the modules that are exported."""

import pytest
import torch

from asr_core import graph
from asr_core.dims import Dims
from parity import roofline
from reference.shapes import SHAPES

VOCABULARY = 51865


def dims_of(name: str) -> Dims:
    shape = SHAPES[name]
    return Dims(
        n_mels=shape.n_mels, n_audio_ctx=1500, n_text_ctx=448, d_model=shape.d_model, encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers, encoder_heads=shape.heads, decoder_heads=shape.heads,
        encoder_ffn=4 * shape.d_model, decoder_ffn=4 * shape.d_model, vocab=VOCABULARY,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["tiny", "small", "turbo"])
def test_a_step_multiplies_with_every_matrix_of_the_decoder_but_those_of_the_window(name):
    with torch.device("meta"):
        decoder = graph.Decoder(dims_of(name))
    matrices = {
        key: weight.numel()
        for key, weight in decoder.named_parameters()
        if weight.ndim == 2 and not key.endswith(("encoder_attn.k_proj.weight", "encoder_attn.v_proj.weight", "positions.weight"))
    }
    assert roofline.weights(dims_of(name)) == sum(matrices.values())


def test_a_step_reads_the_weights_once_and_the_cache_of_one_window():
    dims = dims_of("tiny")
    cross = 2 * dims.decoder_layers * torch.empty(1, dims.decoder_heads, 1500, 64, device="meta").numel()
    own = 2 * dims.decoder_layers * torch.empty(1, dims.decoder_heads, 50, 64, device="meta").numel()
    assert roofline.step_bytes(dims, "int8", 4, 50) == roofline.weights(dims) + 4 * (cross + own)
    assert roofline.step_bytes(dims, "fp16", 2, 50) == 2 * (roofline.weights(dims) + cross + own)
