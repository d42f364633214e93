"""Tokenizer bundle: special ids, prompts and text, without transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr_core import languages
from asr_core.dims import Frozen
from asr_core.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TIMESTAMP_STEP = 0.02  # seconds a timestamp token
# What only a prompt may hold; the no-speech token has had two names.
PROMPT_ONLY = ("startoftranscript", "translate", "transcribe", "startoflm", "startofprev", "nospeech", "nocaptions")
# openai-whisper's list of signs that are not spoken: hyphen and apostrophe only where a word would begin with them.
LEADING = (" -", " '")
SIGNS = (*'"#()*+/:;<=>@[\\]^_`{|}~「」『』', *"<< >> <<< >>> -- --- -( -[ (' (\" (( )) ((( ))) [[ ]] {{ }} ♪♪ ♪♪♪".split())
MUSIC = tuple("♩♪♫♬♭♮♯")


class TokenIds(Frozen):
    """Special token ids and suppression lists, from the generation config and the tokenizer."""

    start: int
    end: int
    no_timestamps: int
    timestamp_begin: int
    no_speech: int | None
    previous: int | None = None
    languages: dict[str, int]
    tasks: dict[str, int]
    suppress: list[int]
    begin_suppress: list[int]
    max_new_tokens: int

    @classmethod
    def read(cls, folder: Path, generation: dict[str, Any], n_text_ctx: int) -> TokenIds:
        """Collect the ids of a checkpoint folder; raises :class:`CheckpointError` where one is missing."""
        tokenizer = load_tokenizer(folder)
        start = _required(tokenizer, "<|startoftranscript|>", folder)
        no_timestamps = _required(tokenizer, "<|notimestamps|>", folder)
        known = {token[2:-2]: index for token, index in (generation.get("lang_to_id") or {}).items()}
        no_speech = tokenizer.token_to_id("<|nospeech|>")
        if no_speech is None:
            no_speech = tokenizer.token_to_id("<|nocaptions|>")
        return cls(
            start=start,
            end=_required(tokenizer, "<|endoftext|>", folder),
            no_timestamps=no_timestamps,
            timestamp_begin=no_timestamps + 1,
            no_speech=no_speech,
            previous=tokenizer.token_to_id("<|startofprev|>"),
            languages=known,
            tasks=dict(generation.get("task_to_id") or {}) if known else {},
            suppress=sorted(generation.get("suppress_tokens") or []),
            begin_suppress=sorted(generation.get("begin_suppress_tokens") or []),
            # openai-whisper's sample_len: half of the text context. CTranslate2 holds to the same bound.
            max_new_tokens=n_text_ctx // 2,
        )

    def prompt(self, language: str | None = "en", task: str = "transcribe", *, timestamps: bool = False) -> list[int]:
        """The decoder's first tokens: start, language, task, no timestamps (language and task only where the model has them).

        ``language`` is a code or an English name; None means English. Raises :class:`UsageError` for a language or
        task that the model does not know.
        """
        code = self.code_of(language)
        last = [] if timestamps else [self.no_timestamps]
        if not self.languages:
            if task != "transcribe":
                raise UsageError(f"this model only transcribes English: task {task!r} is not for it.")
            return [self.start, *last]
        if task not in self.tasks:
            raise UsageError(f"unknown task {task!r}; this model knows: {', '.join(sorted(self.tasks))}.")
        return [self.start, self.languages[code], self.tasks[task], *last]

    def code_of(self, language: str | None) -> str:
        """The code of a language that the model knows, given by code or by name; None means English.

        Raises :class:`UsageError` for a language that it does not know.
        """
        code = languages.code_of(language or "en")
        if self.languages and code not in self.languages:
            raise UsageError(f"unknown language {language!r}; this model knows: {', '.join(sorted(self.languages))}.")
        if not self.languages and code != "en":
            raise UsageError(f"this model only transcribes English: language {language!r} is not for it.")
        return code


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read a folder's ``tokenizer.json`` with the tokenizers library."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for every fault
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({error}).") from error


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of token ids, special and timestamp tokens left out, without surrounding blanks."""
    return tokenizer.decode(without_timestamps(tokenizer, ids), skip_special_tokens=True).strip()


def written_out(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of token ids as openai-whisper has it: special tokens written out, timestamps left out, no blanks around."""
    return tokenizer.decode(without_timestamps(tokenizer, ids), skip_special_tokens=False).strip()


def without_timestamps(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The ids that are not timestamps, which Whisper's tokenizers do not mark as special.

    Timestamps end OpenAI's vocabularies; the words that fine-tuning adds come after them.
    """
    first, last = tokenizer.token_to_id("<|0.00|>"), tokenizer.token_to_id("<|30.00|>")
    return [i for i in ids if first is None or last is None or not first <= i <= last]


def non_speech_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """openai-whisper's list of tokens that are not spoken: brackets, speaker signs, music."""
    found = {tokenizer.encode(text, add_special_tokens=False).ids[0] for text in LEADING}
    for sign in (*SIGNS, *MUSIC):
        for encoded in (tokenizer.encode(text, add_special_tokens=False).ids for text in (sign, " " + sign)):
            # Notes may take several tokens; forbidding the first is safe, as they share their first two bytes.
            if len(encoded) == 1 or sign in MUSIC:
                found.add(encoded[0])
    return tuple(sorted(found))


def suppressed(tokenizer: Tokenizer, chosen: Sequence[int] = (-1,)) -> tuple[int, ...]:
    """What openai-whisper suppresses where it is told to suppress ``chosen``; -1 stands for all that is not spoken.

    The tokens that only a prompt may hold are always part of it.
    """
    found = {token for token in chosen if token >= 0} | set(non_speech_tokens(tokenizer) if -1 in chosen else ())
    controls = (tokenizer.token_to_id(f"<|{name}|>") for name in PROMPT_ONLY)
    return tuple(sorted(found | {token for token in controls if token is not None}))


def write_bundle(checkpoint_folder: Path, n_mels: int, alignment_heads: list[tuple[int, int]], folder: Path) -> None:
    """Add what a client needs beside the network: tokenizer, generation config, mel filters, preprocessor config.

    The generation config gets the alignment heads of the artifact, from which other clients make their word timestamps.
    transformers 5 saves no ``preprocessor_config.json``; without one, faster-whisper feeds 80 mels to a 128-mel model.
    """
    import numpy as np

    from asr_core import audio

    (folder / "tokenizer.json").write_bytes((checkpoint_folder / "tokenizer.json").read_bytes())
    generation = json.loads((checkpoint_folder / "generation_config.json").read_text(encoding="utf-8"))
    generation["alignment_heads"] = [list(head) for head in alignment_heads]
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    np.save(folder / "mel_filters.npy", audio.mel_filters(n_mels))
    preprocessor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": n_mels,
        "sampling_rate": audio.SAMPLE_RATE,
        "hop_length": audio.HOP,
        "chunk_length": audio.WINDOW_SECONDS,
        "n_fft": audio.N_FFT,
        "n_samples": audio.WINDOW_SAMPLES,
        "nb_max_frames": audio.WINDOW_FRAMES,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n", encoding="utf-8")


def _required(tokenizer: Tokenizer, token: str, folder: Path) -> int:
    index = tokenizer.token_to_id(token)
    if index is None:
        raise CheckpointError(f"{folder / 'tokenizer.json'} has no {token} token: not a Whisper tokenizer.")
    return index
