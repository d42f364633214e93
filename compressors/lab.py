"""The search's laboratory: a candidate's checkpoint, its artifact, and what that measures beside the source's own PyTorch."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from asr_core import build
from asr_core.errors import ArtifactError, AsrExportError, StorageError, UsageError
from compressors import base, calibration
from compressors.budget import Budget, Figures, too_large
from compressors.recipe import Planned
from compressors.run import run
from compressors.space import Candidate
from parity.session import Session

if TYPE_CHECKING:
    from asr_core.artifact import Artifact
    from asr_core.checkpoint import Checkpoint
    from compressors.calibration import Window
    from parity.compare import Bounds, Row
    from parity.data import Utterance

CALIBRATING = 32  # clips at most, and no more than a third of all where the others judge
FEW = 16  # clips that sort out
ACCEPTED = 0.5  # points of ΔWER, where the budget says nothing: what int8 Whispers are accepted with (thresholds.toml)
# Between the loss that is accepted and the one that must be out of the question, as for int8 in thresholds.toml.
MARGIN = 1.5
WORK, MADE = "work", "made"


@dataclass
class Bench(Session):
    """A session of one checkpoint that also judges what was made from it, by a budget's bound on ΔWER."""

    accepted: float = ACCEPTED
    children: set[str] = field(default_factory=set)

    def bounds(self, precision: str) -> Bounds:
        """The same for every precision: whoever compresses says what it may cost."""
        return {
            "delta_wer": {"max": self.accepted, "reason": "the budget"},
            "non_inferiority": {"max": self.accepted + MARGIN, "reason": "what some hundred words can exclude"},
        }

    def _check(self, opened: Artifact) -> None:
        if opened.manifest.fingerprint not in self.children | {self.checkpoint.fingerprint}:
            raise ArtifactError(f"{opened.path} was not made from {self.checkpoint.path}.")


class Workbench:
    """Makes candidates of one source for one target and measures them, everything below ``root``.

    Some of the utterances calibrate, and the others judge, or ``judges`` where they are given.
    """

    def __init__(
        self, source: Checkpoint, target: str, utterances: Sequence[Utterance], judges: Sequence[Utterance] | None, root: Path,
        budget: Budget, threads: int, tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._source, self._target, self._root, self._tell = source, target, root, tell
        calibrating = _spread(utterances, min(CALIBRATING, len(utterances) if judges else len(utterances) // 3))
        judging = [utterance for utterance in judges or utterances if utterance not in calibrating]
        if not any(utterance.text.strip() for utterance in judging):
            raise UsageError("the data has no transcripts: without them there is no word error rate to search by.")
        self._calibrating = calibrating
        self._windows: list[Window] = []
        limit = budget.limit("delta_wer")
        self._benches = {
            name: self._bench(name, clips, ACCEPTED if limit is None else limit, threads)
            for name, clips in (("few", _spread(judging, FEW)), ("all", judging))
        }

    def _bench(self, name: str, clips: list[Utterance], accepted: float, threads: int) -> Bench:
        # PyTorch's own answers serve every search on the same clips.
        listed = [[str(clip.path), clip.path.stat().st_mtime_ns, clip.text, clip.language] for clip in clips]
        digest = hashlib.sha256(json.dumps([listed, threads]).encode()).hexdigest()[:12]
        work = self._root / WORK / f"{name}-{digest}"
        work.mkdir(parents=True, exist_ok=True)
        return Bench(self._source, clips, work, threads, gates="search", accepted=accepted, progress=self._stage)

    def rough(self, candidate: Candidate, limit_mb: float | None) -> Figures | None:
        """On few clips; what is too large already is not run, and what cannot be made gives nothing."""
        try:
            artifact = self._artifact(candidate)
        except StorageError:
            raise
        except AsrExportError as error:
            self._tell(f"{candidate}: {error}")
            return None
        size = artifact.size_mb
        if limit_mb is not None and size > limit_mb:
            return too_large(size)
        return self._measured("few", artifact)

    def full(self, candidate: Candidate) -> Figures | None:
        """On all judging clips; anew."""
        return self._anew("all", candidate)

    def ratio(self, candidate: Candidate, plain: Candidate) -> float:
        """On few clips, one after the other; infinite where one of them gives no figures."""
        mine, other = self._anew("few", candidate), self._anew("few", plain)
        return mine.latency_p50 / other.latency_p50 if mine and other else math.inf

    def drop(self, candidate: Candidate) -> None:
        """Remove a candidate's checkpoint and artifact."""
        shutil.rmtree(self._folder(candidate), ignore_errors=True)

    def checkpoint(self, candidate: Candidate) -> Path:
        """The candidate's checkpoint folder, made where it isn't there; the source's own where nothing is compressed."""
        if not candidate.steps:
            return self._source.path
        made = self._folder(candidate) / "checkpoint"
        if not made.exists():
            self._make(candidate, made)
        return made

    def artifact_folder(self, candidate: Candidate) -> Path:
        """Where the candidate's artifact lies."""
        return self._folder(candidate) / f"{self._target}-{candidate.precision}"

    def _folder(self, candidate: Candidate) -> Path:
        return self._root / MADE / candidate.key

    def _make(self, candidate: Candidate, made: Path) -> None:
        plan = [Planned(name, base.parameters(name, given)) for step in candidate.steps for name, given in step.items()]
        made.parent.mkdir(parents=True, exist_ok=True)
        run(self._source, plan, self._calibrating, made, partial(self._stage, "compress"), [], self._hear)

    def _hear(self, source: Checkpoint, clips: Sequence[Utterance]) -> list[Window]:
        """The calibration's windows: every candidate takes the same."""
        self._windows = self._windows or calibration.windows(source, clips)
        return self._windows

    def _artifact(self, candidate: Candidate) -> Artifact:
        from asr_core.artifact import Artifact
        from asr_core.checkpoint import Checkpoint

        final = self.artifact_folder(candidate)
        path = self.checkpoint(candidate)
        checkpoint = Checkpoint.open(str(path))
        for bench in self._benches.values():
            bench.children.add(checkpoint.fingerprint)
        if build.up_to_date(checkpoint, self._target, candidate.precision, final):
            return Artifact.open(final)
        return build.stage(checkpoint, self._target, candidate.precision, final, partial(self._stage, "export")).publish()

    def _anew(self, name: str, candidate: Candidate) -> Figures | None:
        artifact = self._artifact(candidate)
        shutil.rmtree(self._benches[name].work / artifact.path.name, ignore_errors=True)
        return self._measured(name, artifact)

    def _measured(self, name: str, artifact: Artifact) -> Figures | None:
        bench = self._benches[name]
        if not bench.reference_costs:
            bench.prepare()
        return figures_of(bench.judge(artifact.path), artifact.size_mb)

    def _stage(self, name: str, stage: str) -> None:
        self._tell(f"{name}: {stage}")


def figures_of(row: Row, size_mb: float) -> Figures | None:
    """The figures of a report's row; None where it has none."""
    if row.delta_wer is None or row.latency_p50_s is None or row.latency_p95_s is None:
        return None
    low = row.delta_wer_interval[0] if row.delta_wer_interval else row.delta_wer
    memory = float("nan") if row.peak_rss_mb is None else row.peak_rss_mb
    return Figures(size_mb, 100 * row.delta_wer, 100 * low, row.latency_p50_s, row.latency_p95_s, memory, row.status, row.reason)


def _spread(utterances: Sequence[Utterance], wanted: int) -> list[Utterance]:
    wanted = min(len(utterances), wanted)
    return [utterances[i * len(utterances) // wanted] for i in range(wanted)]
