"""Production clients as witnesses: what the program that users already have hears with the artifact as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asr_core import audio, isolate, registry
from asr_core.errors import UnavailableError
from parity import measure
from parity.compare import Row
from parity.data import Utterance

CLIENTS = "parity.clients"


def clients(target: str) -> list[str]:
    """The modules of the clients that we know for a target's artifacts."""
    known = {name: registry.load(CLIENTS, name).TARGET for name in registry.names(CLIENTS)}
    return [name for name, loads in known.items() if loads == target]


def hear(client: str, path: str, files: list[str], languages: list[str], threads: int) -> dict[str, Any]:
    """The client's texts of some audio files, told their languages; raises :class:`UnavailableError` where it isn't installed."""
    transcribe = registry.load(CLIENTS, client).open(Path(path), threads)
    spoken = zip(files, languages, strict=True)
    return {"texts": [transcribe(audio.load_audio(file), language) for file, language in spoken]}


def testify(
    client: str, precision: str, path: Path, measured: Path, utterances: list[Utterance], probes: list[int], threads: int
) -> Row:
    """The client's row: its texts against those of our own runner, whose measurement lies in ``measured``, letter by letter."""
    name = registry.load(CLIENTS, client).CLIENT
    heard = [utterances[i] for i in probes]
    files, languages = [str(one.path) for one in heard], [one.language for one in heard]
    arguments = {"client": client, "path": str(path), "files": files, "languages": languages, "threads": threads}
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
