"""What a user may call a checkpoint: a folder, a hub id, a ``.pt`` file, an adapter, or the carried reference."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from asr_core import adapters, openai_pt
from asr_core import folder as layout
from asr_core.errors import CheckpointError

REFERENCE = "reference"


@dataclass(frozen=True)
class Origin:
    """A checkpoint's name and folder, an adapter's folder where one is to be merged, and remarks for the user."""

    name: str
    path: Path
    adapter: Origin | None = None
    remarks: tuple[str, ...] = ()


def locate(source: str | Path, adapter: str | Path | None = None) -> Origin:
    """Find a source on this machine or fetch it from the hub; raises :class:`CheckpointError` naming what is missing.

    A hub id may carry a revision (a branch, a tag or a commit): ``owner/name@revision``. An adapter named as the source brings
    the base that its config names.
    """
    origin = _find(source)
    if adapters.is_adapter(origin.path):
        if adapter is not None:
            raise CheckpointError(f"{source} is an adapter itself; only one can be merged. Merge the first one's checkpoint.")
        base = _base_of(origin)
        return Origin(base.name, base.path, origin, base.remarks)
    if adapter is None:
        return origin
    found = _find(adapter)
    if not adapters.is_adapter(found.path):
        raise CheckpointError(f"{adapter} is not an adapter folder: it holds no {layout.ADAPTER_CONFIG}.")
    return Origin(origin.name, origin.path, found, origin.remarks)


def _find(source: str | Path) -> Origin:
    if str(source) == REFERENCE:
        import reference

        return Origin(REFERENCE, reference.checkpoint_path())
    path = Path(source)
    if path.is_dir():
        return Origin(path.resolve().name, path.resolve())
    if path.suffix == ".pt" and path.is_file():
        folder, remarks = openai_pt.convert(path.resolve())
        return Origin(path.stem, folder, None, remarks)
    if path.exists():
        raise CheckpointError(f"{path} is a file; --model takes a checkpoint folder, a .pt file, a hub id or '{REFERENCE}'.")
    hub_id, _, revision = str(source).partition("@")
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")) or path.suffix == ".pt":
        raise CheckpointError(f"{source}: no such folder, and not a hub id (owner/name).")
    return Origin(str(source).replace("/", "--"), _download(hub_id, revision or None))


def _base_of(adapter: Origin) -> Origin:
    """The checkpoint that an adapter's config names: a folder (as it says, or as seen from the adapter), or a hub id."""
    config = layout.read_json(adapter.path / layout.ADAPTER_CONFIG)
    named = config.get("base_model_name_or_path")
    how = f"Name the base: --model BASE --adapter {adapter.path}"
    if not named or not isinstance(named, str):
        raise CheckpointError(f"{adapter.path / layout.ADAPTER_CONFIG} names no base. {how}")
    beside = adapter.path / named
    revision = f"@{config['revision']}" if config.get("revision") and not Path(named).exists() else ""
    try:
        base = _find(beside if beside.exists() and not Path(named).exists() else named + revision)
    except CheckpointError as error:
        raise CheckpointError(f"{adapter.path} is an adapter over {named}, which is not here: {error} {how}") from error
    if adapters.is_adapter(base.path):
        raise CheckpointError(f"{adapter.path} is an adapter over {named}, which is an adapter itself. {how}")
    return base


def _download(hub_id: str, revision: str | None) -> Path:
    """Fetch config, tokenizer, weights and compact forms of a hub id; pickled weights only where there are no others."""
    small = [*layout.CONFIG_FILES, *layout.TOKENIZER_FILES, *layout.COMPRESSION_FILES, *layout.ADAPTER_FILES]
    light = [*small, *layout.WEIGHT_FILES]
    path = _snapshot(hub_id, revision, light)
    if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return path
    return _snapshot(hub_id, revision, [*light, *layout.PICKLE_FILES])


def _snapshot(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    named = f"{hub_id}@{revision}" if revision else hub_id
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub could not be reached"
        raise CheckpointError(f"{named} is not in the local hub cache, and {why}.") from error
    except (HfHubHTTPError, HFValidationError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{named} could not be downloaded from the hub: {first_line}") from error
