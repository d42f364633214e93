"""sherpa-onnx itself over the artifact in its layout, in a process of its own: it brings an ONNX Runtime of its own."""

import json
import subprocess
import sys

import numpy as np
import pytest

from asr_core import audio
from asr_core.decode import DecodeOptions
from asr_core.tokens import load_tokenizer, text_of
from runners.base import open_runner

CLIPS = 8
CLIENT = """
import json, sys
import numpy as np
import sherpa_onnx
folder, *files = sys.argv[1:]
names = {part: f"{folder}/whisper-{part}.onnx" for part in ("encoder", "decoder")}
client = sherpa_onnx.OfflineRecognizer.from_whisper(**names, tokens=f"{folder}/whisper-tokens.txt", language="en", num_threads=1)
texts = []
for file in files:
    stream = client.create_stream()
    stream.accept_waveform(16000, np.load(file))
    client.decode_stream(stream)
    texts.append(stream.result.text.strip())
print("TEXTS", json.dumps(texts))
"""


@pytest.fixture(scope="module")
def texts(trained, clips, export_here, tmp_path_factory) -> list[tuple[str, str]]:
    """What our runner and what sherpa-onnx hear in each of some clips with the same graphs, the clips padded to a window."""
    artifact, scratch = export_here(trained.path, "onnx.sherpa", "fp32"), tmp_path_factory.mktemp("clips")
    runner, tokenizer = open_runner("onnx.sherpa", artifact.path, 1), load_tokenizer(artifact.path)
    ours, files = [], []
    for clip in [clip for clip in clips if clip.stem.startswith("sentence")][:CLIPS]:
        samples = audio.load_audio(clip)
        mel = audio.log_mel(samples, np.load(artifact.path / "mel_filters.npy"))[None]
        ours.append(text_of(tokenizer, runner.generate(mel, DecodeOptions())[0].tokens))
        files.append(scratch / f"{clip.stem}.npy")
        np.save(files[-1], np.pad(samples, (0, audio.WINDOW_SAMPLES - len(samples))))
    command = [sys.executable, "-c", CLIENT, str(artifact.path), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    heard = next(line for line in done.stdout.splitlines() if line.startswith("TEXTS "))
    return list(zip(ours, json.loads(heard.removeprefix("TEXTS ")), strict=True))


def test_sherpa_onnx_loads_the_folder_and_mostly_says_the_same(texts):
    """Not always: its own spectrogram leaves out the window's last half second and never suppresses a token."""
    assert all(theirs for _, theirs in texts)
    assert sum(ours == theirs for ours, theirs in texts) > CLIPS / 2
