"""Open any source of Whisper weights as one frozen :class:`Checkpoint`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from asr_core.errors import CheckpointError

if TYPE_CHECKING:
    import torch

REFERENCE = "reference"
CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
)
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
HEAD = "proj_out.weight"
EMBEDDING = "model.decoder.embed_tokens.weight"
SHOWN_REASONS = 10
# safetensors' names of the dtypes that weights may have, and torch's.
TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ENGLISH_VOCAB = 51864  # of OpenAI's .en models
# What every Whisper has in common; a config that differs needs another graph (DESIGN: one graph for all).
REQUIRED_CONFIG = {"activation_function": "gelu", "scale_embedding": False}


class Frozen(BaseModel):
    """Base of the validated value types that cross a boundary."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Dims(Frozen):
    """Sizes of a Whisper model."""

    n_mels: int
    n_audio_ctx: int
    n_text_ctx: int
    d_model: int
    encoder_layers: int
    decoder_layers: int
    encoder_heads: int
    decoder_heads: int
    encoder_ffn: int
    decoder_ffn: int
    vocab: int

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Dims:
        """Read the sizes from a Hugging Face ``config.json``."""
        return cls(
            n_mels=config["num_mel_bins"],
            n_audio_ctx=config["max_source_positions"],
            n_text_ctx=config["max_target_positions"],
            d_model=config["d_model"],
            encoder_layers=config["encoder_layers"],
            decoder_layers=config["decoder_layers"],
            encoder_heads=config["encoder_attention_heads"],
            decoder_heads=config["decoder_attention_heads"],
            encoder_ffn=config["encoder_ffn_dim"],
            decoder_ffn=config["decoder_ffn_dim"],
            vocab=config["vocab_size"],
        )

    @property
    def head_dim(self) -> int:
        """Width of one decoder attention head."""
        return self.d_model // self.decoder_heads


@dataclass(frozen=True)
class Checkpoint:
    """One Whisper checkpoint on disk, known to be loadable.

    ``fingerprint`` is the SHA-256 over config, tokenizer and weight files: equal fingerprints mean equal exports.
    """

    name: str
    path: Path
    fingerprint: str
    dims: Dims
    config: dict[str, Any]
    generation: dict[str, Any]

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a local Hugging Face folder, a hub id, or ``reference`` (the carried checkpoint).

        Raises :class:`CheckpointError` with every reason at once where the checkpoint cannot be exported.
        """
        name, path = _locate(source)
        config = _read_json(path / "config.json")
        reasons = _config_problems(config)
        if reasons:
            raise CheckpointError(_list_reasons(path, reasons))
        dims = Dims.from_config(config)
        files = weight_files(path)
        generation_path = path / "generation_config.json"
        generation = _read_json(generation_path) if generation_path.exists() else {}
        checkpoint = cls(name, path, _fingerprint(path, files), dims, config, generation)
        reasons = checkpoint.weights.problems(dims)
        reasons += _generation_problems(generation, dims)
        if not (path / "tokenizer.json").exists():
            reasons.append("tokenizer.json is missing: save it with WhisperTokenizerFast.save_pretrained")
        if reasons:
            raise CheckpointError(_list_reasons(path, reasons))
        return checkpoint

    @cached_property
    def weights(self) -> Weights:
        """The tensors, by name, read from the safetensors one at a time."""
        return Weights(weight_files(self.path))

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


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: the file, its dtype's name, its shape, and its first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Weights:
    """Tensors of one or more safetensors files, read one at a time; dtypes stay as stored.

    Plain reads, not a memory map: pages of a map count as resident memory, so an export would seem to need all weights.
    """

    def __init__(self, files: list[Path]) -> None:
        self._stored: dict[str, Stored] = {}
        for file in files:
            self._stored.update(_stored_tensors(file))

    @property
    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._stored)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its stored dtype, in memory of its own."""
        import torch

        stored = self._stored[name]
        tensor = torch.empty(stored.shape, dtype=getattr(torch, TORCH_DTYPES[stored.dtype]))
        with stored.file.open("rb") as stream:
            stream.seek(stored.offset)
            stream.readinto(tensor.view(-1).view(torch.uint8).numpy().data)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._stored[name].shape

    def problems(self, dims: Dims) -> list[str]:
        """Missing, misshapen, unexpected or non-finite tensors, as sentences."""
        expected = expected_shapes(dims)
        found = set(self._stored) - {HEAD}
        problems = [f"tensor {name} is missing" for name in sorted(expected.keys() - found)]
        problems += [f"tensor {name} is not part of a Whisper model" for name in sorted(found - expected.keys())]
        for name in sorted(found & expected.keys()):
            if self.shape(name) != expected[name]:
                problems.append(f"tensor {name} has shape {self.shape(name)}, the config says {expected[name]}")
        return problems + list(self._value_problems())

    def _value_problems(self) -> Iterator[str]:
        import torch

        for name in self.names:
            tensor = self.read(name)
            # The extremes tell as much as isfinite() does, without its temporaries of several times the tensor.
            if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                yield f"tensor {name} holds NaN or infinite values"
            if name == HEAD and EMBEDDING in self._stored and not tensor.equal(self.read(EMBEDDING)):
                yield f"{HEAD} differs from {EMBEDDING}: an untied head is not a Whisper model"


