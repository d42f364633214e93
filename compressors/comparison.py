"""Every recipe on every runtime that carries its form, judged on the same clips: what the comparison table is made of.

Everything that was made or measured stays below one folder under a name of its inputs, so that a run that was killed goes on,
and a recipe that is added costs only itself.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from asr_core import build, compressed, registry
from asr_core.artifact import Artifact
from asr_core.checkpoint import Checkpoint
from asr_core.errors import AsrExportError, StorageError, UsageError
from asr_core.isolate import Progress
from compressors import recipe as recipes
from compressors.base import METHODS
from compressors.calibration import windows
from compressors.lab import Bench
from compressors.model import Model
from compressors.recipe import Recipe
from compressors.run import run
from parity import provenance

if TYPE_CHECKING:
    from compressors.calibration import Window
    from parity.compare import Row
    from parity.data import Utterance

CODE = Path(__file__).parent
RECIPES = CODE / "recipes"
# Sources besides the methods' own that decide what a compressed checkpoint holds.
SHARED = (
    "calibration.py", "examples.py", "integers.py", "latent.py", "linears.py", "model.py", "obs.py", "ranges.py", "refit.py",
    "teacher.py", "training.py",
)  # fmt: skip
ORIGINAL = "original"
PYTORCH = "pytorch"
PLAIN = "fp32"
# The figures of a line that are measured, and kept.
MEASURED = ("kl", "wer", "delta_wer", "interval", "cer", "identical", "seconds", "peak_rss_mb")
Tell = Callable[[str, str], None]


@dataclass(frozen=True)
class Line:
    """One artifact of one recipe; ``recipe`` is its file's name, ``artifact`` as ``onnx-int4``, ``path`` what a runner opens.

    Sizes are MB (10⁶ bytes): ``body`` and ``embedding`` what the weights' compact form takes up, ``size`` the shipped files, of
    which PyTorch's are dense. Rates are fractions, ``kl`` nats a token to the original
    with PyTorch on its own tokens, ``seconds`` the mean of an utterance. ``problem`` says why there are no figures.
    """

    recipe: str
    title: str
    methods: list[str]
    artifact: str
    path: str = ""
    problem: str = ""
    body_mb: float | None = None
    embedding_mb: float | None = None
    size_mb: float | None = None
    kl: float | None = None
    wer: float | None = None
    delta_wer: float | None = None
    interval: list[float] | None = None
    cer: float | None = None
    identical: float | None = None
    seconds: float | None = None
    peak_rss_mb: float | None = None

    @property
    def target(self) -> str:
        """The artifact's target."""
        return self.artifact.partition("-")[0]


@dataclass(frozen=True)
class Sets:
    """The clips to calibrate on, and others to judge on."""

    calibrating: Sequence[Utterance]
    judging: Sequence[Utterance]


