"""Faults planted into artifacts, and the stage that the localiser should name: ``python -m tests.faults --help``.

A fault of the network is planted into a copy of the checkpoint, which every target's own exporter then converts; the artifact is
judged against the unharmed checkpoint. The front end's and the token rules' are planted into the finished artifact.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

import reference
from asr_core import artifact, audio, build
from asr_core.artifact import MANIFEST
from asr_core.checkpoint import Checkpoint
from parity import localise as module
from parity.localise import Localiser, replay_here

TARGETS = ("onnx", "openvino", "tflite", "coreml", "ncnn", "ctranslate2")
CLIPS = reference.manifest_path().parent
HALF_HOP = 80  # samples: 5 ms


def scale_conv(weights: dict[str, Any]) -> None:
    """One of the convolutions 1.5 times as loud."""
    weights["model.encoder.conv1.weight"] *= 1.5


def swap_keys_and_values(weights: dict[str, Any]) -> None:
    """The projections of one layer's cross-attention, exchanged."""
    k, v = (f"model.decoder.layers.1.encoder_attn.{kind}_proj.weight" for kind in "kv")
    weights[k], weights[v] = weights[v].clone(), weights[k].clone()


def drop_norm(weights: dict[str, Any]) -> None:
    """One of the encoder's norms without its weight and bias."""
    weights["model.encoder.layers.1.self_attn_layer_norm.weight"][:] = 1
    weights["model.encoder.layers.1.self_attn_layer_norm.bias"][:] = 0


def shifted_mel(samples: Any, filters: Any) -> Any:
    """Features of the sound 5 ms later."""
    return audio.log_mel(np.concatenate([np.zeros(HALF_HOP, np.float32), samples])[: audio.WINDOW_SAMPLES], filters)


def rewrite_suppression(folder: Path) -> None:
    """Let an artifact suppress an ordinary word and no longer suppress what it should, wherever it says so; seal it again."""
    manifest = artifact.read_manifest(folder)
    kept = manifest.tokens.suppress[3:]
    word = next(token for token in range(300, manifest.dims.vocab) if token not in manifest.tokens.suppress)
    wrong = sorted([*kept, word])
    for name, key in (("generation_config.json", "suppress_tokens"), ("config.json", "suppress_ids")):
        file = folder / name
        content = json.loads(file.read_text()) if file.exists() else {}
        if key in content:
            file.write_text(json.dumps(content | {key: wrong}))
    tokens = manifest.tokens.model_copy(update={"suppress": wrong})
    sealed = manifest.model_copy(update={"tokens": tokens, "files": artifact.seal(folder)})
    (folder / MANIFEST).write_text(sealed.model_dump_json())


@dataclass(frozen=True)
class Fault:
    """A fault, where it sits, and by which stage a runtime that shows only ends of encoder and decoder can name it."""

    stage: str
    closed_stage: str
    spoil_weights: Callable[[dict[str, Any]], None] | None = None
    spoil_artifact: Callable[[Path], None] | None = None
    front_end: Callable[[Any, Any], Any] | None = None

    def expected(self, target: str) -> str:
        """The stage to be named."""
        return self.closed_stage if target == "ctranslate2" else self.stage


HEALTHY = "healthy"
FAULTS = {
    "scaled conv weight": Fault("encoder.stem", "encoder.states", spoil_weights=scale_conv),
    "swapped K/V": Fault("cross.1.keys", "logits", spoil_weights=swap_keys_and_values),
    "dropped layer norm": Fault("encoder.1.attention", "encoder.states", spoil_weights=drop_norm),
    "mel shifted by 5 ms": Fault("mel", "mel", front_end=shifted_mel),
    "wrong suppression list": Fault("choice", "choice", spoil_artifact=rewrite_suppression),
}


def spoiled_checkpoint(fault: Fault, folder: Path) -> Path:
    """A copy of the carried checkpoint with a fault of the network (or none)."""
    from safetensors.torch import load_file, save_file

    if folder.exists():
        return folder
    shutil.copytree(Checkpoint.open("reference").path, folder)
    if fault.spoil_weights:
        weights = load_file(folder / "model.safetensors")
        fault.spoil_weights(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def planted(name: str, target: str, precision: str, root: Path) -> Path:
    """The artifact with a fault, exported below ``root`` in this process unless it is there."""
    fault = FAULTS.get(name, Fault("", ""))
    kind = name if fault.spoil_weights else HEALTHY
    folder = root / kind.replace(" ", "-").replace("/", "") / f"{target}-{precision}"
    if not (folder / MANIFEST).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        source = spoiled_checkpoint(fault, folder.parent / "checkpoint")
        build.export_in_process(str(source), source.parent.name, target, precision, str(folder), lambda stage: None)
    if not fault.spoil_artifact:
        return folder
    spoiled = root / name.replace(" ", "-") / folder.name
    if not spoiled.exists():
        shutil.copytree(folder, spoiled)
        fault.spoil_artifact(spoiled)
    return spoiled


@contextmanager
def front_end_of(name: str) -> Iterator[None]:
    """Let the artifact's side compute its features as the fault does."""
    fault = FAULTS.get(name)
    if fault is None or fault.front_end is None:
        yield
        return
    original, module.log_mel = module.log_mel, fault.front_end
    try:
        yield
    finally:
        module.log_mel = original


def named_stage(name: str, folder: Path, clip: Path, localiser: Localiser) -> str | None:
    """The stage that the localiser names for an artifact with a fault; None where it names none."""
    with front_end_of(name):
        culprit = localiser.localise(folder, clip, replay=replay_here).culprit
    return culprit.name if culprit else None


@click.command()
@click.option("--runs", default=20, show_default=True, help="Runs of every cell, over different clips in turn.")
@click.option("--precision", default="fp32", show_default=True)
@click.option("--target", "targets", multiple=True, default=TARGETS, help="May be repeated.")
@click.option("--root", type=click.Path(path_type=Path), help="Keep the artifacts here, for the next time.")
def main(runs: int, precision: str, targets: tuple[str, ...], root: Path | None) -> None:
    """Print the planted-fault table: fault × backend → the stage that was named, and in how many runs it was the true one."""
    localiser = Localiser(Checkpoint.open("reference"))
    clips = [CLIPS / f"{name}.flac" for name in ("sentence-00", "paused-03", "short-05", "sentence-41")]
    wrong = 0
    print(f"| backend ({precision}) | fault | stage named | right |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for target in targets:
            for name in (HEALTHY, *FAULTS):
                started = time.perf_counter()
                folder = planted(name, target, precision, root or Path(scratch))
                expected = FAULTS[name].expected(target) if name in FAULTS else None
                named = [named_stage(name, folder, clips[run % len(clips)], localiser) for run in range(runs)]
                right = sum(stage == expected for stage in named)
                wrong += runs - right
                stages = ", ".join(sorted({stage or "none" for stage in named}))
                print(f"| {target} | {name} | {stages} | {right} of {runs} |", flush=True)
                click.echo(f"{target} {name}: {time.perf_counter() - started:.0f} s", err=True)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
