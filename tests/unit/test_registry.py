import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from asr_core import registry
from asr_core.errors import UnavailableError, UsageError

EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_names_are_the_files():
    names = registry.names("runners")
    assert {"ctranslate2", "onnx", "openvino", "pytorch"} <= set(names)
    assert not {"base", "__init__"} & set(names)
    assert names == sorted(names)


def test_an_unknown_target_lists_the_known_ones():
    known = ", ".join(registry.names("exporters"))
    with pytest.raises(UsageError, match=re.escape(f"unknown target 'whisper.cpp'; the known ones: {known}.")):
        registry.load("exporters", "whisper.cpp")


def test_a_layout_is_a_file_beside_its_target():
    assert "optimum" in registry.layouts("exporters", "onnx")
    assert not any("." in name or "optimum" in name for name in registry.names("exporters"))
    assert registry.load("exporters", "onnx.optimum").__name__ == "exporters._onnx_optimum"
    assert registry.requirements("onnx.optimum") == registry.requirements("onnx")


@pytest.mark.parametrize("package", ["exporters", "runners"])
def test_an_unknown_layout_lists_those_of_the_target(package):
    known = ", ".join(registry.layouts(package, "onnx"))
    with pytest.raises(UsageError, match=re.escape(f"onnx has no layout 'ggml'; it has these beside its own: {known}.")):
        registry.load(package, "onnx.ggml")
    with pytest.raises(UsageError, match="ncnn has no layout 'optimum'; it has only its own"):
        registry.load(package, "ncnn.optimum")


@pytest.mark.parametrize("extra", EXTRAS)
def test_requirements_are_pyprojects(extra):
    assert registry.requirements(extra) == sorted(re.split(r"[\[<>=~! ]", package)[0] for package in EXTRAS[extra])


def test_requirements_of_an_unknown_extra():
    assert registry.requirements("whisper.cpp") == []


def test_require_names_what_is_missing(monkeypatch):
    real = metadata.version

    def version(package: str) -> str:
        if package in ("onnxruntime", "torch"):
            raise metadata.PackageNotFoundError(package)
        return real(package)

    registry.require("onnx", "export")
    monkeypatch.setattr(metadata, "version", version)
    message = "onnx needs onnxruntime, torch, not installed here: pip install 'asr-export[onnx,export]'"
    with pytest.raises(UnavailableError, match=re.escape(message)):
        registry.require("onnx", "export")
    with pytest.raises(UnavailableError, match=re.escape("pip install 'asr-export[onnx]'")):
        registry.require("onnx")


def test_source_is_the_module():
    assert registry.source("exporters", "ctranslate2") == Path(registry.load("exporters", "ctranslate2").__file__)
