"""The alignment heads of an export: the checkpoint's own, given ones, or found by listening."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asr_core.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from asr_core.align import AlignRequest
    from asr_core.checkpoint import Checkpoint
    from asr_core.decode import Mel
    from asr_core.isolate import Progress
    from parity.data import Utterance
    from runners.pytorch import PyTorchRunner

OWN, DISCOVER = "checkpoint", "discover"
FOUND = "alignment-heads.json"
CLIPS = 12  # that heads are judged on: more do not change the choice
FEWEST_TOKENS = 3  # of a clip that can tell anything


def choose(checkpoint: Checkpoint, asked: str, source: Path | None, out: Path) -> Checkpoint:
    """The checkpoint with the alignment heads that the user asked for; its files stay as they are.

    Raises :class:`UsageError` for a list that is none, :class:`~asr_core.errors.CheckpointError` for heads that the model lacks.
    """
    from asr_core import heads

    if asked == OWN:
        return checkpoint
    chosen = _discover(checkpoint, source, out / checkpoint.name / FOUND) if asked == DISCOVER else heads.parse(asked)
    changed = checkpoint.with_alignment_heads(chosen)
    _ = changed.alignment_heads  # raises where the model has no such heads
    return changed


def _discover(checkpoint: Checkpoint, source: Path | None, file: Path) -> list[tuple[int, int]]:
    """Find the heads by listening to clips, or read what was found with the same model and clips before."""
    import numpy as np

    import reference
    from asr_core import heads, isolate, registry
    from asr_export.cli import stage_progress
    from parity import data

    registry.require("pytorch", "export")
    utterances = data.read(source or reference.manifest_path())
    clips = utterances[:: max(1, len(utterances) // CLIPS)][:CLIPS]
    key = _key(checkpoint, clips)
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if found.get("key") != key:
        with stage_progress() as progress:
            bar = progress.add_task("alignment heads", total=None, stage="open")
            outcome = isolate.run(
                "asr_export.heads:listen",
                {"checkpoint": str(checkpoint.path), "clips": [[str(clip.path), clip.language] for clip in clips]},
                progress=lambda stage: progress.update(bar, stage=stage),
            )
            found = isolate.result_or_raise(outcome, "the search for alignment heads") | {"key": key}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    every = [(layer, head) for layer, head in found["heads"]]
    agreements = dict(zip(every, found["agreements"], strict=True))
    chosen = heads.choose(every, np.array(found["agreements"]))
    shown = ", ".join(f"{layer}:{head} ({agreements[layer, head]:.2f})" for layer, head in chosen)
    click.echo(f"alignment heads: {shown}, of {len(every)}, by agreement with what {len(clips)} clips are heard from ({file})")
    return chosen


def _key(checkpoint: Checkpoint, clips: Sequence[Utterance]) -> str:
    """What decides the outcome: the model and the clips."""
    digest = hashlib.sha256(checkpoint.fingerprint.encode())
    for clip in clips:
        try:
            digest.update(clip.path.read_bytes() + clip.language.encode())
        except OSError as error:
            raise UsageError(f"{clip.path}: {error.strerror}.") from error
    return digest.hexdigest()


def listen(checkpoint: str, clips: list[list[str]], progress: Progress) -> dict[str, Any]:
    """Every head and its mean agreement; runs inside the isolated process.

    Each clip's first window is transcribed; what was heard is what the heads are judged by.
    """
    import numpy as np

    from asr_core import audio
    from asr_core.align import AlignRequest
    from asr_core.decode import DecodeOptions
    from runners import pytorch

    runner = pytorch.open(Path(checkpoint), 1)
    filters = audio.mel_filters(runner.dims.n_mels)
    agreements = []
    for path, language in clips:
        progress(Path(path).name)
        samples = audio.load_audio(Path(path))[: audio.WINDOW_SAMPLES]
        mel = audio.log_mel(samples, filters)[None]
        options = DecodeOptions(language=language if runner.tokens.languages else "en")
        text = runner.generate(mel, options)[0].tokens
        if len(text) < FEWEST_TOKENS:
            continue
        request = AlignRequest(0, tuple(text), len(samples) // audio.HOP, options.language)
        agreements.append(judge(runner, mel, request))
    if not agreements:
        raise UsageError(f"the model says nothing in {len(clips)} clips, so its heads cannot be judged: give others (--data).")
    return {"heads": every_head(runner), "agreements": np.mean(agreements, axis=0).tolist()}


def every_head(runner: PyTorchRunner) -> list[tuple[int, int]]:
    """Layer and head, all of the decoder's."""
    return [(layer, head) for layer in range(runner.dims.decoder_layers) for head in range(runner.dims.decoder_heads)]


def judge(runner: PyTorchRunner, mel: Mel, request: AlignRequest) -> NDArray[np.float64]:
    """How far each of the decoder's heads looks where a window's tokens are heard, [heads]."""
    import numpy as np

    from asr_core import align
    from asr_core.heads import agreement

    runner.alignment_heads = every_head(runner)
    forced = align.forced_tokens(runner.tokens, request)
    scores, _ = runner.cross_attention(np.array([forced], np.int64), runner.encode(mel))
    first = len(forced) - len(request.tokens) - 2  # the input that predicts the first token of the text
    rows = slice(first, first + len(request.tokens))
    return agreement(scores[:, rows], runner.evidence(mel, forced)[rows], request)
