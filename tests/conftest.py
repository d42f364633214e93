"""Fixtures that several suites share: checkpoints of every shape, real recordings, one finished artifact."""

import os

# Before any numeric library starts its pool: threads that wait for busy cores make small models slower, not faster.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import reference
from asr_core import build
from asr_core.artifact import Artifact
from asr_core.checkpoint import Checkpoint
from reference import shapes
from tests.support import listen_louder

DATA = Path(os.environ.get("ASR_EXPORT_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True, scope="session")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of converted checkpoints of this session's own."""
    cache = tmp_path_factory.mktemp("cache")
    os.environ["ASR_EXPORT_CACHE"] = str(cache)
    return cache / "checkpoints"


@pytest.fixture(scope="session")
def shape_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a random-weight checkpoint of a named shape, written once a session; never change it."""
    root = tmp_path_factory.mktemp("shapes")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else shapes.write(shapes.SHAPES[name], path)

    return folder


@pytest.fixture
def mini(shape_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the mini checkpoint that a test may damage."""
    return shutil.copytree(shape_folder("mini"), tmp_path / "mini")


@pytest.fixture(scope="session")
def talkative(shape_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mini checkpoint whose transcripts differ by window and end at different lengths, as random weights' never do.

    Louder positions, convolutions and cross-attention make its choice depend on where it is and what it hears; all but
    twelve words and the end are suppressed, so the end is chosen now and then.
    """
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(shape_folder("mini"), tmp_path_factory.mktemp("talkative") / "mini")
    weights = load_file(folder / "model.safetensors")
    generation = json.loads((folder / "generation_config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(300, 50000, (12,), generator=generator).tolist()
    end = generation["eos_token_id"]
    listen_louder(weights)
    embedding = weights["model.decoder.embed_tokens.weight"]
    embedding[end] = torch.randn(embedding.shape[1], generator=generator) * 0.03
    generation["suppress_tokens"] = [i for i in range(len(embedding)) if i not in (*words, end)]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="session")
def export_here(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    """Export in this process, which has imported torch already: a second instead of ten."""

    def export(folder: Path, target: str, precision: str) -> Artifact:
        out = tmp_path_factory.mktemp("artifact") / f"{target}-{precision}"
        out.mkdir()
        build.export_in_process(str(folder), folder.name, target, precision, str(out), lambda stage: None)
        return Artifact.open(out)

    return export


@pytest.fixture(scope="session")
def talkative_artifact(talkative: Path, export_here: Callable[..., Artifact]) -> Artifact:
    """The talkative checkpoint, exported to CTranslate2."""
    return export_here(talkative, "ctranslate2", "fp32")


@pytest.fixture(scope="session")
def trained() -> Checkpoint:
    """The carried checkpoint."""
    return Checkpoint.open("reference")


@pytest.fixture(scope="session")
def clips() -> list[Path]:
    """The carried clips."""
    return sorted(reference.manifest_path().parent.glob("*.flac"))


@pytest.fixture(scope="session")
def recordings() -> Path:
    """The folder of real speech that is not part of the repository."""
    if not DATA.is_dir():
        pytest.skip(f"no real recordings: {DATA} does not exist (set ASR_EXPORT_DATA)")
    return DATA
