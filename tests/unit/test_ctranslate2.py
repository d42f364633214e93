import json

import numpy as np
import pytest

from asr_core.artifact import Artifact
from asr_core.checkpoint import Checkpoint
from asr_core.decode import DecodeOptions
from asr_core.errors import ExportError
from exporters import ctranslate2 as exporter
from runners import ctranslate2, pytorch

STEPS = 30


def mels(batch: int, n_mels: int = 80) -> np.ndarray:
    """Windows of different level and contrast."""
    noise = np.random.default_rng(0).uniform(-1, 1, size=(batch, n_mels, 3000))
    contrast, level = np.linspace(0.1, 1, batch), np.linspace(-0.5, 0.5, batch)
    return (noise * contrast[:, None, None] + level[:, None, None]).astype(np.float32)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, STEPS])
@pytest.mark.parametrize("batch", [1, 3])
def test_says_what_pytorch_says(talkative, talkative_artifact, batch, limit):
    """The limit is exact, above and below the prompt's length; scores mean the same, with and without an end."""
    ours = ctranslate2.open(talkative_artifact.path, 1).generate(mels(batch), DecodeOptions(max_new_tokens=limit))
    reference = pytorch.open(talkative, 1).generate(mels(batch), DecodeOptions(max_new_tokens=limit))
    assert [row.tokens for row in ours] == [row.tokens for row in reference]
    for one, other in zip(ours, reference, strict=True):
        # CTranslate2 adds in float32 what we add in float64: 1e-5 of sums up to 100.
        assert one.sum_logprob == pytest.approx(other.sum_logprob, rel=1e-5, abs=1e-5)
        assert one.no_speech_prob == pytest.approx(other.no_speech_prob, rel=1e-4)
        assert one.timings.encode_s > 0
        assert one.timings.decode_s > 0
        assert one.timings.prompt_s is None


POLICIES = {
    "beam": {"beam_size": 4},
    "beam, patient": {"beam_size": 3, "patience": 2.0, "length_penalty": 0.3},
    "timestamps": {"timestamps": True},
    "timestamps, late": {"timestamps": True, "max_initial_timestamp": None, "suppress_blank": False, "beam_size": 2},
    "prompt": {"prompt": tuple(range(300, 800)), "language": None},
    "prefix": {"prefix": (300, 301, 302), "beam_size": 2},
}


@pytest.fixture(scope="module")
def pair(talkative, talkative_artifact):
    """CTranslate2 and PyTorch, and a dozen words and all timestamps to choose from."""
    reference = pytorch.open(talkative, 1)
    suppress = tuple(token for token in reference.tokens.suppress if token < reference.tokens.timestamp_begin)
    return ctranslate2.open(talkative_artifact.path, 1), reference, suppress


@pytest.mark.parametrize("policy", POLICIES)
def test_decodes_as_pytorch_under_every_policy(pair, policy):
    ours, reference, suppress = pair
    options = DecodeOptions(**POLICIES[policy], suppress=suppress, max_new_tokens=12)
    for one, other in zip(ours.generate(mels(3), options), reference.generate(mels(3), options), strict=True):
        assert (one.tokens, one.language) == (other.tokens, other.language)
        assert one.avg_logprob == pytest.approx(other.avg_logprob, abs=1e-4)
        assert one.no_speech_prob == pytest.approx(other.no_speech_prob, rel=1e-3)


