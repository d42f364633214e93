"""What asr-transcribe has to do: which files, where their transcripts go, and which of them are there already.

A transcript is written under another name and then renamed, so one that is there is whole. What made it is noted in a ledger
in the same folder (``.asr-transcribe.jsonl``, one line a transcript, appended once its last file is there): a transcript is up
to date where its line names the same audio (size and time of change), artifact and options, and all its files exist.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from asr_core.errors import AudioError, UsageError
from asr_export.formats import FORMATS

STDIN = "-"
LEDGER = ".asr-transcribe.jsonl"
# What is taken for audio in a folder; a file that is named may have any name.
SUFFIXES = frozenset(
    ".3gp .aac .ac3 .aif .aifc .aiff .amr .ape .au .avi .caf .flac .flv .m4a .m4b .m4v .mka .mkv .mov .mp2 .mp3 .mp4 .mpeg .mpg "
    ".mpga .oga .ogg .ogv .opus .spx .ts .wav .weba .webm .wma .wmv .wv".split()
)


@dataclass(frozen=True)
class Job:
    """One file: ``output`` is where its transcript goes, without suffix; None: printed. ``name`` is how messages call it."""

    audio: Path | None
    name: str
    output: Path | None = None

    def files(self, forms: Iterable[str]) -> dict[str, Path]:
        """The transcript's file of each format; none where it is printed."""
        return {form: self.output.with_name(f"{self.output.name}.{form}") for form in forms} if self.output else {}


def collect(sources: Sequence[str], folder: Path | None, *, printed: bool) -> tuple[list[Job], list[AudioError]]:
    """The files to transcribe, in order and each once; folders are searched with all that they hold, but for hidden files.

    Transcripts go to ``folder``, ordered as in the folders that were searched, or else beside their audio. Two that would have
    one name keep their audio's whole name. Also returns what is wrong with single sources; raises :class:`UsageError` where two
    transcripts would be one file all the same.
    """
    jobs: dict[str, Job] = {}
    errors = []
    for source in sources:
        path = Path(source)
        found = list(_audio_in(path)) if path.is_dir() else [path]
        if not found:
            errors.append(AudioError(f"{source} holds no audio files."))
        for audio in found:
            key = source if source == STDIN else str(audio.resolve())
            jobs.setdefault(key, _job(audio, path if path.is_dir() else audio.parent, folder, source, printed=printed))
    return _distinct(list(jobs.values())), errors


def _job(audio: Path, root: Path, folder: Path | None, source: str, *, printed: bool) -> Job:
    if source == STDIN:
        return Job(None, "stdin", folder / "stdin" if folder else None)
    where = folder / audio.parent.relative_to(root) if folder else audio.parent
    return Job(audio, str(audio), None if printed else where / audio.stem)


def _audio_in(folder: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(where) / name


def _distinct(jobs: list[Job]) -> list[Job]:
    """Give whole names to transcripts that would share one, or take that of an input."""
    inputs = {job.audio for job in jobs}
    for _ in range(2):  # a whole name may be another's short one
        counts = Counter(job.output for job in jobs if job.output)
        jobs = [_whole(job) if (job.output and counts[job.output] > 1) or _hits(job, inputs) else job for job in jobs]
    twice = [str(output) for output, count in Counter(job.output for job in jobs if job.output).items() if count > 1]
    if twice:
        raise UsageError(f"several files would be transcribed to {twice[0]}.*: name the folder that holds them instead.")
    return jobs


def _whole(job: Job) -> Job:
    return replace(job, output=job.output.with_name(job.audio.name)) if job.output and job.audio else job


def _hits(job: Job, inputs: set[Path | None]) -> bool:
    return any(file in inputs for file in job.files(FORMATS).values())


@dataclass
class Ledger:
    """What was transcribed before, by transcript; read once a folder."""

    settings: Any
    _known: dict[Path, dict[str, str]] = field(default_factory=dict)

    def has(self, job: Job, forms: Sequence[str]) -> bool:
        """Whether a job's transcript is there in these formats, made from the same audio, artifact and options."""
        if job.output is None or job.audio is None or not job.audio.exists():
            return False
        same = self._folder(job.output.parent).get(job.output.name) == self._key(job.audio)
        return same and all(file.is_file() for file in job.files(forms).values())

    def note(self, job: Job) -> None:
        """Write down that a job's transcript is complete."""
        if job.output is None or job.audio is None:
            return
        key = self._key(job.audio)
        with (job.output.parent / LEDGER).open("a", encoding="utf-8") as file:
            # The line break comes first: the line before may be one that an interruption tore.
            file.write("\n" + json.dumps({"transcript": job.output.name, "key": key}))
        self._folder(job.output.parent)[job.output.name] = key

    def _key(self, audio: Path) -> str:
        state = audio.stat()
        return hashlib.sha256(json.dumps([state.st_size, state.st_mtime_ns, self.settings]).encode()).hexdigest()

    def _folder(self, folder: Path) -> dict[str, str]:
        if folder not in self._known:
            self._known[folder] = dict(_entries(folder / LEDGER))
        return self._known[folder]


def _entries(ledger: Path) -> Iterator[tuple[str, str]]:
    if not ledger.exists():
        return
    for line in ledger.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            yield entry["transcript"], entry["key"]
        except (ValueError, KeyError, TypeError):
            continue  # a torn line


def write(job: Job, contents: dict[str, str]) -> None:
    """Put a transcript's files, by format, in their place; each is whole or not there. Folders are made."""
    for form, file in job.files(contents).items():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.part")
        try:
            part.write_text(contents[form], encoding="utf-8", newline="\n")
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
