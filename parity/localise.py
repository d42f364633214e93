"""Which stage of an artifact goes wrong: one clip through the shipped graphs and through PyTorch, stage by stage."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from asr_core import isolate
from asr_core.artifact import Artifact
from asr_core.audio import load_audio, log_mel
from asr_core.decode import DecodeOptions, filters_for
from asr_core.errors import UsageError
from asr_core.tokens import TokenIds, load_tokenizer
from asr_core.transcribe import Bundle
from runners._stages import CHOICE, LOGITS, MEL, Values, open_staged, order

if TYPE_CHECKING:
    from asr_core.checkpoint import Checkpoint
    from parity.stages import Expected, Oracle

Array = NDArray[np.float32]

CLIENT_MEL = "mel.client"
# What a stage may err by itself, as a share of what it makes (see own_error), by precision. Beside each, the largest that any
# stage of a healthy artifact of the carried checkpoint showed on one to eight clips; a stage broken on purpose showed 2.1.
BOUNDS = {
    "fp32": 1e-4,  # 8e-6; longer sums of larger models round more often, but only with the square root of their length
    "fp16": 2e-2,  # 8e-3, where activations are halves, too: a stream ten times larger than what a block adds rounds at 2⁻¹¹
    # 0.09; eight bits a tensor or a row leave 1/254 of its largest number, which outliers make 20 times the usual. A layer's
    # exchanged keys and values showed 0.16 where logits stand for the whole decoder (CTranslate2).
    "int8": 0.14,
    "int4": 0.5,  # 0.33; weights of 4 bits err by a tenth, which attention in the encoder makes three times as much
    "palette8": 0.14,  # as for int8
    "palette6": 0.25,  # 0.05; like int8: 64 values for a whole tensor, outliers among them
    "palette4": 0.4,  # 0.21; 16 values for 16 rows that share them
}
LOOSEST = max(BOUNDS.values())
# The front end computes in float32 whatever the artifact holds: 4e-7 apart on clips.
MEL_BOUND = 1e-4
# Of the largest logit: as much lower a chosen token may be than the best one, since a runtime that decodes by itself need not
# repeat its last bits when it is asked again.
TIE = 1e-4
TINY = 1e-30  # instead of a division by zero
NAMES = {
    MEL: "mel",
    CLIENT_MEL: "mel (preprocessor_config.json)",
    CHOICE: "token choice",
    "encoder.stem": "conv stem",
    "encoder.states": "encoder states",
    "decoder.embedding": "token embedding",
    LOGITS: "logits",
}


@dataclass(frozen=True)
class Stage:
    """A stage's distance from the reference: of its output, and of what it makes of its own input.

    ``error`` is the relative L2 distance of what left the stage, in the decoder at the step of divergence; ``own`` is judged by
    ``bound``: see :func:`own_error`. Both are None where the runtime doesn't show the stage.
    """

    name: str
    error: float | None
    own: float | None
    bound: float

    @property
    def out(self) -> bool:
        """Whether the stage does something else than the reference's."""
        return self.own is not None and self.own > self.bound

    @property
    def title(self) -> str:
        """The stage in words."""
        return title(self.name)


@dataclass(frozen=True)
class Localised:
    """One clip through one artifact, stage by stage.

    ``step`` is the first of the transcript's tokens that differs from the reference's, None where none does; ``chosen`` are
    the two tokens there, the artifact's first. ``remarks`` are sentences.
    """

    artifact: str
    clip: str
    stages: list[Stage]
    step: int | None
    chosen: tuple[str, str] | None
    remarks: list[str]

    @property
    def culprit(self) -> Stage | None:
        """The first stage out of bounds."""
        return next((stage for stage in self.stages if stage.out), None)


@dataclass(frozen=True)
class Replay:
    """What an artifact did with a clip.

    ``mel`` [n_mels, 3000], its own transcript's ``tokens``, those that were then ``fed`` (prompt included), the ``values`` that
    the stages showed, and ``hidden``, a sentence on those that its runtime does not show.
    """

    mel: Array
    tokens: list[int]
    fed: list[int]
    values: Values
    hidden: str


def title(name: str) -> str:
    """A stage in words: ``cross.0.keys`` → ``cross-attention keys, layer 0``."""
    if name in NAMES:
        return NAMES[name]
    part, layer, what = name.split(".")
    if part == "cross":
        return f"cross-attention {what}, layer {layer}"
    block = {"attention": "self-attention", "cross": "cross-attention", "mlp": "feed-forward"}[what]
    return f"{part} layer {layer}, {block}"


