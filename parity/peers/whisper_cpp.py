"""whisper.cpp in float16, through pywhispercpp, over the checkpoint as the script of a checkout of whisper.cpp converts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PEER = "whisper.cpp"
OPENS = "checkpoint"
PRECISIONS = ("fp16",)
ENVIRONMENT = "ASR_EXPORT_PEERS_PYTHON"
CHECKOUT = "ASR_EXPORT_WHISPER_CPP"
VOCABULARIES = (51_864, 51_865, 51_866)


def open(folder: Path, precision: str, threads: int, scratch: Path) -> Any:
    """Greedy, without fallback, context or timestamps; its tokens are OpenAI's, so a checkpoint with others is not for it."""
    import _pywhispercpp as whisper

    if json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"] not in VOCABULARIES:
        raise ValueError("it knows OpenAI's vocabularies only")
    context = whisper.whisper_init_from_file_with_params(
        str(_converted(folder, scratch)), whisper.whisper_context_default_params()
    )

    def hear(samples: Any, language: str, tokens: int | None) -> tuple[str, int]:
        params = whisper.whisper_full_default_params(whisper.whisper_sampling_strategy.WHISPER_SAMPLING_GREEDY)
        params.n_threads = threads
        params.language = language
        params.no_context = params.single_segment = params.no_timestamps = True
        params.print_progress = params.print_realtime = params.print_timestamps = False
        params.temperature_inc = 0.0
        params.max_tokens = (tokens or 1) - 1  # it makes one more; 0 is no bound
        if whisper.whisper_full(context, params, samples, len(samples)):
            raise RuntimeError("whisper.cpp failed")
        segments = range(whisper.whisper_full_n_segments(context))
        end = whisper.whisper_token_eot(context)
        made = [
            whisper.whisper_full_get_token_id(context, segment, index)
            for segment in segments
            for index in range(whisper.whisper_full_n_tokens(context, segment))
        ]
        said = b"".join(whisper.whisper_full_get_segment_text(context, segment) for segment in segments)
        return said.decode(errors="replace").strip(), sum(token < end for token in made)

    return hear


def _converted(folder: Path, scratch: Path) -> Path:
    """The model in whisper.cpp's format, made once in ``scratch``."""
    checkout = os.environ.get(CHECKOUT)
    if not checkout:
        raise ValueError(f"{CHECKOUT} names no checkout of whisper.cpp, whose script converts the model")
    import whisper

    target = scratch / "ggml-model.bin"
    if target.exists():
        return target
    source = scratch / "checkpoint"
    source.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (source / file.name).unlink(missing_ok=True)
        (source / file.name).symlink_to(file.absolute())
    # What transformers no longer writes and the script wants.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps({"max_length": config["max_target_positions"]} | config), encoding="utf-8")
    if not (source / "added_tokens.json").exists():
        (source / "added_tokens.json").write_text("{}", encoding="utf-8")
    script = Path(checkout) / "models" / "convert-h5-to-ggml.py"
    command = [sys.executable, str(script), str(source), str(Path(whisper.__file__).parents[1]), str(scratch)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target
