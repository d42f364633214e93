"""One suite over every discovered backend: what any target must keep, whatever it is made of."""

from pathlib import Path

import numpy as np
import pytest

import reference
from asr_core import audio, build, registry
from asr_core.artifact import Artifact
from asr_core.decode import Decoded, DecodeOptions
from parity import compare
from runners.base import StepRunner, open_runner

TARGETS = registry.names("exporters")
ARTIFACTS = [(target, precision) for target in TARGETS for precision in build.exporter(target).PRECISIONS]
# What a policy may ask of a runtime: rows that multiply, swap and leave, prompts in one pass, windows that begin again.
POLICIES = {
    "beam": DecodeOptions(beam_size=3, timestamps=True, prompt=(300, 301, 302, 303, 304)),
    "language and prefix": DecodeOptions(language=None, prefix=(320,)),
    "fallback": DecodeOptions(temperatures=(0.0, 0.7), best_of=2, logprob_threshold=0.0, timestamps=True, max_new_tokens=6),
}
FULL = [pair for pair in ARTIFACTS if pair[1] == "fp32"]


def open_exported(artifacts: Path, target: str, precision: str):
    return open_runner(target, artifacts / "reference" / f"{target}-{precision}", 1)


@pytest.fixture(scope="module")
def mels() -> np.ndarray:
    clips = sorted(reference.manifest_path().parent.glob("*.flac"))
    chosen = clips[:: len(clips) // 6][:6]
    return np.stack([audio.log_mel(audio.load_audio(clip), audio.mel_filters(80)) for clip in chosen])


@pytest.fixture(scope="module")
def expected(checkpoint, mels) -> list[list[int]]:
    """transformers' own generate: the oracle of tokens."""
    import torch
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    tokens = []
    for mel in mels:
        ids = model.generate(torch.from_numpy(mel[None]), language="en", task="transcribe", max_new_tokens=224, num_beams=1)
        tokens.append([i for i in ids[0].tolist() if i < model.generation_config.eos_token_id])
    return tokens


@pytest.mark.parametrize("target", TARGETS)
def test_an_exporter_has_a_runner_and_an_extra(target):
    assert target in registry.names("runners")
    assert registry.requirements(target), f"pyproject.toml has no extras row {target!r}"


@pytest.mark.parametrize("precision", sorted({precision for _, precision in ARTIFACTS}))
def test_every_precision_is_judged(precision):
    for gates in ("parity", "export"):
        for name, bound in compare.thresholds(gates, precision).items():
            assert len(bound["reason"]) > 10, name


@pytest.mark.parametrize(("target", "precision"), ARTIFACTS)
def test_artifact_is_sealed_and_described(artifacts, checkpoint, target, precision):
    manifest = Artifact.open(artifacts / "reference" / f"{target}-{precision}").manifest
    assert (manifest.target, manifest.precision) == (target, precision)
    assert manifest.fingerprint == checkpoint.fingerprint
    assert manifest.dims == checkpoint.dims
    assert {spec.role for spec in manifest.tensors} == {"input", "output"}
    assert {"tokenizer.json", "generation_config.json", "preprocessor_config.json", "mel_filters.npy"} <= {
        file.path for file in manifest.files
    }


@pytest.mark.parametrize(("target", "precision"), FULL)
def test_float32_decodes_to_the_tokens_of_transformers(artifacts, mels, expected, target, precision):
    runner = open_exported(artifacts, target, precision)
    alone = [runner.generate(mel[None], DecodeOptions())[0].tokens for mel in mels]
    assert alone == expected
    assert [decoded.tokens for decoded in runner.generate(mels, DecodeOptions())] == expected


@pytest.fixture(scope="module")
def under_policies(checkpoint, mels) -> dict[str, list[Decoded]]:
    """What the PyTorch runner decodes under every policy."""
    runner = open_runner("pytorch", checkpoint.path, 1)
    return {name: runner.generate(mels[:3], options) for name, options in POLICIES.items()}


@pytest.mark.parametrize(("target", "precision"), FULL)
def test_float32_decodes_as_pytorch_under_every_policy(artifacts, mels, under_policies, target, precision):
    runner = open_exported(artifacts, target, precision)
    for name, options in POLICIES.items():
        if name == "fallback" and not isinstance(runner, StepRunner):
            continue  # a runtime that decodes by itself draws by itself
        found = runner.generate(mels[:3], options)
        for one, other in zip(found, under_policies[name], strict=True):
            assert (one.tokens, one.language, one.temperature) == (other.tokens, other.language, other.temperature), name
            assert one.avg_logprob == pytest.approx(other.avg_logprob, abs=1e-4)
            assert one.no_speech_prob == pytest.approx(other.no_speech_prob, rel=1e-3)


@pytest.mark.parametrize(("target", "precision"), FULL)
def test_a_state_begins_again_without_encoding(artifacts, mels, target, precision):
    runner = open_exported(artifacts, target, precision)
    if not isinstance(runner, StepRunner):
        pytest.skip(f"{target} decodes natively: it has no states")
    prompt = np.array([runner.tokens.prompt()], np.int64)
    fresh = [np.array(runner.step(prompt, runner.encode(mel[None]))) for mel in mels[:2]]
    first = runner.encode(mels[:2])
    runner.step(np.repeat(prompt, 2, axis=0), first)
    runner.step(np.array([[300]] * 4), runner.reorder(first, np.array([1, 0, 1, 1])))
    runner.encode = None  # from here on, only what the first state holds
    again = runner.step(np.repeat(prompt, 3, axis=0), runner.restart(first, np.array([1, 1, 0])))
    np.testing.assert_allclose(again, np.concatenate([fresh[1], fresh[1], fresh[0]]), atol=1e-4)


@pytest.mark.parametrize(("target", "precision"), ARTIFACTS)
def test_nothing_is_left_over_between_windows(artifacts, mels, target, precision):
    runner = open_exported(artifacts, target, precision)
    first = runner.generate(mels[:1], DecodeOptions())[0]
    runner.generate(mels[1:3], DecodeOptions())
    again = runner.generate(mels[:1], DecodeOptions())[0]
    assert again.tokens == first.tokens
    assert again.sum_logprob == pytest.approx(first.sum_logprob, abs=1e-5)  # the same arithmetic on the same input


@pytest.mark.parametrize(("target", "precision"), ARTIFACTS)
def test_a_bound_on_new_tokens_is_exact(artifacts, mels, expected, target, precision):
    runner = open_exported(artifacts, target, precision)
    longest = max(range(len(expected)), key=lambda i: len(expected[i]))
    for bound in (1, 3):
        decoded = runner.generate(mels[longest : longest + 1], DecodeOptions(max_new_tokens=bound))[0]
        assert len(decoded.tokens) == bound


@pytest.mark.parametrize(("target", "precision"), ARTIFACTS)
def test_rows_can_be_dropped_and_repeated(artifacts, mels, target, precision):
    runner = open_exported(artifacts, target, precision)
    if not isinstance(runner, StepRunner):
        pytest.skip(f"{target} decodes natively: it has no rows to reorder")
    prompt = np.array([runner.tokens.prompt()] * 2, np.int64)
    state = runner.encode(mels[:2])
    runner.step(prompt, state)
    state = runner.reorder(state, np.array([1, 1, 0]))
    logits = np.array(runner.step(np.array([[300], [301], [302]], np.int64), state))
    for row, (mel, token) in enumerate([(1, 300), (1, 301), (0, 302)]):
        state = runner.encode(mels[mel : mel + 1])
        runner.step(prompt[:1], state)
        alone = runner.step(np.array([[token]], np.int64), state)
        # Batched matrix products sum in another order; int8 activations are rounded after that.
        np.testing.assert_allclose(logits[row], alone[0], atol=1e-4 if precision == "fp32" else 0.5)
