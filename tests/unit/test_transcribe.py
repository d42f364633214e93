"""asr-transcribe as a user meets it: what is printed, what is written where, what is not done again, what ends in an error."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from asr_core.decode import DecodeOptions
from asr_core.errors import AudioError
from asr_core.transcribe import Bundle, TranscribeOptions, Transcript, transcribe
from asr_export import transcribe as command
from asr_export.jobs import LEDGER
from runners import pytorch

# Greedy, whole windows, one attempt, with the few words of the checkpoint's own list.
FAST = (
    "--beam-size 1 --without-timestamps --temperature-increment none --no-speech-threshold none --language en "
    "--suppress-tokens checkpoint --threads 1"
).split()
POLICY = TranscribeOptions(DecodeOptions(no_speech_threshold=None))


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> list[Path]:
    """Two short files and, as the last, one of more than a window."""
    random = np.random.default_rng(0)
    paths = [tmp_path_factory.mktemp("sounds") / name for name in ("one.wav", "two words.flac", "long.wav")]
    for path, seconds in zip(paths, (1.5, 2, 30.4), strict=True):
        soundfile.write(path, random.normal(size=int(seconds * 16000)) * 0.1, 16000)
    return paths


@pytest.fixture
def sounds(originals: list[Path], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copy(path, tmp_path)) for path in originals]


@pytest.fixture
def run(talkative_artifact):
    def command_of(*arguments: object, stdin: bytes | None = None):
        arguments = (*FAST, "--artifact", talkative_artifact.path, *arguments)
        return CliRunner().invoke(command.main, [str(argument) for argument in arguments], input=stdin)

    return command_of


@pytest.fixture(scope="module")
def expected(talkative, talkative_artifact, originals) -> list[Transcript]:
    """What PyTorch hears in them."""
    runner, bundle = pytorch.open(talkative, 1), Bundle.read(talkative_artifact.path)
    return [transcribe(runner, bundle, path, POLICY) for path in originals]


def lines(transcript: Transcript) -> list[str]:
    return [segment.text.strip() for segment in transcript.segments]


def test_words_of_files_are_printed(run, sounds, expected):
    """One file: its words; several: with names; one that is bad does not stop the others and gives the exit code."""
    assert [len(transcript.segments) for transcript in expected] == [1, 1, 2]
    result = run(sounds[2])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "".join(f"{line}\n" for line in lines(expected[2])), "")
    result = run("absent.wav", *sounds)
    named = [f"{path}: {line}" for path, transcript in zip(sounds, expected, strict=True) for line in lines(transcript)]
    assert result.exit_code == AudioError.exit_code
    assert result.stdout.splitlines() == named
    assert result.stderr == "Error: absent.wav: no such file.\n"
    assert not list(sounds[0].parent.glob("*.txt"))


def test_json_is_openai_whispers_object_and_more(run, sounds, expected):
    result = run(*sounds[1:], "--format", "json", "--output-dir", "-")
    assert result.exit_code == 0
    for line, path, transcript in zip(result.stdout.splitlines(), sounds[1:], expected[1:], strict=True):
        answer = json.loads(line)
        assert answer.pop("rtfx") > 0
        assert answer.pop("duration_s") == pytest.approx(soundfile.info(path).duration, abs=1e-3)
        assert list(answer) == ["text", "segments", "language", "audio", "unreadable"]
        assert (answer["audio"], answer["text"], answer["language"]) == (str(path), transcript.text, "en")
        assert [segment["tokens"] for segment in answer["segments"]] == [s.tokens for s in transcript.segments]
        names = "id seek start end text tokens temperature avg_logprob compression_ratio no_speech_prob".split()
        assert all(list(segment) == names for segment in answer["segments"])


def test_standard_input(run, sounds, expected, tmp_path):
    result = run("-", stdin=sounds[0].read_bytes())
    assert (result.exit_code, result.stdout) == (0, lines(expected[0])[0] + "\n")
    result = run("-", "--format", "tsv", "--output-dir", tmp_path / "out", stdin=sounds[0].read_bytes())
    assert (result.exit_code, result.stdout) == (0, "")
    assert (tmp_path / "out/stdin.tsv").read_text() == f"start\tend\ttext\n0\t1500\t{lines(expected[0])[0]}\n"
    result = run("-", stdin=b"")
    assert (result.exit_code, result.stdout) == (AudioError.exit_code, "")


@pytest.fixture
def folder(sounds, tmp_path) -> Path:
    """A folder of talks with everything in it that a folder may hold."""
    folder = tmp_path / "talks"
    (folder / "monday" / ".cache").mkdir(parents=True)
    shutil.copy(sounds[0], folder / "a.wav")
    shutil.copy(sounds[1], folder / "a.flac")
    shutil.copy(sounds[1], folder / "monday" / "b.FLAC")
    shutil.copy(sounds[1], folder / "monday" / ".cache" / "hidden.flac")
    (folder / "notes.md").write_text("not audio")
    (folder / "bad.mp3").write_text("not audio either")
    return folder


def made(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if Path(name).suffix in {".txt", ".srt", ".vtt", ".tsv", ".json", ".part"}}


def test_a_folder_is_written_beside_its_audio_and_resumed(run, folder, expected, monkeypatch):
    names = {"a.wav.txt", "a.flac.txt", "monday/b.txt"}
    result = run(folder)
    assert (result.exit_code, result.stdout) == (AudioError.exit_code, "")
    assert result.stderr.count("Error: ") == 1
    assert str(folder / "bad.mp3") in result.stderr
    assert made(folder) == names
    assert (folder / "a.wav.txt").read_text() == lines(expected[0])[0] + "\n"
    assert (folder / "monday/b.txt").read_text() == (folder / "a.flac.txt").read_text() == lines(expected[1])[0] + "\n"

    # Only what is missing, or was made of something else, is done again.
    (folder / "bad.mp3").unlink()
    (folder / "a.wav.txt").unlink()
    with (folder / "monday" / LEDGER).open("a") as ledger:
        ledger.write('\n{"transcript": "b", "k')  # as a power cut leaves it
    decoded: list[str] = []
    original = command._transcribed
    monkeypatch.setattr(command, "_transcribed", lambda job, *rest: decoded.append(job.name) or original(job, *rest))
    result = run(folder)
    assert (result.exit_code, decoded) == (0, [str(folder / "a.wav")])
    assert result.stderr.count("up to date") == 2
    for change, again in (
        (lambda: shutil.copy(folder / "a.wav", folder / "monday/b.FLAC"), [str(folder / "monday/b.FLAC")]),
        (lambda: None, []),
    ):
        change()
        decoded.clear()
        run(folder)
        assert decoded == again
    for arguments in (["--fresh"], ["--initial-prompt", "other"], ["--format", "srt"]):
        decoded.clear()
        assert run(folder, *arguments).exit_code == 0
        assert len(decoded) == 3
    assert made(folder) == {*names, *(name.replace(".txt", ".srt") for name in names)}


def test_an_output_folder_keeps_the_order_of_the_searched_one(run, folder, sounds, tmp_path):
    out = tmp_path / "out"
    result = run(folder, sounds[0], "--output-dir", out, "--format", "all")
    assert result.exit_code == AudioError.exit_code
    forms = ("txt", "vtt", "srt", "tsv", "json")
    assert made(out) == {f"{name}.{form}" for name in ("a.wav", "a.flac", "monday/b", "one") for form in forms}
    assert not made(folder)
    assert json.loads((out / "one.json").read_text())["audio"] == str(sounds[0])


def test_two_transcripts_of_one_name_are_refused(run, sounds, tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        shutil.copy(sounds[0], tmp_path / name / "a.wav")
    result = run(tmp_path / "x/a.wav", tmp_path / "y/a.wav", "--output-dir", tmp_path / "out")
    assert result.exit_code == 2
    assert "several files would be transcribed to" in result.stderr
    assert run(tmp_path / "x", tmp_path / "x/a.wav").stderr == ""  # named twice, done once


def test_an_input_is_never_written_over(run, sounds, tmp_path):
    odd = shutil.copy(sounds[0], tmp_path / "odd.txt")
    before = Path(odd).read_bytes()
    assert run(odd, "--format", "txt").exit_code == 0
    assert Path(odd).read_bytes() == before
    assert (tmp_path / "odd.txt.txt").exists()


def test_a_damaged_file_is_transcribed_and_the_damage_named(run, tmp_path):
    path = tmp_path / "talk.flac"
    soundfile.write(path, np.random.default_rng(0).normal(size=10 * 16000) * 0.1, 16000)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + len(content) // 5] = bytes(len(content) // 5)
    path.write_bytes(content)
    result = run(path, "--format", "json", "--output-dir", "-")
    answer = json.loads(result.stdout)
    assert result.exit_code == 0
    assert answer["duration_s"] == pytest.approx(10, abs=0.01)
    assert [4 < gap["start"] < gap["end"] < 9 for gap in answer["unreadable"]] == [True]
    assert re.match(r"Warning: .*talk\.flac is damaged: [\d.]+–[\d.]+ s could not be decoded", result.stderr)


def test_an_empty_folder_and_a_full_disk(run, sounds, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run(tmp_path / "empty")
    assert (result.exit_code, "holds no audio files" in result.stderr) == (AudioError.exit_code, True)
    result = run(sounds[0], "--output-dir", "/dev/null/out")
    assert (result.exit_code, "Traceback" in result.stderr) == (9, False)


def test_what_cannot_be_replaced_leaves_no_part(run, sounds):
    (sounds[0].parent / "one.txt").mkdir()
    result = run(sounds[0], "--format", "txt")
    assert result.exit_code == 9
    assert not list(sounds[0].parent.glob(".*.part"))


def test_a_damaged_artifact_is_refused(talkative_artifact, sounds, tmp_path):
    folder = shutil.copytree(talkative_artifact.path, tmp_path / "artifact")
    (folder / "tokenizer.json").write_text("{}")
    result = CliRunner().invoke(command.main, [str(sounds[0]), "--artifact", str(folder)])
    assert (result.exit_code, result.stdout) == (6, "")
    assert result.stderr == f"Error: {folder / 'tokenizer.json'} was altered since the export (checksum differs). Export again.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--language", "xx"], "unknown language 'xx'"),
        (["--threads", "0"], "0 is not in the range x>=1"),
        (["--format", "docx"], "'docx' is not one of 'txt'"),
        (["--format", "all", "--output-dir", "-"], "cannot be printed at once"),
        (["--highlight-words"], "give --word-timestamps too"),
        (["--hallucination-silence-threshold", "2"], "ask for word timestamps too"),
        (["--vad", "--clip-timestamps", "0,1"], "give either"),
        (["--clip-timestamps", "0,x"], "not a list of numbers"),
        (["--logprob-threshold", "low"], "neither a number nor 'none'"),
        (["--patience", "2"], "needs a beam size"),
    ],
)
def test_wrong_usage(run, sounds, arguments, message):
    result = run(sounds[0], *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_an_english_model_does_not_translate(shape_folder, export_here, sounds):
    artifact = export_here(shape_folder("mini.en"), "ctranslate2", "fp32")
    result = CliRunner().invoke(command.main, [str(sounds[0]), "--artifact", str(artifact.path), "--task", "translate"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "only transcribes English" in result.stderr


def test_a_prompt_too_long_is_cut_and_said(run, sounds):
    result = run(sounds[0], "--initial-prompt", "word " * 500)
    assert result.exit_code == 0
    assert re.search(r"the initial prompt has \d{3,} tokens; the last 223 of them are used", result.stderr)


def test_without_torch_and_transformers(talkative_artifact, sounds, expected):
    """An environment with one runtime's extra has neither, nor anything else that only exports need."""
    code = """
import sys
for absent in ("torch", "transformers", "safetensors", "huggingface_hub", "onnx", "jiwer", "scipy"):
    sys.modules[absent] = None
from asr_export.transcribe import main
main()
"""
    command = [sys.executable, "-c", code, str(sounds[0]), "--artifact", str(talkative_artifact.path), *FAST]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, lines(expected[0])[0] + "\n", "")


def test_progress_on_a_terminal(monkeypatch):
    """The bar knows seconds done and in all; nothing of it is left where stderr is no terminal."""
    import io

    from rich import console as rich_console

    shown = io.StringIO()
    real = rich_console.Console

    def terminal(**_: object):
        return real(file=shown, force_terminal=True, width=120)

    monkeypatch.setattr(rich_console, "Console", terminal)
    with command._progress("[1/2] talk.wav") as advance:
        advance(30.0, 120.0)
    assert "[1/2] talk.wav" in shown.getvalue()
    assert "25%" in shown.getvalue()
    assert "× real time" in shown.getvalue()
