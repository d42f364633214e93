"""``asr-transcribe``: the words of audio files of any length, with one artifact.

AUDIO is files, folders (searched with all their subfolders), or - for standard input. Where only files are named and neither
--format nor --output-dir is given, the words are printed; otherwise they are written beside the audio, or below the output
folder, and what is there already is not done again. The defaults are those of openai-whisper's command.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asr_core.errors import AudioError, UsageError
from asr_export import jobs
from asr_export.cli import handle_errors, report
from asr_export.formats import FORMATS, written
from asr_export.jobs import STDIN, Job, Ledger

if TYPE_CHECKING:
    from asr_core.tokens import TokenIds
    from asr_core.transcribe import Progress, TranscribeOptions, Transcript

    Words = Callable[[Path, Progress], Transcript]

CHECKPOINT = "checkpoint"
OPTIONS_OF_WINDOWS = (
    "language task beam_size best_of patience length_penalty compression_ratio_threshold logprob_threshold no_speech_threshold "
    "seed"
).split()
OPTIONS_OF_FILES = (
    "initial_prompt carry_initial_prompt condition_on_previous_text hotwords word_timestamps hallucination_silence_threshold "
    "vad batch_size trim_silence"
).split()


class _Bound(click.ParamType[float | None]):
    """A number, or ``none`` for no bound."""

    name = "number|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        """Read it from the command line."""
        if value is None or str(value).lower() == "none":
            return None
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor 'none'.", param, ctx)


@click.command(help=__doc__, epilog="Exit codes: see the README, section 'Exit codes'.")
@click.argument("audio", nargs=-1, required=True)
@click.option("--artifact", required=True, type=click.Path(path_type=Path), help="Folder that asr-export made.")
@click.option("--format", "form", type=click.Choice([*FORMATS, "all"]), help="What to write.  [default: txt]")
@click.option("--output-dir", type=click.Path(path_type=Path), help="Where to write; - prints.  [default: beside the audio]")
@click.option("--fresh", is_flag=True, help="Transcribe again what is there already.")
@click.option("--language", help="Language that is spoken: code or English name.  [default: detected in the first 30 s]")
@click.option("--task", default="transcribe", show_default=True, type=click.Choice(["transcribe", "translate"]))
@click.option("--word-timestamps", is_flag=True, help="Times of words; segments then begin and end with them.")
@click.option("--highlight-words", is_flag=True, help="Underline each word in srt and vtt as it is said.")
@click.option("--without-timestamps", is_flag=True, help="Whole windows of 30 s, one segment each.")
@click.option("--beam-size", default=5, show_default=True, type=click.IntRange(1), help="Beams at temperature 0; 1 is greedy.")
@click.option("--patience", type=float, help="How much longer than needed a beam search goes on.  [default: 1]")
@click.option("--best-of", default=5, show_default=True, type=click.IntRange(1), help="Samples at temperatures above 0.")
@click.option("--length-penalty", type=float, help="0 to 1.  [default: by length]")
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0))
@click.option(
    "--temperature-increment", default=0.2, show_default=True, type=_Bound(), help="After an answer that fails; none: keep it."
)
@click.option("--compression-ratio-threshold", default=2.4, show_default=True, type=_Bound(), help="Above: an answer fails.")
@click.option("--logprob-threshold", default=-1.0, show_default=True, type=_Bound(), help="Below: an answer fails.")
@click.option("--no-speech-threshold", default=0.6, show_default=True, type=_Bound(), help="Above, and improbable: silence.")
@click.option("--seed", default=0, show_default=True, help="Of the samples.")
@click.option(
    "--suppress-tokens",
    default="-1",
    show_default=True,
    help="Ids, comma-separated; -1: all that is not spoken; 'checkpoint': the list that came with the checkpoint.",
)
@click.option("--initial-prompt", help="Text before the first window: names, spelling, style.")
@click.option("--carry-initial-prompt", is_flag=True, help="Put it before every window.")
@click.option("--hotwords", help="Words to expect, before every window.")
@click.option("--condition-on-previous-text/--no-condition-on-previous-text", default=True, show_default=True)
@click.option("--hallucination-silence-threshold", type=_Bound(), help="Seconds of silence around made-up words to skip.")
@click.option("--clip-timestamps", help="Seconds: start,end,start,end,… of what to transcribe.")
@click.option("--vad", is_flag=True, help="Transcribe only where someone speaks.")
@click.option(
    "--batch-size", default=1, show_default=True, type=click.IntRange(1), help="Stretches with speech at a time, in each thread."
)
@click.option("--provider", help="ONNX Runtime's on a GPU: cuda or tensorrt.  [default: the CPU]")
@click.option("--trim-silence", is_flag=True, help="Short audio in short windows: faster, and some words change.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the runtime.  [default: all processors]")
@handle_errors
def main(audio: tuple[str, ...], artifact: Path, form: str | None, output_dir: Path | None, fresh: bool, **given: Any) -> None:
    """Transcribe every file; one that fails does not stop the others and gives the exit code."""
    threads, highlight = given.pop("threads") or os.cpu_count() or 1, given.pop("highlight_words")
    if highlight and not given["word_timestamps"]:
        raise UsageError("--highlight-words is about words: give --word-timestamps too.")
    output = _output(audio, form, output_dir)
    words_of, settings = _transcriber(artifact, given, threads, given.pop("provider"))
    found, errors = jobs.collect(audio, output.folder, printed=output.printed)
    codes = [error.exit_code for error in errors]
    for error in errors:
        report(error)
    ledger = Ledger([settings, highlight])
    for number, job in enumerate(found, start=1):
        if not fresh and ledger.has(job, output.forms):
            click.echo(f"{job.name}: up to date.", err=True)
            continue
        try:
            transcript = _transcribed(job, words_of, f"[{number}/{len(found)}] {job.name}")
        except AudioError as error:
            report(error)
            codes.append(error.exit_code)
            continue
        contents = {name: written(transcript, name, highlight=highlight) for name in output.forms}
        if job.output is None:
            _print(job, contents, several=len(found) > 1)
        else:
            jobs.write(job, contents)
            ledger.note(job)
    if codes:
        raise SystemExit(codes[0])


@dataclass(frozen=True)
class _Output:
    """Where transcripts go: formats, the folder that was asked for, and whether they are printed."""

    forms: tuple[str, ...]
    folder: Path | None
    printed: bool


def _output(audio: tuple[str, ...], form: str | None, folder: Path | None) -> _Output:
    """Decide it; raises :class:`UsageError` where several formats would be printed."""
    to_stdout = str(folder) == STDIN
    only_files = not any(Path(source).is_dir() for source in audio)
    printed = to_stdout or (only_files and form is None and folder is None)
    if form == "all" and (printed or (folder is None and STDIN in audio)):
        raise UsageError("all formats cannot be printed at once: give --output-dir a folder, or choose a format.")
    forms = tuple(FORMATS) if form == "all" else (form or "txt",)
    return _Output(forms, None if to_stdout else folder, printed)


def _transcriber(folder: Path, given: dict[str, Any], threads: int, provider: str | None) -> tuple[Words, Any]:
    """Open an artifact with its runtime; also returns what, with the audio, decides on the words.

    An unknown language or task fails before the model is loaded.
    """
    from asr_core.artifact import MANIFEST, Artifact
    from asr_core.transcribe import Bundle, transcribe
    from runners.base import open_team

    artifact = Artifact.open(folder)
    bundle = Bundle.read(artifact.path)
    options = _options(given, artifact.manifest.tokens, bundle.tokenizer)
    team = open_team(artifact.manifest.target, artifact.path, threads, options.batch_size, provider)

    def words_of(path: Path, progress: Progress) -> Transcript:
        transcript = transcribe(team, bundle, path, options, progress)
        return transcript if team[0].timed else replace(transcript, rtfx=None)

    return words_of, [(folder / MANIFEST).read_text(encoding="utf-8"), asdict(options)]


def _options(given: dict[str, Any], tokens: TokenIds, tokenizer: Any) -> TranscribeOptions:
    """The policy that was asked for, checked against the model; what will be cut is said."""
    from asr_core.decode import DecodeOptions
    from asr_core.tokens import suppressed
    from asr_core.transcribe import TranscribeOptions, prompt_tokens

    tokens.prompt(given["language"] or next(iter(tokens.languages), "en"), given["task"])
    room = tokens.max_new_tokens - 1
    chosen = given["suppress_tokens"]
    size = len(prompt_tokens(tokenizer, given["initial_prompt"]))
    if size > room:
        click.echo(f"Warning: the initial prompt has {size} tokens; the last {room} of them are used.", err=True)
    windows = DecodeOptions(
        **{name: given[name] for name in OPTIONS_OF_WINDOWS}
        | {"beam_size": given["beam_size"] if given["beam_size"] > 1 else None},
        timestamps=not given["without_timestamps"],
        temperatures=_temperatures(given["temperature"], given["temperature_increment"]),
        suppress=None if chosen == CHECKPOINT else suppressed(tokenizer, _numbers(chosen, int)),
    )
    files = {name: given[name] for name in OPTIONS_OF_FILES}
    return TranscribeOptions(windows, clips=_clips(given["clip_timestamps"]), **files)


def _temperatures(first: float, increment: float | None) -> tuple[float, ...]:
    """Up to 1, as openai-whisper's command counts them."""
    if not increment:
        return (first,)
    return tuple(first + i * increment for i in range(int((1.0 + 1e-6 - first) / increment) + 1)) or (first,)


