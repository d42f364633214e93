"""PEFT adapters (LoRA and its relatives): merged into their base's weights, which then are a checkpoint like any other."""

from __future__ import annotations

import shutil
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr_core import conversions, pickled, registry
from asr_core import folder as layout
from asr_core.errors import CheckpointError
from asr_core.tokens import load_tokenizer

if TYPE_CHECKING:
    import torch

    from asr_core.checkpoint import Checkpoint

EXTRA = "peft"
SHOWN = 5
SHOWN_CHARACTERS = 300
# Adapters that change what the model reads, not its weights: there is nothing to merge.
PROMPTS = {"ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model; raises :class:`CheckpointError` where it holds both.

    transformers would add such an adapter to the model's weights while it loads them; nothing else would.
    """
    if not (path / layout.ADAPTER_CONFIG).exists():
        return False
    if (path / layout.CONFIG).exists() and [*path.glob(layout.SINGLE), *path.glob(layout.INDEX), *path.glob(layout.PICKLE)]:
        raise CheckpointError(
            f"{path} holds a model and an adapter ({layout.ADAPTER_CONFIG}): whether they are merged already can't be seen. "
            "Move the adapter's files to a folder of their own."
        )
    return True


def merge(base: Checkpoint, folder: Path) -> Path:
    """The folder of the base with the adapter's changes added to its weights, in float32, from the cache where it is there.

    Raises :class:`CheckpointError` with the reasons where the adapter does not fit or can't be merged, and
    :class:`~asr_core.errors.UnavailableError` where peft is not installed.
    """
    registry.require(EXTRA)
    config = layout.read_json(folder / layout.ADAPTER_CONFIG)
    if config.get("peft_type") in PROMPTS:
        raise CheckpointError(f"{folder} is a {config['peft_type']} adapter: it changes prompts, not weights to merge.")
    weights = _weights_file(folder)
    _check_tokenizer(base, folder, config)
    inputs = {
        "base": base.fingerprint,
        "adapter": layout.fingerprint([folder / layout.ADAPTER_CONFIG, weights]),
        "peft": metadata.version("peft"),
    }

    def write(new: Path) -> list[str]:
        for file in layout.small_files(base.path):
            shutil.copyfile(file, new / file.name)
        layout.write_json(new / layout.CONFIG, base.config | {"dtype": "float32", "torch_dtype": "float32"})
        pickled.save(_merged(base, folder, config, weights), new / layout.SINGLE)
        return []

    return conversions.converted(f"{base.name}+{folder.name}", inputs, write)[0]


def _weights_file(folder: Path) -> Path:
    found = next((folder / name for name in layout.ADAPTER_FILES[1:] if (folder / name).exists()), None)
    if found is None:
        raise CheckpointError(f"{folder} holds {layout.ADAPTER_CONFIG} but no {layout.ADAPTER_FILES[1]}.")
    return found


def _check_tokenizer(base: Checkpoint, folder: Path, config: dict[str, Any]) -> None:
    if not (folder / layout.TOKENIZER).exists():
        return
    own, theirs = load_tokenizer(folder).get_vocab(), load_tokenizer(base.path).get_vocab()
    added = sorted(own.keys() - theirs.keys())
    moved = sorted(token for token, index in own.items() if theirs.get(token, index) != index)
    problems = []
    if added:
        problems.append(f"its tokenizer has {len(added)} tokens that the base's has not: {', '.join(added[:SHOWN])}")
    if moved:
        problems.append(f"its tokenizer has other ids than the base's for {', '.join(moved[:SHOWN])}")
    if problems:
        raise _misfit(base, folder, config, problems)


def _merged(base: Checkpoint, folder: Path, config: dict[str, Any], file: Path) -> dict[str, torch.Tensor]:
    """The base's tensors with the adapter's changes added, under Hugging Face's names, float32."""
    saved = _read(file)
    # torchao is another converter's neighbour, and peft would ask it about every layer. What peft and transformers warn of
    # is either their own future or an error here.
    with registry.absent(["torchao"]), warnings.catch_warnings(action="ignore"):
        merged, problems = _merge(base.path, folder, saved)
    if problems:
        raise _misfit(base, folder, config, problems)
    return merged


def _merge(base: Path, folder: Path, saved: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The merged tensors, or what is wrong."""
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import WhisperForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = WhisperForConditionalGeneration.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    try:
        settings = PeftConfig.from_pretrained(str(folder))
        settings.inference_mode = True
        adapted = get_peft_model(model, settings)
        problems = _problems(saved, get_peft_model_state_dict(adapted))
        if problems:
            return {}, problems
        set_peft_model_state_dict(adapted, saved)
        merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # noqa: BLE001  # peft raises whatever its layers do: unknown types, targets that are not there
        return {}, [" ".join(str(error).split())[:SHOWN_CHARACTERS] or type(error).__name__]
    return {name: tensor.float() for name, tensor in merged.state_dict().items()}, []


def _misfit(base: Checkpoint, folder: Path, config: dict[str, Any], problems: list[str]) -> CheckpointError:
    shown = [*problems[:SHOWN], *([f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])]
    lines = "".join(f"\n  - {problem}" for problem in shown)
    kind = f" ({config['peft_type']})" if config.get("peft_type") else ""
    return CheckpointError(f"the adapter {folder}{kind} cannot be merged into {base.name}:{lines}")


def _read(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".bin":
        return pickled.tensors(file)
    from asr_core.weights import Weights

    weights = Weights([file])
    return {name: weights.read(name) for name in weights.names}


def _problems(saved: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """What the adapter's file lacks, has too much, or has in another shape: peft passes over the first two with a warning."""
    shapes = [
        f"{name} has shape {tuple(saved[name].shape)}, the base wants {tuple(expected[name].shape)}"
        for name in sorted(saved.keys() & expected.keys())
        if saved[name].shape != expected[name].shape
    ]
    missing = [f"{name} is missing" for name in sorted(expected.keys() - saved.keys())]
    return shapes + missing + [f"{name} has no place in the base" for name in sorted(saved.keys() - expected.keys())]
