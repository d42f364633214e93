"""One parity session: the data prepared once, PyTorch measured once, then any number of artifacts, each in its process."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from asr_core import artifact
from asr_core.artifact import MANIFEST, Artifact
from asr_core.build import FAILED, FAILED_REASON, PARTIAL, REPLACED
from asr_core.checkpoint import Checkpoint
from asr_core.errors import ArtifactError, GateError, UnavailableError
from asr_core.isolate import Outcome
from asr_core.tokens import TokenIds
from parity import calibration, compare, data, measure, modes, statistics, suite, weights, witness
from parity.calibration import Calibration
from parity.compare import Normalise, Row
from parity.measurers import Alone, Measurer, Request
from parity.resume import Kept

# Probes for the weights axis: enough to meet short, long and noisy clips, few enough to keep their logits on disk.
PROBES = 12
# A backend that takes this much longer than PyTorch did for the same work is stuck.
PATIENCE = 30
LEAST_TIMEOUT_S = 300.0
Progress = Callable[[str, str], None]


@dataclass
class Session:
    """A checkpoint, its utterances and PyTorch's own answers; ``work`` holds the files.

    ``gates`` names the set of bounds that judges (:func:`parity.compare.thresholds`); with ``parity``, the reference's own
    noise is measured too and bounds are derived from it. ``context`` holds what the report says beside the rows: the decode
    policy of every free-running figure, how the derived bounds came about, and what the intervals are. ``backends_s`` adds up
    the seconds that backends took to load and infer, without the start of their processes; ``features_s`` are those of the
    features, ``prepared_cpu_s`` is what this thread had computed when PyTorch was measured. ``progress`` is told the row's
    name and its stage. ``level`` is the extent of the failure-class suite, which belongs to ``parity`` alone; with ``full``
    the ecosystems' own clients testify too. ``measurer`` is who measures, this machine alone or a fleet.
    """

    checkpoint: Checkpoint
    utterances: list[data.Utterance]
    work: Path
    threads: int
    max_new_tokens: int | None = None
    gates: str = "parity"
    level: suite.Level = "quick"
    measurer: Measurer = field(default_factory=Alone)
    progress: Progress = lambda name, stage: None
    reference_costs: dict[str, Any] = field(default_factory=dict)
    reference_seconds: float = 0.0
    calibration: Calibration | None = None
    context: dict[str, Any] = field(default_factory=dict)
    backends_s: float = 0.0
    features_s: float = 0.0
    prepared_cpu_s: float = 0.0

    def __post_init__(self) -> None:
        self.kept = Kept(self.work)

    @property
    def reference(self) -> Path:
        """Where PyTorch's measurement lies."""
        return self.work / measure.REFERENCE

    def prepare(self) -> Row:
        """Compute the features and measure PyTorch; returns its row. Raises :class:`GateError` where PyTorch itself fails."""
        self.progress(measure.REFERENCE, "features")
        started = time.perf_counter()
        self.measurer.prepare(self.utterances, self.checkpoint.dims.n_mels, self.work)
        self.features_s = time.perf_counter() - started
        if self.gates == "parity":
            self._prepare_cases()
        outcome = self._measure(measure.REFERENCE, self.checkpoint.path, self.reference)
        if outcome.error is not None:
            raise outcome.error
        if outcome.status != "ok":
            raise GateError(f"PyTorch could not be measured ({outcome.status}): {outcome.reason}")
        self.reference_costs, self.reference_seconds = outcome.result, outcome.seconds
        decoded = measure.read_decoded(self.reference)
        self.utterances = [replace(one, duration=row["duration_s"]) for one, row in zip(self.utterances, decoded, strict=True)]
        if self.gates == "parity":
            self.calibration = calibration.calibrate(
                self.checkpoint.path,
                self.work / data.CASES,
                self.reference,
                self._probes(),
                threads=self.threads,
                timeout=self._timeout(),
                progress=lambda stage: self.progress(measure.REFERENCE, stage),
            )
            self.backends_s += self.calibration.own_s
        self.context = self._context()
        row = self._row(measure.REFERENCE, "fp32", self.reference, self.reference_costs)
        row = self._through_modes(row, self.reference_costs["modes"]) if self.gates == "parity" else row
        self.prepared_cpu_s = time.thread_time()
        return row

    def _prepare_cases(self) -> None:
        folder, n_mels = self.work / data.CASES, self.checkpoint.dims.n_mels
        folder.mkdir(exist_ok=True)
        data.prepare([self.utterances[i] for i in self._probes()], n_mels, folder)
        suite.prepare(self.utterances, n_mels, folder)
        modes.prepare(self.utterances, folder)

    def expect(self, paths: Iterable[Path]) -> None:
        """Let the measuring of artifact folders begin that :meth:`judge` will be asked about."""
        self.measurer.expect(self._expected(paths), self._timeout())

    def _expected(self, paths: Iterable[Path]) -> Iterator[Request]:
        for path in paths:
            with suppress(ArtifactError, UnavailableError):  # becomes its row
                self._check(opened := Artifact.open(path))
                folder = self.work / opened.name
                if not self.kept.has(folder, path):
                    yield self._request(opened.manifest.target, path, folder)

    def judge(self, path: Path) -> Row:
        """Measure one artifact folder and compare it; whatever happens to it becomes its row, never an exception."""
        target, precision = _name_of(path)
        if path.name.endswith(FAILED):
            reason = (path / FAILED_REASON).read_text(encoding="utf-8").strip() if (path / FAILED_REASON).exists() else ""
            return Row(target, precision, "fail", f"quarantined at export: {reason}")
        try:
            self._check(Artifact.open(path))
        except ArtifactError as error:
            return Row(target, precision, "fail", str(error))
        except UnavailableError as error:
            return Row(target, precision, "unavailable", str(error))
        folder = self.work / f"{target}-{precision}"
        outcome = self._measure(target, path, folder)
        if outcome.status != "ok":
            status = {"error": "unavailable" if isinstance(outcome.error, UnavailableError) else "crashed"}
            return Row(target, precision, status.get(outcome.status, outcome.status), outcome.reason)
        row = self._row(target, precision, folder, outcome.result)
        if self.gates != "parity":
            return row
        return self._through_modes(self._through_suite(row, outcome.result["suite"]), outcome.result["modes"])

    def judge_checkpoint(self, path: Path, name: str) -> Row:
        """Measure another checkpoint with PyTorch, one that was made from this session's; ``name`` stands for its precision."""
        folder = self.work / f"{measure.REFERENCE}-{name}"
        outcome = self._measure(measure.REFERENCE, path, folder)
        if outcome.status != "ok":
            return Row(measure.REFERENCE, name, "crashed" if outcome.status == "error" else outcome.status, outcome.reason)
        return self._row(measure.REFERENCE, name, folder, outcome.result)

    def testimony(self, row: Row, path: Path) -> list[Row]:
        """The rows of the target's production clients over a measured artifact; none where it has none, or nobody asked."""
        if self.level != "full" or row.token_match is None:
            return []
        folder, rows = self.work / f"{row.target}-{row.precision}", []
        for client in witness.clients(row.target):
            self.progress(f"{row.target}-{row.precision}", client)
            rows.append(witness.testify(client, row.precision, path, folder, self.utterances, self._probes(), self.threads))
        return rows

    def _through_suite(self, row: Row, results: suite.Results) -> Row:
        """The row with what the failure classes found; whatever they find fails it."""
        wrong = suite.judge(self.reference_costs["suite"], results, self._near_tie(row.precision))
        return _with_cases(replace(row, suite={}), wrong)

    def _through_modes(self, row: Row, results: modes.Results) -> Row:
        """The row with the figures of the other modes of transcription; a wrong mode, or a figure out of bounds, fails it."""
        truth = [self.utterances[i].boundaries for i in self._probes()[: modes.WINDOWS[self.level]]]
        judged = modes.judge(self.reference_costs["modes"], results, truth, self._near_tie(row.precision))
        figures = asdict(judged.figures)
        row = _with_cases(replace(row, **figures), judged.wrong)
        known = {name: value for name, value in figures.items() if value is not None}
        missed = [] if row.target == measure.REFERENCE else compare.misses(known, self.bounds(row.precision))
        return _failed(row, missed) if missed else row

    def _near_tie(self, precision: str) -> float | None:
        """The margin below which PyTorch is undecided; None for what doesn't owe PyTorch its very tokens."""
        bounds = self.bounds(precision)
        return bounds["near_tie"]["max"] if "breaks" in bounds else None

    def bounds(self, precision: str) -> compare.Bounds:
        """The gates of a precision: the typed ones, and those derived from the reference's noise where that was measured."""
        derived = self.calibration.bounds(precision) if self.calibration else {}
        return {**compare.thresholds(self.gates, precision), **derived}

    def _context(self) -> dict[str, Any]:
        tokens = TokenIds.read(self.checkpoint.path, self.checkpoint.generation, self.checkpoint.dims.n_text_ctx)
        languages = sorted({utterance.language for utterance in self.utterances})
        steps = (margin for row in measure.read_decoded(self.reference) for margin in row["margins"])
        return {
            "policy": measure.policy(tokens, languages, self.max_new_tokens),
            "calibration": self.calibration.document(steps) if self.calibration else None,
            "statistics": statistics.describe(),
        }

    def _timeout(self) -> float | None:
        """Seconds after which anything but the reference is stuck; none for the reference itself."""
        return max(LEAST_TIMEOUT_S, PATIENCE * self.reference_seconds) if self.reference_seconds else None

    def _probes(self) -> list[int]:
        return _spread(len(self.utterances), PROBES)

    def _check(self, opened: Artifact) -> None:
        if opened.manifest.fingerprint != self.checkpoint.fingerprint:
            raise ArtifactError(f"{opened.path} was made from other weights than {self.checkpoint.path}. Export again.")
        self.measurer.require(opened.manifest.target)

    def _measure(self, target: str, path: Path, folder: Path) -> Outcome:
        return self.kept.measured(folder, path, lambda: self._measure_anew(target, path, folder))

    def _measure_anew(self, target: str, path: Path, folder: Path) -> Outcome:
        request = self._request(target, path, folder)
        outcome = self.measurer.measure(request, lambda stage: self.progress(folder.name, stage), self._timeout())
        self.backends_s += outcome.own_s
        return outcome

    def _request(self, target: str, path: Path, folder: Path) -> Request:
        return Request(
            target=target,
            path=path,
            work=self.work,
            folder=folder,
            reference=None if folder == self.reference else self.reference,
            probes=tuple(self._probes()),
            threads=self.threads,
            max_new_tokens=self.max_new_tokens,
            level=self.level if self.gates == "parity" else None,
        )

    def _row(self, target: str, precision: str, folder: Path, measured: dict[str, Any]) -> Row:
        probes = weights.compare_probes(self.reference, folder)
        weights.save_positions(probes, folder)
        return compare.compare(
            target=target,
            precision=precision,
            reference=self.reference,
            candidate=folder,
            measured=measured,
            utterances=self.utterances,
            normalise=normaliser(self.checkpoint),
            probes=probes,
            bounds=self.bounds(precision),
        )


