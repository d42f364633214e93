"""CTranslate2 decodes by itself: its Python interface has no single decode step.

Its search gets the same options as ours, and its hypotheses are ranked and tried again by the same rules as ours.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from numpy.typing import NDArray

from asr_core import decode
from asr_core.align import FILTER_WIDTH, Alignment, AlignRequest
from asr_core.artifact import read_manifest
from asr_core.decode import Decoded, DecodeOptions, Logits, Mel, Timings
from asr_core.search import Candidate, best_of
from runners.base import Written

# The type to compute in, by stored precision; where a CPU cannot, CTranslate2 would warn and choose one for us.
COMPUTE_TYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8_float32"}

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
NEVER = 2**31 - 1

ALMOST_NO_PATIENCE = 1 + 1e-6  # the next numbers after 1 in float32: as many sequences must end, but it isn't 1


class CTranslate2Runner(Written):
    """A converted model on the CPU, with CTranslate2's own search."""

    decoder = "native"
    timed = True
    timing_needs = ""
    short_windows = True

    def __init__(self, path: Path, threads: int) -> None:
        _keep_memory()
        manifest = read_manifest(path)
        self.folder = path
        self.dims = manifest.dims
        self.tokens = manifest.tokens
        self.alignment_heads = manifest.alignment_heads
        wanted = COMPUTE_TYPES[manifest.precision]
        supported = ctranslate2.get_supported_compute_types("cpu")
        self._model = ctranslate2.models.Whisper(
            str(path),
            device="cpu",
            compute_type=wanted if wanted in supported else "float32",
            inter_threads=1,
            intra_threads=threads,
        )

    def encoder_states(self, mel: Mel) -> NDArray[np.float32]:
        """Float32 [B, n_mels, 3000] → encoder states float32 [B, 1500, D]."""
        return np.array(self._encode(mel), dtype=np.float32)

    def generate(self, mel: Mel, options: DecodeOptions) -> list[Decoded]:
        """Decode a batch of windows, float32 [B, n_mels, 3000]."""
        started = time.perf_counter()
        states = self._encode(mel)
        encoded = time.perf_counter()
        given = options.language is not None
        languages = [options.language] * len(mel) if given else [decode.likeliest(found) for found in self._languages(states)]
        context = self.dims.n_text_ctx
        prompts = [decode.initial_tokens(self.tokens, options, language, context) for language in languages]

        def attempt(rows: list[int], index: int) -> list[Decoded]:
            some = states if len(rows) == len(mel) else _rows(states, rows)
            results = self._search(some, [prompts[row] for row in rows], options, index)
            timings = Timings(encoded - started, time.perf_counter() - encoded, None)
            return [
                self._decoded(result, options, index, timings, self.tokens.code_of(languages[row]))
                for row, result in zip(rows, results, strict=True)
            ]

        return decode.with_fallback(len(mel), options, attempt, self.text)

    def detect_language(self, mel: Mel) -> list[dict[str, float]]:
        """The probability of every language by code, for each window of float32 [B, n_mels, 3000]."""
        return self._languages(self._encode(mel))

    def score(self, mel: Mel, tokens: list[int]) -> Logits | None:
        """Nothing: CTranslate2 shows no logits of a given sequence."""

    def align(self, mel: Mel, requests: Sequence[AlignRequest]) -> list[Alignment]:
        """With CTranslate2's own attention and path, whose rules are openai-whisper's; it adds the end of the prompt itself."""
        found = []
        for request in requests:
            prompt = self.tokens.prompt(request.language, request.task)[:-1]
            states = self._encode(mel[request.window : request.window + 1])
            (result,) = self._model.align(
                states, prompt, [list(request.tokens)], request.frames, median_filter_width=FILTER_WIDTH
            )
            text, time = np.array(result.alignments, np.int64).reshape(-1, 2).T
            found.append(Alignment(text, time, np.array(result.text_token_probs)))
        return found

    def close(self) -> None:
        """Free the model."""
        self._model.unload_model()

    def _languages(self, states: ctranslate2.StorageView) -> list[dict[str, float]]:
        if not self.tokens.languages:
            return [{"en": 1.0}] * states.shape[0]
        return [{token[2:-2]: probability for token, probability in found} for found in self._model.detect_language(states)]

    def _search(self, states: ctranslate2.StorageView, prompts: list[list[int]], options: DecodeOptions, index: int) -> list[Any]:
        """Every window's hypotheses at one of the temperatures, with scores that are sums of log-probabilities."""
        # A prefix counts as generated: it follows the prompt, is part of the answer, and uses up its length.
        forced = len(options.prefix)
        limit = decode.new_token_limit(self.tokens, options, len(prompts[0]), self.dims.n_text_ctx)
        initial = decode.initial_timestamp_index(options)
        results: list[Any] = self._model.generate(
            states,
            prompts,
            **_strategy(options, index),
            max_length=_max_length(limit + forced, len(prompts[0]) - forced),
            max_initial_timestamp_index=self.dims.n_audio_ctx if initial is None else initial,
            suppress_tokens=list(self.tokens.suppress if options.suppress is None else options.suppress),
            suppress_blank=options.suppress_blank,  # the config's suppress_ids_begin: the same list as our begin_suppress
            return_scores=True,
            return_no_speech_prob=True,
        )
        return results

    def _decoded(self, result: Any, options: DecodeOptions, index: int, timings: Timings, language: str) -> Decoded:
        answers = [tuple(tokens[len(options.prefix) :]) for tokens in result.sequences_ids]
        candidates = [Candidate(tokens, float(score)) for tokens, score in zip(answers, result.scores, strict=True)]
        best = best_of(candidates, options.length_penalty)
        silence = None if self.tokens.no_speech is None else float(result.no_speech_prob)
        return Decoded(list(best.tokens), best.sum_logprob, silence, timings, language, options.temperatures[index])

    def _encode(self, mel: Mel) -> ctranslate2.StorageView:
        # The view borrows the array's memory, so the array must outlive the call.
        features = np.ascontiguousarray(mel)
        return self._model.encode(ctranslate2.StorageView.from_array(features))


