import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from asr_core import audio
from asr_core.decode import DecodeOptions
from asr_core.errors import AudioError
from asr_core.tokens import load_tokenizer, text_of
from asr_core.transcribe import Bundle, transcribe
from asr_export.transcribe import main
from runners import pytorch


@pytest.fixture
def sounds(tmp_path: Path) -> list[Path]:
    """Two short files and, as the last, one of more than a window."""
    random = np.random.default_rng(0)
    paths = [tmp_path / name for name in ("one.wav", "two words.flac", "long.wav")]
    for path, seconds in zip(paths, (1.5, 2, 30.2), strict=True):
        soundfile.write(path, random.normal(size=int(seconds * 16000)) * 0.1, 16000)
    return paths


def run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def expected(talkative, sounds) -> list[tuple[str, list[int]]]:
    """Text and tokens of the short files, by PyTorch."""
    runner, tokenizer = pytorch.open(talkative, 1), load_tokenizer(talkative)
    mels = [audio.log_mel(audio.load_audio(path), audio.mel_filters(80)) for path in sounds[:2]]
    rows = [runner.generate(mel[None], DecodeOptions())[0].tokens for mel in mels]
    return [(text_of(tokenizer, tokens), tokens) for tokens in rows]


def test_transcribe_is_pytorchs_words(talkative_artifact, talkative, sounds, expected):
    bundle = Bundle.read(talkative_artifact.path)
    runner = pytorch.open(talkative, 1)
    for path, (text, tokens) in zip(sounds, expected, strict=False):
        transcript = transcribe(runner, bundle, path, DecodeOptions())
        assert (transcript.audio, transcript.text, transcript.tokens) == (str(path), text, tokens)
        assert transcript.duration_s == pytest.approx(soundfile.info(path).duration)
        assert transcript.rtfx > 0
    with pytest.raises(AudioError, match=r"long\.wav lasts 30\.2 s: long audio is not supported yet"):
        transcribe(runner, bundle, sounds[2], DecodeOptions())


def test_one_file_is_just_its_words(talkative_artifact, sounds, expected):
    result = run(sounds[0], "--artifact", talkative_artifact.path, "--threads", 1)
    assert (result.exit_code, result.stdout, result.stderr) == (0, expected[0][0] + "\n", "")


def test_a_bad_file_does_not_stop_the_others(talkative_artifact, sounds, expected):
    """The audio's exit code, whatever came after it; names before the words of several files."""
    result = run("absent.wav", sounds[2], *sounds[:2], "--artifact", talkative_artifact.path)
    lines = [f"{path}: {text}" for path, (text, _) in zip(sounds, expected, strict=False)]
    assert result.exit_code == AudioError.exit_code
    assert result.stdout.splitlines() == lines
    assert [line.partition(" ")[0] for line in result.stderr.splitlines()] == ["Error:", "Error:"]
    assert "absent.wav: no such file" in result.stderr


def test_json_is_one_object_a_line(talkative_artifact, sounds, expected):
    result = run(*sounds[:2], "--artifact", talkative_artifact.path, "--format", "json")
    assert result.exit_code == 0
    for line, path, (text, tokens) in zip(result.stdout.splitlines(), sounds, expected, strict=False):
        answer = json.loads(line)
        assert answer.pop("rtfx") > 0
        assert answer.pop("duration_s") == pytest.approx(soundfile.info(path).duration, abs=1e-3)
        assert answer == {"audio": str(path), "text": text, "tokens": tokens}


def test_a_damaged_artifact_is_refused(talkative_artifact, sounds, tmp_path):
    folder = shutil.copytree(talkative_artifact.path, tmp_path / "artifact")
    (folder / "tokenizer.json").write_text("{}")
    result = run(sounds[0], "--artifact", folder)
    assert (result.exit_code, result.stdout) == (6, "")
    assert result.stderr == f"Error: {folder / 'tokenizer.json'} was altered since the export (checksum differs). Export again.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--language", "xx"], "unknown language 'xx'"),
        (["--threads", "0"], "0 is not in the range x>=1"),
        (["--format", "srt"], "'srt' is not one of 'txt', 'json'"),
    ],
)
def test_wrong_usage(talkative_artifact, sounds, arguments, message):
    result = run(sounds[0], "--artifact", talkative_artifact.path, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_without_torch_and_transformers(talkative_artifact, sounds, expected):
    """An environment with one runtime's extra has neither, nor anything else that only exports need."""
    code = """
import sys
for absent in ("torch", "transformers", "safetensors", "huggingface_hub", "onnx", "jiwer", "scipy"):
    sys.modules[absent] = None
from asr_export.transcribe import main
main()
"""
    command = [sys.executable, "-c", code, str(sounds[0]), "--artifact", str(talkative_artifact.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected[0][0] + "\n", "")