def _clips(text: str | None) -> tuple[tuple[float, float | None], ...]:
    """Start and end of each clip; a last start without an end lasts to the end of the file."""
    times: list[float | None] = [*_numbers(text or "", float)]
    if len(times) % 2:
        times.append(None)
    return tuple((start or 0.0, end) for start, end in zip(times[::2], times[1::2], strict=True))


def _numbers(text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(item) for item in text.split(",") if item.strip()]
    except ValueError:
        raise UsageError(f"{text!r} is not a list of numbers with commas between them.") from None


def _transcribed(job: Job, words_of: Words, title: str) -> Transcript:
    """The words of one file or of standard input; damage is said on stderr."""
    from asr_core.audio import gaps_in_words

    with _progress(title) as progress, _file(job) as path:
        transcript = replace(words_of(path, progress), audio=job.name)
    if transcript.gaps:
        where = gaps_in_words(transcript.gaps)
        click.echo(f"Warning: {job.name} is damaged: {where} could not be decoded; the rest was transcribed.", err=True)
    return transcript


@contextmanager
def _file(job: Job) -> Iterator[Path]:
    """The job's audio; standard input is first put into a temporary file, which containers with an index at the end need."""
    if job.audio is not None:
        yield job.audio
        return
    with tempfile.TemporaryDirectory(prefix="asr-export-") as folder:
        path = Path(folder) / "stdin"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield path


@contextmanager
def _progress(title: str) -> Iterator[Progress]:
    """A bar on stderr, where that is a terminal, with the audio's seconds per second of work and the time left."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.fields[rtfx]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task(title, total=None, rtfx="")

        def advance(done: float, total: float) -> None:
            seconds = bars.tasks[0].elapsed or 0.0
            bars.update(bar, completed=done, total=total, rtfx=f"{done / seconds:.1f}× real time" if seconds else "")

        yield advance


def _print(job: Job, contents: dict[str, str], *, several: bool) -> None:
    """Print a transcript; lines of text have the file's name before them where there are several files."""
    for form, content in contents.items():
        lines = [f"{job.name}: {line}\n" for line in content.splitlines() or [""]]
        click.echo("".join(lines) if form == "txt" and several else content, nl=form == "json")
