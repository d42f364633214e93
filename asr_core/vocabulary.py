"""OpenAI's own vocabularies, as openai-whisper ships them, as Hugging Face tokenizer files."""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from asr_core import languages
from asr_core.folder import write_json
from asr_core.generation import END

MULTILINGUAL, ENGLISH = "multilingual", "gpt2"
TIMESTAMPS = 1501  # 0.00 to 30.00 s


def assets() -> Path | None:
    """The folder of an installed openai-whisper's data, found without importing it."""
    spec = importlib.util.find_spec("whisper")  # another package has the same name
    folders = [Path(place) for place in (spec.submodule_search_locations or [] if spec else [])]
    return next((folder for folder in folders if (folder / "assets" / f"{MULTILINGUAL}.tiktoken").exists()), None)


def special_tokens(known: int) -> list[str]:
    """OpenAI's special tokens in their order, timestamps last; ids begin after the text tokens. ``known`` counts languages."""
    control = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")
    timestamps = (f"{i * 0.02:.2f}" for i in range(TIMESTAMPS))
    return [f"<|{name}|>" for name in (END[2:-2], "startoftranscript", *list(languages.NAMES)[:known], *control, *timestamps)]


def write_tokenizer(whisper: Path, folder: Path, *, english: bool, known: int) -> None:
    """Write ``tokenizer.json``, its settings and the English normaliser's spellings from openai-whisper's folder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ranks = _read(whisper / "assets" / f"{ENGLISH if english else MULTILINGUAL}.tiktoken")
    letters = _letters()
    vocab = {_spell(token, letters): rank for token, rank in ranks.items()}
    merges = [(_spell(left, letters), _spell(right, letters)) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = special_tokens(known)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special[:-TIMESTAMPS]])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in special[-TIMESTAMPS:]])
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END)
    settings = {"tokenizer_class": "WhisperTokenizer", "add_prefix_space": False, "model_max_length": 1024}
    write_json(folder / "tokenizer_config.json", settings | ends)
    (folder / "normalizer.json").write_bytes((whisper / "normalizers" / "english.json").read_bytes())


def _read(file: Path) -> dict[bytes, int]:
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that make each token, in the order of their ranks: a token's own pair is what its bytes merge to before it."""
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = _split(token, ranks, rank)
        if len(parts) == 2:  # noqa: PLR2004  # single bytes are one part
            pairs.append((parts[0], parts[1]))
    return pairs


def _split(token: bytes, ranks: dict[bytes, int], below: int) -> Sequence[bytes]:
    """The parts that byte-pair merges of lower rank than ``below`` make of a token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        rank, place = min((ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1))
        if rank >= below:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _letters() -> dict[int, str]:
    """GPT-2's printable letter of every byte: itself where it is printable, else the next free one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _spell(token: bytes, letters: dict[int, str]) -> str:
    return "".join(letters[byte] for byte in token)