class Localiser:
    """The reference, opened once for any number of artifacts and clips."""

    def __init__(self, checkpoint: Checkpoint, threads: int = 1) -> None:
        from parity.stages import Oracle
        from runners import _stages_pytorch

        self._checkpoint = checkpoint
        self._threads = threads
        self._oracle = Oracle(checkpoint)
        self._reference = _stages_pytorch.open(checkpoint.path, threads)
        self._tokenizer = load_tokenizer(checkpoint.path)

    def localise(self, path: Path, clip: Path, *, language: str = "en", replay: Callable[..., Replay] | None = None) -> Localised:
        """Replay a clip of at most 30 s through an artifact and through PyTorch.

        ``replay`` is :func:`replay_here`, or by default the same in a process of its own, where a runtime that crashes costs
        nothing else. Raises :class:`UsageError` for an artifact of a model of other sizes, and what opening it raises.
        """
        from runners import _stages_pytorch

        artifact = Artifact.open(path)
        remarks = _origin(artifact, self._checkpoint)
        reference, ids = self._reference, cast("TokenIds", self._reference.runner.tokens)
        samples = load_audio(clip)
        mel = _stages_pytorch.features(samples, self._checkpoint.dims.n_mels)
        prompt = ids.prompt(language)
        wanted = reference.runner.generate(mel[None], DecodeOptions(language=language))[0].tokens
        made = (replay or replay_apart)(path, clip, prompt, wanted, self._threads, language)
        distance = _distance(made.mel, mel)
        choice, differences = _choice(artifact, ids, made, len(prompt))
        stages = [
            Stage(MEL, distance, distance, MEL_BOUND),
            _client_mel(samples, mel, path),
            *_network_stages(self._oracle, reference.replay(mel[None], made.fed), made, artifact),
            choice,
        ]
        step = divergence(made.tokens, wanted)
        chosen = None if step is None else (self._token(made.tokens, step), self._token(wanted, step))
        return Localised(artifact.name, clip.name, stages, step, chosen, [*remarks, *differences, *filter(None, [made.hidden])])

    def _token(self, tokens: list[int], step: int) -> str:
        """A token of a transcript, or the end after its last, as it is written."""
        return str(self._tokenizer.id_to_token([*tokens, self._reference.runner.tokens.end][step]))


def divergence(tokens: list[int], wanted: list[int]) -> int | None:
    """The first position at which two transcripts differ (one may have ended there); None where none does."""
    pairs = enumerate(zip(tokens, wanted, strict=False))
    shorter = None if len(tokens) == len(wanted) else min(len(tokens), len(wanted))
    return next((i for i, (a, b) in pairs if a != b), shorter)


# --- the artifact's side


def replay_here(path: Path, clip: Path, prompt: list[int], wanted: list[int], threads: int, language: str) -> Replay:
    """Decode a clip freely, then replay it with the reference's tokens up to where the artifact leaves them."""
    artifact = Artifact.open(path)
    mel = log_mel(load_audio(clip), Bundle.read(path).filters)
    staged = open_staged(artifact.manifest.target, path, threads)
    tokens = staged.runner.generate(mel[None], DecodeOptions(language=language))[0].tokens
    step = divergence(tokens, wanted)
    fed = [*prompt, *wanted[:step]]
    made = Replay(mel, tokens, fed, staged.replay(mel[None], fed), staged.hidden)
    staged.runner.close()
    return made


def replay_apart(path: Path, clip: Path, prompt: list[int], wanted: list[int], threads: int, language: str) -> Replay:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="asr-parity-") as folder:
        given = {"path": str(path), "clip": str(clip), "prompt": prompt, "wanted": wanted, "threads": threads}
        outcome = isolate.run(
            "parity.localise:replay_in_process", given | {"language": language, "folder": folder}, threads=threads
        )
        told = isolate.result_or_raise(outcome, f"replaying {clip.name} through {path.name}")
        with np.load(Path(folder) / "values.npz", allow_pickle=False) as arrays:
            values = dict(arrays)
    return Replay(values.pop(MEL), told["tokens"], told["fed"], values, told["hidden"])


def replay_in_process(
    path: str, clip: str, prompt: list[int], wanted: list[int], threads: int, language: str, folder: str
) -> dict[str, Any]:
    """:func:`replay_here` for :mod:`asr_core.isolate`: arrays go to ``values.npz`` in ``folder``."""
    made = replay_here(Path(path), Path(clip), prompt, wanted, threads, language)
    np.savez(Path(folder) / "values.npz", allow_pickle=False, **{MEL: made.mel}, **made.values)
    return {"tokens": made.tokens, "fed": made.fed, "hidden": made.hidden}


# --- judging


def own_error(shown: Array, expected: Expected) -> float:
    """How far a stage is from what it should have made of its input: the worst row, as a share of what is made there.

    A block of a residual stream is judged on what it adds. Rows in which little is made (silence) are measured by the root
    mean square of all rows. What is not a number is infinitely far away.
    """
    value, carried = expected.value[-len(shown) :], expected.carried[-len(shown) :]
    far = np.linalg.norm(shown - value, axis=-1)
    sizes = np.linalg.norm(value - carried, axis=-1)
    typical = float(np.sqrt(np.mean(sizes**2)))
    if not np.isfinite(far).all():
        return float("inf")
    return float((far / np.maximum(sizes, max(typical, TINY))).max())