def _keep_memory() -> None:
    """Let the C library keep what is freed, in the whole process: CTranslate2 allocates its activations anew in every layer.

    glibc maps blocks of megabytes and gives them back at once, and the kernel fills every page with zeros again: a third of an
    encoder's time. Other C libraries (no ``mallopt``) are left as they are. Source: mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, NEVER)


def open(path: Path, threads: int) -> CTranslate2Runner:
    """Open an artifact folder."""
    return CTranslate2Runner(path, threads)


def _strategy(options: DecodeOptions, index: int) -> dict[str, Any]:
    """How to search, in CTranslate2's words.

    A score is Σ log p / length ** penalty; the sum contains the end token, the length does not. Without a penalty scores are
    the sums, and all that ended is asked for, so that it can be ranked by our rules.
    """
    temperature = options.temperatures[index]
    if temperature == 0 and options.beam_size is not None:
        patience = options.patience or 1.0
        return {
            "beam_size": options.beam_size,
            # With neither patience nor penalty it would stop at the first sequence that ends.
            "patience": ALMOST_NO_PATIENCE if patience == 1 else patience,
            "num_hypotheses": max(int(options.beam_size * patience), 1),
            "length_penalty": 0,
        }
    if temperature == 0:
        return {"beam_size": 1, "length_penalty": 0}
    ctranslate2.set_random_seed(options.seed + index)
    return {
        "beam_size": 1,
        "num_hypotheses": options.best_of or 1,
        "length_penalty": 0,
        "sampling_topk": 0,  # of all
        "sampling_temperature": temperature,
    }


def _rows(states: ctranslate2.StorageView, rows: list[int]) -> ctranslate2.StorageView:
    """Some of the encoder states; like any view, the result borrows the memory of an array, which it keeps alive."""
    return ctranslate2.StorageView.from_array(np.ascontiguousarray(np.array(states)[rows]))


def _max_length(new_tokens: int, prompt: int) -> int:
    """The ``max_length`` that allows exactly so many new tokens: CTranslate2 stops at min(m // 2, m - prompt + 1)."""
    return max(2 * new_tokens, new_tokens + prompt - 1)