def test_language_probabilities_are_pytorchs(pair, shape_folder, export_here):
    for one, other in zip(pair[0].detect_language(mels(2)), pair[1].detect_language(mels(2)), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    english = ctranslate2.open(export_here(shape_folder("mini.en"), "ctranslate2", "fp32").path, 1)
    assert english.detect_language(mels(2)) == [{"en": 1.0}] * 2


def test_only_the_windows_that_fail_are_drawn_anew(pair):
    ours, reference, suppress = pair
    greedy = reference.generate(mels(3), DecodeOptions(suppress=suppress, max_new_tokens=12))
    worst = min(range(3), key=lambda i: greedy[i].avg_logprob)
    threshold = greedy[worst].avg_logprob + 1e-3
    options = DecodeOptions(
        suppress=suppress, max_new_tokens=12, temperatures=(0.0, 0.5), best_of=3, logprob_threshold=threshold,
        compression_ratio_threshold=None, no_speech_threshold=None,
    )  # fmt: skip
    found = ours.generate(mels(3), options)
    assert [one.temperature for one in found] == [0.5 if one.avg_logprob < threshold else 0.0 for one in greedy]
    assert [one.tokens for one in found if not one.temperature] == [
        one.tokens for one, other in zip(greedy, found, strict=True) if not other.temperature
    ]


def test_after_a_prefix_the_first_timestamp_is_free(pair):
    """A documented difference: CTranslate2's rules see the prefix as said, openai-whisper's begin after it."""
    ours, reference, suppress = pair
    options = DecodeOptions(prefix=(300,), timestamps=True, max_initial_timestamp=1.0, suppress=suppress, max_new_tokens=1)
    latest = reference.tokens.timestamp_begin + 50
    assert reference.generate(mels(1), options)[0].tokens[0] <= latest
    assert ours.generate(mels(1), options)[0].tokens[0] > latest


@pytest.mark.parametrize(
    ("name", "precision"),
    [("mini.en", "fp32"), ("mini-large-v3", "fp32"), *(("mini", precision) for precision in exporter.PRECISIONS)],
)
def test_every_shape_and_precision(shape_folder, export_here, capfd, name, precision):
    folder = shape_folder(name)
    artifact = export_here(folder, "ctranslate2", precision)
    capfd.readouterr()
    runner = ctranslate2.open(artifact.path, 1)
    assert capfd.readouterr() == ("", ""), "a type that this processor lacks would be announced"
    mel = mels(1, runner.dims.n_mels)
    reference = pytorch.open(folder, 1)
    # Encoder states of random weights are of the order of 1: sums in float32, weights of 11 bits, of 8 bits.
    tolerance = {"fp32": 1e-5, "fp16": 5e-3, "int8": 0.1}[precision]
    np.testing.assert_allclose(runner.encoder_states(mel), reference.encoder_states(mel), rtol=0, atol=tolerance)
    row = runner.generate(mel, DecodeOptions(max_new_tokens=STEPS))[0]
    assert len(row.tokens) == STEPS
    if precision == "fp32":
        assert row.tokens == reference.generate(mel, DecodeOptions(max_new_tokens=STEPS))[0].tokens
    assert runner.score(mel, row.tokens) is None
    runner.close()


def test_the_default_bound_is_half_of_the_text_context(shape_folder, export_here):
    runner = ctranslate2.open(export_here(shape_folder("mini"), "ctranslate2", "fp32").path, 1)
    assert len(runner.generate(mels(1), DecodeOptions())[0].tokens) == 224


def test_tensors_are_described(talkative_artifact):
    shapes = {tensor.name: tensor.shape for tensor in talkative_artifact.manifest.tensors}
    assert shapes == {"features": ["batch", 80, 3000], "encoder_output": ["batch", 1500, 64]}
    runner = ctranslate2.open(talkative_artifact.path, 1)
    assert runner.encoder_states(mels(2)).shape == (2, 1500, 64)


def converted_config(artifact: Artifact) -> dict[str, object]:
    return json.loads((artifact.path / "config.json").read_text())


def test_config_lists_survive_from_model_config(mini, export_here):
    """Through transformers, a generation config that is marked so loses its language ids and alignment heads."""
    path = mini / "generation_config.json"
    generation = json.loads(path.read_text())
    path.write_text(json.dumps(generation | {"_from_model_config": True}))
    config = converted_config(export_here(mini, "ctranslate2", "fp32"))
    assert config["suppress_ids"] == generation["suppress_tokens"]
    assert config["suppress_ids_begin"] == generation["begin_suppress_tokens"]
    assert config["alignment_heads"] == generation["alignment_heads"]
    assert config["lang_ids"] == sorted(generation["lang_to_id"].values())


def test_a_checkpoint_without_alignment_heads_gets_the_upper_layers(mini, export_here):
    path = mini / "generation_config.json"
    generation = json.loads(path.read_text())
    del generation["alignment_heads"]
    path.write_text(json.dumps(generation))
    assert converted_config(export_here(mini, "ctranslate2", "fp32"))["alignment_heads"] == [[1, 0]]


def test_a_shifted_vocabulary_is_refused(shape_folder, export_here, tmp_path):
    folder = shape_folder("mini.en")
    tokens = json.loads((export_here(folder, "ctranslate2", "fp32").path / "vocabulary.json").read_text())
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps([*tokens[:50000], *tokens[50001:], "<|30.02|>"]))
    with pytest.raises(ExportError, match=r"vocabulary\.json has 1864 tokens in the wrong place"):
        exporter._complete_vocabulary(Checkpoint.open(folder), path)


def test_the_converters_refusal_is_ours(mini, tmp_path):
    checkpoint = Checkpoint.open(mini)
    path = mini / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "vit"}))
    with pytest.raises(ExportError, match="CTranslate2's converter refuses mini: No conversion is registered"):
        exporter.export(checkpoint, tmp_path / "out", "fp32", lambda stage: None)
