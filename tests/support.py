"""What several test modules share."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from parity import provenance


def run_command(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of the console scripts as a user would."""
    command = [str(Path(sys.executable).with_name(name)), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=1200, env=os.environ | {"COLUMNS": "250"} | environment
    )


def report(
    *,
    rows: int = 1,
    threads: int = 1,
    cores: int = 2,
    fingerprint: str = "f" * 64,
    data: str = "d" * 64,
    resumed: bool = False,
    system: str = "Linux",
    **row: Any,
) -> dict[str, Any]:
    """A report as asr-parity writes it, of ``rows`` healthy artifacts; ``row`` changes their figures."""
    host = {
        "system": system,
        "machine": "x86_64",
        "processor": "Some CPU",
        "cores": cores,
        "python": "3.11.7",
        "threads": threads,
    }
    figures = {
        "target": "onnx",
        "precision": "fp32",
        "status": "pass",
        "reason": "",
        "decoder": "step",
        "encoder_max_abs": 6e-6,
        "logits_max_abs": 4e-5,
        "top1_agreement": 1.0,
        "token_match": 1.0,
        "near_ties": 0,
        "first_divergence": None,
        "wer": 0.025,
        "delta_wer": 0.0,
        "cer": 0.014,
        "rtfx": 100.0,
        "latency_p50_s": 0.05,
        "latency_p95_s": 0.1,
        "ttft_s": 0.05,
        "tokens_per_s": 2000.0,
        "load_s": 1.0,
        "peak_rss_mb": 200.0,
        "size_mb": 7.6,
        "speedup": 2.0,
    }
    return {
        "schema": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "commit": None,
        "versions": {"numpy": "2"},
        "checkpoint": {"name": "reference", "fingerprint": fingerprint},
        "host": host | {"identity": provenance.identity(host)},
        "data": {"utterances": 110, "audio_s": 514.391, "digest": data},
        "resumed": resumed,
        "rows": [figures | row for _ in range(rows)],
    }  # fmt: skip


def listen_louder(weights: dict[str, Any]) -> None:
    """Make what random weights of the mini shape choose depend on the place and the sound, in place."""
    weights["model.decoder.embed_positions.weight"] *= 50
    for name in ("conv1", "conv2"):
        weights[f"model.encoder.{name}.weight"] *= 20
    for layer in range(2):
        for name in ("v_proj", "out_proj"):
            weights[f"model.decoder.layers.{layer}.encoder_attn.{name}.weight"] *= 8