def _with_cases(row: Row, wrong: dict[str, str]) -> Row:
    """The row with more cases of the suite; any of them fails it."""
    if not wrong:
        return row
    return _failed(replace(row, suite=(row.suite or {}) | wrong), [f"{case}: {what}" for case, what in wrong.items()])


def _failed(row: Row, reasons: list[str]) -> Row:
    return replace(row, status="fail", reason="; ".join(filter(None, [row.reason, *reasons])))


def discover(root: Path, checkpoint: str) -> list[Path]:
    """The artifact folders of a checkpoint at or below ``root``, quarantined ones included, sorted.

    Raises :class:`ArtifactError` where there are none.
    """
    found = []
    for file in sorted(root.rglob(MANIFEST)):
        name = file.parent.name
        if PARTIAL in name or REPLACED in name:
            continue
        try:
            if artifact.read_manifest(file.parent).checkpoint == checkpoint:
                found.append(file.parent)
        except ArtifactError:
            found.append(file.parent)  # a damaged manifest is a row that fails, not a row less
    if not found:
        raise ArtifactError(f"{root} holds no artifacts of {checkpoint!r}. Make them: asr-export --target all")
    return found


def normaliser(checkpoint: Checkpoint) -> Normalise:
    """Whisper's text normalisers: the English one with the checkpoint's spelling map, the plain fold for other languages.

    Where the checkpoint carries no map, English is folded too.
    """
    import json

    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    spelling = checkpoint.path / "normalizer.json"
    fold = BasicTextNormalizer()
    english = EnglishTextNormalizer(json.loads(spelling.read_text(encoding="utf-8"))) if spelling.exists() else fold
    return lambda text, language: str((english if language == "en" else fold)(text)).strip()


def _name_of(path: Path) -> tuple[str, str]:
    """Target and precision: from the manifest, or from the folder's name where that is damaged."""
    try:
        manifest = artifact.read_manifest(path)
    except ArtifactError:
        target, _, precision = re.sub(rf"{re.escape(FAILED)}$", "", path.name).partition("-")
        return target, precision or "?"
    return manifest.target, manifest.precision


def _spread(count: int, wanted: int) -> list[int]:
    """``wanted`` indices spread evenly over ``count`` utterances."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]
