"""The utterances that every backend hears: a NeMo manifest or a LibriSpeech folder, decoded and featurised once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asr_core import audio
from asr_core.errors import AudioError, UsageError

MELS = "mels.npy"
UTTERANCES = "utterances.json"
CASES = "cases"  # the folder of the probes, and of what else only the failure classes and the modes hear


@dataclass(frozen=True)
class Utterance:
    """One clip and what was said in it.

    ``duration`` in seconds, ``language`` as Whisper's code; ``boundaries`` are its segments' true starts and ends in seconds,
    where the manifest tells them (``segments``, each with ``start`` and ``end``).
    """

    id: str
    path: Path
    text: str
    duration: float = 0.0
    language: str = "en"
    boundaries: tuple[float, ...] = ()


def read(source: Path) -> list[Utterance]:
    """List the utterances of a NeMo manifest (``.jsonl``/``.json``) or of a LibriSpeech folder (``*.trans.txt``).

    Raises :class:`UsageError` where ``source`` is neither, or holds nothing.
    """
    if source.is_dir():
        utterances = sorted(_librispeech(source), key=lambda utterance: utterance.id)
    elif source.is_file():
        utterances = list(_nemo(source))
    else:
        raise UsageError(f"{source}: no such manifest or LibriSpeech folder.")
    if not utterances:
        raise UsageError(f"{source} lists no utterances (a NeMo manifest or a LibriSpeech folder is wanted).")
    return utterances


def prepare(utterances: list[Utterance], n_mels: int, folder: Path, collected: Path | None = None) -> None:
    """Write every utterance's log-mel, float32 [N, n_mels, 3000], and the list with the durations below ``folder``.

    ``collected`` is where :func:`collect` laid the recordings; None reads them where they are. Raises :class:`AudioError` naming
    a file that cannot be used.
    """
    filters = audio.mel_filters(n_mels)
    shape = (len(utterances), n_mels, audio.WINDOW_FRAMES)
    mels = np.lib.format.open_memmap(folder / MELS, mode="w+", dtype=np.float32, shape=shape)
    known = []
    for i, utterance in enumerate(utterances):
        samples = _samples(utterance, collected and collected / _recording(i, utterance))
        try:
            mels[i] = audio.log_mel(samples, filters)
        except AudioError as error:
            raise AudioError(f"{utterance.path}: {error}") from None
        known.append(replace(utterance, duration=len(samples) / audio.SAMPLE_RATE))
    mels.flush()
    _list(folder, known)


def collect(utterances: list[Utterance], folder: Path) -> None:
    """Lay links to the recordings of some utterances into a folder, and their list: what another machine needs of them."""
    for i, utterance in enumerate(utterances):
        (folder / _recording(i, utterance)).symlink_to(utterance.path.resolve())
    _list(folder, utterances)


def prepare_collected(collected: str, n_mels: int, folder: str) -> dict[str, Any]:
    """Inside :func:`asr_core.isolate.run`: :func:`prepare` what lies in a folder that :func:`collect` filled."""
    prepare(prepared(Path(collected)), n_mels, Path(folder), Path(collected))
    return {}


def _recording(place: int, utterance: Utterance) -> str:
    return f"{place}{utterance.path.suffix}"


def _samples(utterance: Utterance, collected: Path | None) -> NDArray[np.float32]:
    if collected is None:
        return audio.load_audio(utterance.path)
    try:
        return audio.load_audio(collected)
    except AudioError as error:  # under the name that the user knows
        raise AudioError(str(error).replace(str(collected), str(utterance.path))) from None


def _list(folder: Path, utterances: list[Utterance]) -> None:
    rows = [asdict(utterance) | {"path": str(utterance.path)} for utterance in utterances]
    (folder / UTTERANCES).write_text(json.dumps(rows), encoding="utf-8")


def prepared(folder: Path) -> list[Utterance]:
    """The utterances that :func:`prepare` wrote below a folder."""
    rows = json.loads((folder / UTTERANCES).read_text(encoding="utf-8"))
    return [Utterance(**row | {"path": Path(row["path"]), "boundaries": tuple(row["boundaries"])}) for row in rows]


def _nemo(manifest: Path) -> Iterator[Utterance]:
    for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            path = manifest.parent / entry["audio_filepath"]
            times = tuple(float(segment[end]) for segment in entry.get("segments", []) for end in ("start", "end"))
            yield Utterance(path.stem, path, entry["text"], language=entry.get("lang", "en"), boundaries=times)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(f"{manifest}, line {number}: not a NeMo manifest entry ({error}).") from error


def _librispeech(folder: Path) -> Iterator[Utterance]:
    for transcripts in folder.rglob("*.trans.txt"):
        for line in transcripts.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            yield Utterance(name, transcripts.parent / f"{name}.flac", text)