def _stored_tensors(file: Path) -> dict[str, Stored]:
    """Read a safetensors file's header: eight bytes of length, JSON, then the tensors' bytes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="np"):  # validates the header and that the file is as long as it says
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a complete safetensors file ({error}). Download or copy it again.") from error
    header.pop("__metadata__", None)
    other = sorted({entry["dtype"] for entry in header.values()} - TORCH_DTYPES.keys())
    if other:
        raise CheckpointError(f"{file} holds tensors of type {', '.join(other)}; Whisper weights are floating point.")
    return {
        name: Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def expected_shapes(dims: Dims) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Whisper model of these sizes (the tied head left out)."""
    d = dims.d_model
    shapes: dict[str, tuple[int, ...]] = {
        "model.encoder.conv1.weight": (d, dims.n_mels, 3),
        "model.encoder.conv1.bias": (d,),
        "model.encoder.conv2.weight": (d, d, 3),
        "model.encoder.conv2.bias": (d,),
        "model.encoder.embed_positions.weight": (dims.n_audio_ctx, d),
        "model.decoder.embed_tokens.weight": (dims.vocab, d),
        "model.decoder.embed_positions.weight": (dims.n_text_ctx, d),
        **_norm("model.encoder.layer_norm", d),
        **_norm("model.decoder.layer_norm", d),
    }
    for i in range(dims.encoder_layers):
        shapes |= _layer(f"model.encoder.layers.{i}", ("self_attn",), d, dims.encoder_ffn)
    for i in range(dims.decoder_layers):
        shapes |= _layer(f"model.decoder.layers.{i}", ("self_attn", "encoder_attn"), d, dims.decoder_ffn)
    return shapes


def _norm(name: str, d: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (d,), f"{name}.bias": (d,)}


def _layer(prefix: str, attentions: tuple[str, ...], d: int, ffn: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.fc1.weight": (ffn, d),
        f"{prefix}.fc1.bias": (ffn,),
        f"{prefix}.fc2.weight": (d, ffn),
        f"{prefix}.fc2.bias": (d,),
        **_norm(f"{prefix}.final_layer_norm", d),
    }
    for attention in attentions:
        shapes |= _norm(f"{prefix}.{attention}_layer_norm", d)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{prefix}.{attention}.{projection}.weight"] = (d, d)
            if projection != "k_proj":
                shapes[f"{prefix}.{attention}.{projection}.bias"] = (d,)
    return shapes


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, one or sharded; pickles are refused."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(_read_json(index)["weight_map"].values()))
        missing = [name for name in names if not (path / name).exists()]
        if missing:
            raise CheckpointError(f"{path}: the shards {', '.join(missing)} named in {index.name} are missing.")
        return [path / name for name in names]
    single = path / "model.safetensors"
    if single.exists():
        return [single]
    pickles = sorted(path.glob("*.bin"))
    if pickles:
        raise CheckpointError(
            f"{path} holds only pickled weights ({pickles[0].name}), which can run code when they are loaded. Convert once: "
            f'python -c "from transformers import WhisperForConditionalGeneration as W; '
            f"W.from_pretrained('{path}').save_pretrained('{path}')\""
        )
    raise CheckpointError(f"{path} holds no model.safetensors. Point --model at a complete checkpoint folder.")


def _locate(source: str | Path) -> tuple[str, Path]:
    if str(source) == REFERENCE:
        import reference

        return REFERENCE, reference.checkpoint_path()
    path = Path(source)
    if path.is_dir():
        return path.resolve().name, path.resolve()
    if path.exists():
        raise CheckpointError(f"{path} is a file; --model takes a checkpoint folder, a hub id or '{REFERENCE}'.")
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise CheckpointError(f"{source}: no such folder, and not a hub id (owner/name).")
    return str(source).replace("/", "--"), _download(str(source))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*CONFIG_FILES, *TOKENIZER_FILES, *WEIGHT_FILES]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub could not be reached"
        raise CheckpointError(f"{hub_id} is not in the local hub cache, and {why}.") from error
    except (HfHubHTTPError, HFValidationError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{hub_id} could not be downloaded from the hub: {first_line}") from error


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


def _generation_problems(generation: dict[str, Any], dims: Dims) -> list[str]:
    if not generation:
        return ["generation_config.json is missing: it holds the suppression lists and language ids"]
    if not generation.get("is_multilingual", dims.vocab != ENGLISH_VOCAB):
        return []
    # Saving a fine-tuned model can drop them; decoding would then prompt a multilingual model as an English one.
    return [
        f"generation_config.json has no {key}: copy the file from the model that this one was made from"
        for key in ("lang_to_id", "task_to_id")
        if not generation.get(key)
    ]


def _list_reasons(path: Path, reasons: list[str]) -> str:
    shown = reasons[:SHOWN_REASONS]
    if len(reasons) > SHOWN_REASONS:
        shown.append(f"… and {len(reasons) - SHOWN_REASONS} more")
    return f"{path} cannot be exported:\n" + "\n".join(f"  - {reason}" for reason in shown)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no {path.name}: not a Whisper checkpoint folder.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return loaded


def _fingerprint(path: Path, weights: list[Path]) -> str:
    digest = hashlib.sha256()
    others = [path / name for name in (*CONFIG_FILES, *TOKENIZER_FILES) if (path / name).exists()]
    for file in [*others, *weights]:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
