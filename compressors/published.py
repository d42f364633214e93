"""What others published of compressed speech recognition, for orientation: their models, their data, not measured here."""

from __future__ import annotations

from dataclasses import dataclass

CONFORMER = "a Conformer-CTC on LibriSpeech"
WHISPER = "Whisper large on a CPU"


@dataclass(frozen=True)
class Published:
    """A trade-off: times smaller, times faster, relative increase of the WER (a fraction); None where they don't say.

    ``methods`` are our methods of the same kind.
    """

    technique: str
    study: str
    methods: tuple[str, ...]
    smaller: float | None = None
    faster: float | None = None
    worse: float | None = None


POINTS = (
    Published("INT8", CONFORMER, ("quantise", "static", "smooth", "qat"), 2.95, 1.14, 0.318),
    Published("magnitude pruning, 30 %", CONFORMER, ("prune",), worse=0.92),
    Published("structured pruning", CONFORMER, ("ffn", "heads", "layers"), worse=1.88),
    Published("low rank", CONFORMER, ("lowrank",), 2.18, 1.37, 1.41),
    Published("weight clustering", CONFORMER, ("cluster",), 3.95, worse=0.94),
    Published("quantised", WHISPER, ("quantise", "static", "smooth", "qat"), faster=1.5),
    Published("pruned to 0.81", WHISPER, ("ffn", "heads", "layers", "prune"), faster=1.17),
    Published("quantised and pruned", WHISPER, ("quantise", "ffn", "heads", "layers"), faster=1.71, worse=0.09),
)
