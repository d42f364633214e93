"""``asr-transcribe``: the words of audio files, with one artifact."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from asr_core.errors import AudioError
from asr_export.cli import handle_errors, report

if TYPE_CHECKING:
    from asr_core.transcribe import Transcript


@click.command(help=__doc__, epilog="Exit codes: see the README, section 'Exit codes'.")
@click.argument("audio", nargs=-1, required=True)
@click.option("--artifact", required=True, type=click.Path(path_type=Path), help="Folder that asr-export made.")
@click.option(
    "--format",
    "form",
    default="txt",
    show_default=True,
    type=click.Choice(["txt", "json"]),
    help="Text, after 'FILE: ' where there are several files; or one JSON object a file, one a line.",
)
@click.option("--language", default="en", show_default=True, help="Language that is spoken, as a code.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the runtime.  [default: all processors]")
@handle_errors
def main(audio: tuple[str, ...], artifact: Path, form: str, language: str, threads: int | None) -> None:
    """Transcribe every file; one that fails does not stop the others and gives the exit code."""
    words_of = _transcriber(artifact, language, threads or os.cpu_count() or 1)
    codes = []
    for path in audio:
        try:
            click.echo(_line(words_of(path), form, several=len(audio) > 1))
        except AudioError as error:
            report(error)
            codes.append(error.exit_code)
    if codes:
        raise SystemExit(codes[0])


def _transcriber(folder: Path, language: str, threads: int) -> Callable[[str], Transcript]:
    """Open an artifact with its runtime; an unknown language fails before the model is loaded."""
    from asr_core.artifact import Artifact
    from asr_core.decode import DecodeOptions
    from asr_core.transcribe import Bundle, transcribe
    from runners.base import open_runner

    artifact = Artifact.open(folder)
    artifact.manifest.tokens.prompt(language)
    runner = open_runner(artifact.manifest.target, artifact.path, threads)
    words_of = partial(transcribe, runner, Bundle.read(artifact.path), options=DecodeOptions(language=language))
    return words_of if runner.timed else lambda path: replace(words_of(path), rtfx=None)


def _line(transcript: Transcript, form: str, *, several: bool) -> str:
    if form == "txt":
        return f"{transcript.audio}: {transcript.text}" if several else transcript.text
    import json
    from dataclasses import asdict

    rtfx = None if transcript.rtfx is None else round(transcript.rtfx, 2)
    rounded = {"duration_s": round(transcript.duration_s, 3), "rtfx": rtfx}
    return json.dumps(asdict(transcript) | rounded, ensure_ascii=False)
