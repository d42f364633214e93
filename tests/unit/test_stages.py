import json

import numpy as np
import pytest

from asr_core.audio import load_audio, log_mel, mel_filters
from asr_core.errors import ArtifactError
from parity.localise import divergence, own_error, title
from parity.stages import Expected, Oracle
from runners import _stages_pytorch
from runners._stages import ADD, CARRY, Op, Recorder, order, residual_stream

STREAM = ["x", "x1", "x2"]


def block(number: int, reads: str, *, norm: bool = True) -> list[Op]:
    """A pre-norm block with a bias, an attention mask and a norm that is made of sums."""
    n = f"b{number}."
    normed = (
        [Op("mean", [reads], [n + "m"]), Op(ADD, [reads + "", n + "const"], [n + "s"]), Op("mul", [n + "s", n + "m"], [n + "n"])]
        if norm
        else []
    )
    return [
        *normed,
        Op("matmul", [n + "n" if norm else reads, n + "weight"], [n + "q"]),
        Op(ADD, [n + "q", n + "bias"], [n + "qb"]),
        Op("mul", [n + "qb", n + "qb"], [n + "scores"]),
        Op(ADD, [n + "scores", "mask"], [n + "masked"]),
        Op("matmul", [n + "masked", n + "w2"], [n + "out"]),
        Op(CARRY, [n + "out"], [n + "reshaped"]),
        Op(ADD, [reads, n + "reshaped"], [f"x{number}"]),
    ]


def stem() -> list[Op]:
    return [Op("conv", ["mel", "w"], ["c"]), Op(CARRY, ["half"], ["positions"]), Op(ADD, ["c", "positions"], ["x"])]


def test_the_residual_stream_is_found_among_other_sums():
    assert residual_stream([*stem(), *block(1, "x"), *block(2, "x1")], ["mel", "mask"], 2, "graph") == STREAM


def test_it_is_found_where_a_norm_is_missing():
    assert residual_stream([*stem(), *block(1, "x", norm=False), *block(2, "x1")], ["mel", "mask"], 2, "graph") == STREAM


def test_a_graph_that_lacks_a_block_is_refused():
    with pytest.raises(ArtifactError, match="encoder: the model adds to its residual stream 4 times, this graph 2 times"):
        residual_stream([*stem(), *block(1, "x"), *block(2, "x1")], ["mel", "mask"], 4, "encoder")


def test_pieces_of_a_stage_are_joined_and_copied():
    recorder, row = Recorder(), np.ones((1, 2, 3), np.float32)
    recorder.add("stage", row)
    row[:] = 2
    recorder.add("stage", row[:, :1])
    assert recorder.values()["stage"].tolist() == [[1, 1, 1], [1, 1, 1], [2, 2, 2]]


def test_own_error_is_measured_against_what_the_stage_adds():
    carried = np.full((3, 4), 100, np.float32)
    expected = Expected("stage", carried + 1, carried)
    assert own_error(expected.value, expected) == 0
    shown = expected.value.copy()
    shown[1] += 0.5  # one row is half wrong
    assert own_error(shown, expected) == pytest.approx(0.5)
    shown[1] = np.nan
    assert own_error(shown, expected) == np.inf


def test_where_transcripts_part():
    assert divergence([1, 2], [1, 2]) is None
    assert divergence([1, 3], [1, 2]) == 1
    assert divergence([1], [1, 2]) == 1
    assert divergence([1, 2, 3], [1, 2]) == 2
    assert divergence([], []) is None


def test_stages_have_titles():
    assert title("cross.1.values") == "cross-attention values, layer 1"
    assert title("encoder.0.mlp") == "encoder layer 0, feed-forward"
    assert title("choice") == "token choice"


@pytest.fixture(scope="module")
def reference_values(trained, clips):
    staged = _stages_pytorch.open(trained.path, 1)
    mel = log_mel(load_audio(clips[0]), mel_filters(trained.dims.n_mels))[None]
    fed = [*staged.runner.tokens.prompt(), 300, 400, 500]
    return mel, fed, staged.replay(mel, fed)


def test_the_oracle_agrees_with_transformers_at_every_stage(trained, reference_values):
    mel, fed, values = reference_values
    assert set(values) == set(order(trained.dims))
    assert {values[name].shape for name in values if name.startswith("decoder.")} == {(len(fed), trained.dims.d_model)}
    for expected in Oracle(trained).expected(mel, fed, values):
        # Both are float32; transformers fuses its attention, and steps where the oracle takes all tokens at once.
        assert own_error(values[expected.stage], expected) < 2e-5, expected.stage


def test_a_stage_that_is_not_shown_counts_to_the_next(trained, reference_values):
    mel, fed, values = reference_values
    shown = {name: values[name] for name in ("encoder.states", "logits")}
    shown["encoder.states"] = shown["encoder.states"] * 1.5
    errors = {e.stage: own_error(shown[e.stage], e) for e in Oracle(trained).expected(mel, fed, shown)}
    # The states are half as large again, and the logits are not those of such states.
    assert errors["encoder.states"] == pytest.approx(0.5, abs=1e-3)
    assert errors["logits"] > 1e-2
    del shown["encoder.states"]
    ((logits),) = Oracle(trained).expected(mel, fed, shown)
    assert own_error(shown["logits"], logits) < 2e-5


def test_features_follow_a_folders_settings(tmp_path, trained):
    samples = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    settings = json.loads((trained.path / "preprocessor_config.json").read_text()) | {"hop_length": 200}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    ours = log_mel(samples, mel_filters(80))
    # transformers computes the spectrum in float64 and the filters in another order.
    np.testing.assert_allclose(_stages_pytorch.features(samples, 80), ours, atol=1e-4)
    assert _stages_pytorch.features(samples, 80, tmp_path).shape != ours.shape