class Comparison:
    """Makes and measures, everything below ``root``."""

    def __init__(self, source: Checkpoint, sets: Sets, root: Path, threads: int, tell: Tell) -> None:
        self._source, self._sets, self._root, self._tell = source, sets, root, tell
        judging = provenance.digest(list(sets.judging))
        self._inputs = [source.fingerprint, judging, threads]
        work = root / "measured" / _digest(*self._inputs)
        work.mkdir(parents=True, exist_ok=True)
        self._bench = Bench(source, list(sets.judging), work, threads, gates="search", progress=tell)
        self._prepared: Row | None = None
        self._windows: list[Window] = []

    def original(self, targets: Sequence[str]) -> list[Line]:
        """The source itself with PyTorch and as a plain artifact of each target."""
        plain = Recipe("the original", [], [f"{PYTORCH}-{PLAIN}", *(f"{target}-{PLAIN}" for target in targets)])
        return self._lines(ORIGINAL, plain, self._source)

    def lines(self, file: Path, *, pytorch: bool) -> list[Line]:
        """A recipe's artifacts, or its checkpoint with PyTorch; what cannot be made is a line that says why."""
        try:
            recipe = recipes.read_whole(file)
        except UsageError as error:
            return [] if pytorch else [Line(file.stem, file.stem, [], PYTORCH, problem=_sentence(error))]
        try:
            made = self._checkpoint(file.stem, recipe)
        except StorageError:
            raise
        except AsrExportError as error:
            return [] if pytorch else [Line(file.stem, recipe.title, _methods(recipe), PYTORCH, problem=_sentence(error))]
        return self._lines(file.stem, replace(recipe, artifacts=[f"{PYTORCH}-{PLAIN}"]) if pytorch else recipe, made)

    def _lines(self, name: str, recipe: Recipe, checkpoint: Checkpoint) -> list[Line]:
        record = compressed.read(checkpoint.path)
        size = record.after if record else Model.open(checkpoint).size
        begun = Line(name, recipe.title, _methods(recipe), "")
        begun = replace(begun, body_mb=size.body_bytes / 1e6, embedding_mb=size.embedding_bytes / 1e6)
        made = []
        for artifact in recipe.artifacts:
            line = replace(begun, artifact=artifact)
            try:
                made.append((self._pytorch if line.target == PYTORCH else self._artifact)(line, checkpoint))
            except StorageError:
                raise
            except AsrExportError as error:
                made.append(replace(line, problem=_sentence(error)))
        return made

    def _checkpoint(self, name: str, recipe: Recipe) -> Checkpoint:
        """The recipe's checkpoint, made unless it is there; its name stands for the recipe, the methods' code and the clips."""
        steps = [[step.method, step.parameters.model_dump(mode="json")] for step in recipe.steps]
        sources = [*(registry.source(METHODS, step.method) for step in recipe.steps), *map(CODE.joinpath, SHARED)]
        code = [source.read_text(encoding="utf-8") for source in sources]
        clips = provenance.digest(list(self._sets.calibrating))
        out = self._root / "checkpoints" / f"{name}-{_digest(self._source.fingerprint, steps, code, clips)}"
        if not out.exists():
            self._tell(name, "compress")
            out.parent.mkdir(parents=True, exist_ok=True)
            told: Progress = lambda stage: self._tell(name, stage)  # noqa: E731
            run(self._source, recipe.steps, self._sets.calibrating, out, told, [], self._heard)
        return Checkpoint.open(str(out))

    def _heard(self, source: Checkpoint, clips: Sequence[Utterance]) -> list[Window]:
        """The calibration's windows: every recipe takes the same."""
        self._windows = self._windows or windows(source, clips)
        return self._windows

    def _artifact(self, line: Line, checkpoint: Checkpoint) -> Line:
        target, _, precision = line.artifact.partition("-")
        final = self._root / "artifacts" / f"{line.recipe}-{checkpoint.fingerprint[:12]}" / line.artifact
        if not build.up_to_date(checkpoint, target, precision, final):
            self._tell(line.recipe, f"{line.artifact}: export")
            build.stage(checkpoint, target, precision, final, lambda stage: self._tell(line.recipe, stage)).publish()
        opened = Artifact.open(final)
        seal = {entry.path: entry.sha256 for entry in opened.manifest.files}
        self._bench.children.add(checkpoint.fingerprint)
        line = replace(line, path=str(final), size_mb=opened.size_mb)
        return self._measured(line, [seal], lambda: self._ready().judge(final))

    def _pytorch(self, line: Line, checkpoint: Checkpoint) -> Line:
        size = sum(file.stat().st_size for file in checkpoint.path.glob("model*.safetensors")) / 1e6
        line = replace(line, path=str(checkpoint.path), size_mb=size)
        return self._measured(line, [checkpoint.fingerprint], lambda: self._of_pytorch(line, checkpoint))

    def _of_pytorch(self, line: Line, checkpoint: Checkpoint) -> Row:
        bench = self._ready()
        if line.recipe == ORIGINAL and self._prepared:
            return self._prepared
        return bench.judge_checkpoint(checkpoint.path, line.recipe)

    def _ready(self) -> Bench:
        if self._prepared is None:
            self._prepared = self._bench.prepare()
        return self._bench

    def _measured(self, line: Line, seal: Sequence[object], measure: Callable[[], Row]) -> Line:
        file = self._root / "lines" / f"{line.recipe}.{line.artifact}.json"
        key = _digest(*self._inputs, *seal)
        if file.exists() and (known := json.loads(file.read_text(encoding="utf-8")))["key"] == key:
            figures = {name: known["line"][name] for name in MEASURED}
            return replace(line, **figures)
        self._tell(line.recipe, f"{line.artifact}: measure")
        row = measure()
        if row.wer is None:
            return replace(line, problem=f"{row.status}: {row.reason}")
        line = self._filled(line, row)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"key": key, "line": asdict(line)}, indent=1), encoding="utf-8")
        partial.replace(file)
        shutil.rmtree(self._bench.work / line.artifact, ignore_errors=True)
        return line

    def _filled(self, line: Line, row: Row) -> Line:
        audio = sum(utterance.duration for utterance in self._bench.utterances) / len(self._bench.utterances)
        return replace(
            line,
            wer=row.wer,
            delta_wer=row.delta_wer,
            interval=row.delta_wer_interval,
            cer=row.cer,
            kl=row.logits_kl_mean,
            identical=row.token_match,
            seconds=audio / row.rtfx if row.rtfx else None,
            peak_rss_mb=row.peak_rss_mb,
        )


def files(chosen: Sequence[Path]) -> list[Path]:
    """The chosen recipe files, or all that this project brings."""
    return list(chosen) or sorted(RECIPES.glob("*.yaml"))


def targets(chosen: Sequence[Path]) -> list[str]:
    """Every target that a recipe has artifacts of."""
    named = []
    for file in chosen:
        try:
            named += [artifact.partition("-")[0] for artifact in recipes.read_whole(file).artifacts]
        except UsageError:
            continue  # its line will say so
    return sorted(set(named))


def _sentence(error: AsrExportError) -> str:
    """Its last line: before it may stand a traceback of a process of its own."""
    return str(error).strip().splitlines()[-1]


def _methods(recipe: Recipe) -> list[str]:
    return [step.method for step in recipe.steps]


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