def _distance(made: Array, wanted: Array) -> float:
    """Relative L2 distance; what is not a number is infinitely far away."""
    distance = float(np.linalg.norm(made - wanted)) / max(float(np.linalg.norm(wanted)), TINY)
    return distance if np.isfinite(distance) else float("inf")


def _network_stages(oracle: Oracle, reference: Values, made: Replay, artifact: Artifact) -> Iterator[Stage]:
    bound = BOUNDS.get(artifact.manifest.precision.removesuffix("-stateful"), LOOSEST)
    expected = {e.stage: e for e in oracle.expected(made.mel[None], made.fed, made.values)}
    for name in order(artifact.manifest.dims):
        shown = made.values.get(name)
        if shown is None:
            yield Stage(name, None, None, bound)
            continue
        steps = name.startswith("decoder.") or name == LOGITS
        error = _distance(shown[-1], reference[name][-1]) if steps else _distance(shown, reference[name])
        yield Stage(name, error, own_error(shown, expected[name]), bound)


def _client_mel(samples: Array, mel: Array, path: Path) -> Stage:
    """The features that clients compute by themselves, from what the bundle tells them."""
    from runners import _stages_pytorch

    theirs = _stages_pytorch.features(samples, len(mel), path)
    error = _distance(theirs, mel) if theirs.shape == mel.shape else float("inf")
    return Stage(CLIENT_MEL, error, error, MEL_BOUND)


def _choice(artifact: Artifact, ids: TokenIds, made: Replay, prompt: int) -> tuple[Stage, list[str]]:
    """The rules by which a token is chosen: how they are written, and what came of them, as the share of either that is wrong."""
    written = list(_written_rules(artifact))
    wrong = {where: rules ^ _rules(ids.suppress, ids.begin_suppress) for where, rules in written}
    entries = max(len(ids.suppress) + len(ids.begin_suppress), 1)
    shares = [len(difference) / entries for difference in wrong.values()]
    remarks = [
        f"{where} differs from the checkpoint's suppression lists in {len(difference)} tokens: {_some(difference)}"
        for where, difference in wrong.items()
        if difference
    ]
    if LOGITS in made.values:
        logits = made.values[LOGITS]
        actual = [*made.tokens, ids.end][: len(made.fed) - prompt + 1]
        rows = zip(logits[-len(actual) :], actual, strict=True)
        bad = sum(not _best(row, actual[:position], token, ids) for position, (row, token) in enumerate(rows))
        shares.append(bad / len(actual))
        if bad:
            remarks.append(f"{bad} of {len(actual)} tokens are not those that the checkpoint's rules choose from these logits")
    share = max(shares)
    return Stage(CHOICE, share, share, 0.0), remarks


def _best(logits: Array, before: list[int], token: int, ids: TokenIds) -> bool:
    """Whether the reference's rules allow the token and prefer no other."""
    allowed = logits[None].copy()
    for logit_filter in filters_for(ids):
        logit_filter.apply(allowed, [before])
    return bool(allowed[0, token] >= allowed.max() - TIE * np.abs(logits).max())


def _written_rules(artifact: Artifact) -> Iterator[tuple[str, set[tuple[str, int]]]]:
    """Every place in an artifact that says which tokens are suppressed: our runners', our bundle's, and CTranslate2's own."""
    tokens = artifact.manifest.tokens
    yield "the manifest", _rules(tokens.suppress, tokens.begin_suppress)
    for file, keys in (
        ("generation_config.json", ("suppress_tokens", "begin_suppress_tokens")),
        ("config.json", ("suppress_ids", "suppress_ids_begin")),
    ):
        path = artifact.path / file
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if file == "generation_config.json" or keys[0] in content:
            yield file, _rules(content.get(keys[0]) or [], content.get(keys[1]) or [])


def _rules(suppress: list[int], begin: list[int]) -> set[tuple[str, int]]:
    return {("always", token) for token in suppress} | {("at the beginning", token) for token in begin}


def _some(rules: set[tuple[str, int]], most: int = 5) -> str:
    shown = [f"{token} ({when})" for when, token in sorted(rules)[:most]]
    return ", ".join(shown) + (", …" if len(rules) > most else "")


def _origin(artifact: Artifact, checkpoint: Checkpoint) -> list[str]:
    """Raise :class:`UsageError` where a comparison makes no sense; remark where it is one with another checkpoint."""
    manifest = artifact.manifest
    if manifest.dims != checkpoint.dims:
        raise UsageError(f"{artifact.path} is a model of other sizes than {checkpoint.name}: give its checkpoint with --model.")
    if manifest.fingerprint == checkpoint.fingerprint:
        return []
    return [f"this artifact was made from another checkpoint ({manifest.checkpoint}) than {checkpoint.name}"]
