"""Production clients as witnesses: what the program that users already have hears with the artifact as it is."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from asr_core import audio, isolate, registry
from asr_core.errors import UnavailableError
from parity import measure
from parity.compare import Row
from parity.data import Utterance

CLIENTS = "parity.clients"


def has_client(target: str) -> bool:
    """Whether a target's ecosystem has a client that we know."""
    return target in registry.names(CLIENTS)


def hear(target: str, path: str, files: list[str], threads: int) -> dict[str, Any]:
    """The client's texts of some audio files; raises :class:`UnavailableError` where it isn't installed."""
    client = registry.load(CLIENTS, target)
    try:
        metadata.version(client.CLIENT)
    except metadata.PackageNotFoundError:
        raise UnavailableError(f"the witness {client.CLIENT} is not installed: pip install {client.CLIENT}") from None
    transcribe = client.open(Path(path), threads)
    return {"texts": [transcribe(audio.load_audio(file)) for file in files]}


def testify(
    target: str, precision: str, path: Path, measured: Path, utterances: list[Utterance], probes: list[int], threads: int
) -> Row:
    """The client's row: its texts against those of our own runner, whose measurement lies in ``measured``, letter by letter."""
    name = registry.load(CLIENTS, target).CLIENT
    arguments = {"target": target, "path": str(path), "files": [str(utterances[i].path) for i in probes], "threads": threads}
    outcome = isolate.run("parity.witness:hear", arguments, threads=threads)
    if outcome.status != "ok":
        status = "unavailable" if isinstance(outcome.error, UnavailableError) else "crashed"
        return Row(name, precision, status, outcome.reason, decoder="client")
    ours = measure.read_decoded(measured)
    pairs = [(utterances[i], ours[i]["text"], text) for i, text in zip(probes, outcome.result["texts"], strict=True)]
    differing = [(utterance, mine, theirs) for utterance, mine, theirs in pairs if mine != theirs]
    equal = 1 - len(differing) / len(pairs)
    if not differing:
        agreed = f"hears what our runner hears on all of {len(pairs)} clips"
        return Row(name, precision, "pass", agreed, decoder="client", texts_equal=equal)
    utterance, mine, theirs = differing[0]
    reason = f"differs from our runner on {len(differing)} of {len(pairs)} clips, first {utterance.id}: {theirs!r}, ours {mine!r}"
    return Row(name, precision, "fail", reason, decoder="client", texts_equal=equal)
