"""optimum-onnx over the checkpoint as it exports it itself; it wants an older transformers, so an environment of its own."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

PEER = "optimum-onnx"
OPENS = "checkpoint"
PRECISIONS = ("fp32",)
ENVIRONMENT = "ASR_EXPORT_OPTIMUM_PYTHON"


def open(folder: Path, precision: str, threads: int, scratch: Path) -> Any:
    """Its merged decoder with a cache, which is its default; exported once into ``scratch``."""
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForSpeechSeq2Seq
    from transformers import AutoTokenizer, WhisperFeatureExtractor

    torch.set_num_threads(threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    exported = scratch / "optimum"
    if not exported.exists():
        ORTModelForSpeechSeq2Seq.from_pretrained(folder, export=True, local_files_only=True).save_pretrained(exported)
    model = ORTModelForSpeechSeq2Seq.from_pretrained(exported, session_options=options, local_files_only=True)
    extractor = WhisperFeatureExtractor(model.config.num_mel_bins)
    # By its file: here the name is the library's.
    neighbour = runpy.run_path(str(Path(__file__).with_name("transformers.py")))
    return neighbour["hearing"](model, AutoTokenizer.from_pretrained(folder), extractor)
