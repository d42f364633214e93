"""Open any source of Whisper weights as one frozen :class:`Checkpoint`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr_core import adapters, completion, generation, sources
from asr_core import folder as layout
from asr_core.compressed import Forms
from asr_core.dims import HEAD, Dims
from asr_core.errors import CheckpointError
from asr_core.graph_weights import GraphWeights
from asr_core.tokens import load_tokenizer
from asr_core.weights import Weights

if TYPE_CHECKING:
    import torch

SHOWN_REASONS = 10
# What every Whisper has in common; a config that differs needs another graph (one graph serves all).
REQUIRED_CONFIG = {"activation_function": "gelu", "scale_embedding": False}


@dataclass(frozen=True)
class Checkpoint:
    """One Whisper checkpoint on disk, known to be loadable.

    ``path`` is always a complete folder in Hugging Face's layout, whatever the source was. ``fingerprint`` is the SHA-256 over
    its config, tokenizer and weight files, and the record and forms of a compressed one: equal fingerprints mean equal exports.
    ``remarks`` say what had to be converted, merged or rebuilt.
    """

    name: str
    path: Path
    fingerprint: str
    dims: Dims
    config: dict[str, Any]
    generation: dict[str, Any]
    remarks: tuple[str, ...] = ()

    @classmethod
    def open(cls, source: str | Path, adapter: str | Path | None = None) -> Checkpoint:
        """Open a local Hugging Face folder, a hub id, an OpenAI ``.pt`` file, an adapter, or ``reference`` (the carried one).

        A hub id may end in ``@revision``. ``adapter`` is a PEFT folder or hub id to merge into the source. Raises
        :class:`CheckpointError` with every reason at once where the checkpoint cannot be exported.
        """
        origin = sources.locate(source, adapter)
        opened = cls._read(origin.name, origin.path)
        remarks = origin.remarks + opened.remarks
        if origin.adapter is None:
            return replace(opened, remarks=remarks)
        merged = cls._read(f"{opened.name}+{origin.adapter.name}", adapters.merge(opened, origin.adapter.path))
        return replace(merged, remarks=(*remarks, f"adapter {origin.adapter.name} merged into {opened.name}"))

    @classmethod
    def _read(cls, name: str, source: Path) -> Checkpoint:
        config = layout.read_json(source / layout.CONFIG)
        reasons = _config_problems(config)
        if reasons:
            raise CheckpointError(_list_reasons(source, reasons))
        path, remarks = completion.complete(source, config)
        dims = Dims.from_config(config)
        files = layout.weight_files(path)
        settings_file = path / layout.GENERATION
        settings = layout.read_json(settings_file) if settings_file.exists() else {}
        fingerprint = layout.fingerprint([*layout.small_files(path), *files, *layout.compression_files(path)])
        checkpoint = cls(name, path, fingerprint, dims, config, settings, remarks)
        reasons = checkpoint.weights.problems(dims) + _head_problems(config, checkpoint.weights)
        reasons += checkpoint.forms.problems()
        if not settings:
            reasons.append(f"{layout.GENERATION} is missing: it holds the suppression lists and language ids")
        reasons += _tokenizer_problems(path, settings, dims)
        if reasons:
            raise CheckpointError(_list_reasons(source, reasons))
        return checkpoint

    @cached_property
    def weights(self) -> Weights:
        """The tensors, by name, read from the safetensors one at a time."""
        return Weights(layout.weight_files(self.path))

    @cached_property
    def forms(self) -> Forms:
        """The compact forms that weights of a compressed checkpoint stand for; empty where it isn't one."""
        return Forms(self.path, self.weights)

    @cached_property
    def graph_weights(self) -> GraphWeights:
        """The tensors as the export graph has them, by the names of its parameters."""
        return GraphWeights(self.weights, self.forms, self.dims)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All tensors as float32 torch tensors under Hugging Face's names, without the tied head."""
        return {name: self.weights.read(name).float() for name in self.weights.names if name != HEAD}

    @property
    def multilingual(self) -> bool:
        """Whether prompts carry a language and a task token (``.en`` models have neither)."""
        return bool(self.generation.get("lang_to_id"))

    @property
    def alignment_heads(self) -> list[tuple[int, int]]:
        """The cross-attention heads (decoder layer, head) that follow the sound, for word timestamps.

        Without a list, openai-whisper's choice for a model that it does not know: all heads of the upper half of the layers.
        Raises :class:`CheckpointError` for a list that is not this model's.
        """
        layers, heads = self.dims.decoder_layers, self.dims.decoder_heads
        listed = [(int(layer), int(head)) for layer, head in self.generation.get("alignment_heads") or []]
        strange = [f"{layer}:{head}" for layer, head in listed if not (0 <= layer < layers and 0 <= head < heads)]
        if strange:
            raise CheckpointError(
                f"{self.name} has no alignment heads {', '.join(strange)}: its decoder has {layers} layers of {heads} heads. "
                "Let them be found anew: --alignment-heads discover."
            )
        return listed or [(layer, head) for layer in range(layers // 2, layers) for head in range(heads)]

    def with_alignment_heads(self, heads: Sequence[Sequence[int]]) -> Checkpoint:
        """The same checkpoint with other alignment heads; its files stay as they are."""
        return replace(self, generation=self.generation | {"alignment_heads": [list(head) for head in heads]})


def _config_problems(config: dict[str, Any]) -> list[str]:
    if config.get("model_type") != "whisper":
        return [f"config.json describes a {config.get('model_type', 'nameless')!r} model, not 'whisper'"]
    problems = [
        f"config.json has {key}={config[key]!r}; only {wanted!r} is a Whisper"
        for key, wanted in REQUIRED_CONFIG.items()
        if config.get(key, wanted) != wanted
    ]
    try:
        dims = Dims.from_config(config)
    except KeyError as error:
        return [*problems, f"config.json lacks {error}"]
    if dims.n_mels not in (80, 128):
        problems.append(f"num_mel_bins is {dims.n_mels}; Whisper has 80 or 128")
    return problems + [
        f"d_model {dims.d_model} is not a multiple of the {side}'s heads"
        for side in ("encoder", "decoder")
        if dims.d_model % getattr(dims, f"{side}_heads")
    ]


def _head_problems(config: dict[str, Any], weights: Weights) -> list[str]:
    if config.get("tie_word_embeddings", True) or HEAD in weights.names:
        return []
    return [f"config.json has tie_word_embeddings=false, and the weights no {HEAD}: the head would be random"]


def _tokenizer_problems(path: Path, settings: dict[str, Any], dims: Dims) -> list[str]:
    if not (path / layout.TOKENIZER).exists():
        return ["tokenizer.json is missing: save it with WhisperTokenizerFast.save_pretrained"]
    tokenizer = load_tokenizer(path)
    problems = []
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if tokens > dims.vocab:
        problems.append(
            f"tokenizer.json has {tokens} tokens, the model {dims.vocab}: it is another model's, or was never resized"
        )
    required = (generation.START, generation.END, generation.NO_TIMESTAMPS)
    missing = [token for token in required if tokenizer.token_to_id(token) is None]
    if missing:
        problems.append(f"tokenizer.json has no {', '.join(missing)} token: not a Whisper tokenizer")
    start, stated = tokenizer.token_to_id(generation.START), settings.get("decoder_start_token_id")
    if stated is not None and start is not None and stated != start:
        problems.append(f"generation_config.json starts with token {stated}, tokenizer.json's {generation.START} is {start}")
    if settings and generation.multilingual(settings, tokenizer):
        # Without them a multilingual model would be prompted as an English one.
        lost = [key for key in ("lang_to_id", "task_to_id") if not settings.get(key)]
        problems += [f"generation_config.json has no {key}, and tokenizer.json no tokens to rebuild it from" for key in lost]
    return problems


def _list_reasons(path: Path, reasons: list[str]) -> str:
    shown = reasons[:SHOWN_REASONS]
    if len(reasons) > SHOWN_REASONS:
        shown.append(f"… and {len(reasons) - SHOWN_REASONS} more")
    return f"{path} cannot be exported:\n" + "\n".join(f"  - {reason}" for reason in shown)
