"""Recipes: the methods to apply, one after the other, with their parameters; YAML, and faults are told with their line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from asr_core.errors import UsageError
from compressors import base
from compressors.base import Parameters


@dataclass(frozen=True)
class Planned:
    """One step that will be run."""

    method: str
    parameters: Parameters


@dataclass(frozen=True)
class Recipe:
    """A recipe file: its steps, what to call it, and the artifacts that its form is for, as ``onnx-int4``."""

    title: str
    steps: list[Planned]
    artifacts: list[str]


def plan(method: str, settings: Sequence[str]) -> Planned:
    """One step from a method's name and ``key=value`` settings, whose values are YAML: ``4``, ``true``, ``[0, 2]``."""
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"{setting!r} is not KEY=VALUE.")
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"the value of {setting!r} cannot be read ({_problem(error)}).") from error
    return Planned(method, base.parameters(method, given))


def read(file: Path) -> list[Planned]:
    """The steps of a recipe file: ``steps``, a list of ``method: {parameter: value, …}``.

    Raises :class:`UsageError` with the line where a step is unknown, or its parameters don't fit.
    """
    return read_whole(file).steps


def read_whole(file: Path) -> Recipe:
    """The same with what may stand beside the steps: ``title`` (else the file's name) and ``artifacts``."""
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)
    except FileNotFoundError:
        raise UsageError(f"{file}: no such recipe.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not YAML ({_problem(error)}).") from error
    parts = _parts(root)
    steps = parts.pop("steps", None)
    if not isinstance(steps, yaml.SequenceNode) or not steps.value or parts.keys() - {"title", "artifacts"}:
        raise UsageError(
            f"{file} has no steps. A recipe is 'steps:' and a list of '- METHOD: {{PARAMETER: VALUE}}', beside them at most "
            "'title:' and 'artifacts:'."
        )
    given = {name: yaml.SafeLoader("").construct_object(node, deep=True) for name, node in parts.items()}
    planned = [_planned(file, step) for step in steps.value]
    return Recipe(str(given.get("title", file.stem)), planned, [str(name) for name in given.get("artifacts", [])])


def _parts(root: yaml.Node | None) -> dict[str, yaml.Node]:
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    return {key.value: value for key, value in pairs}


def _planned(file: Path, step: yaml.Node) -> Planned:
    where = f"{file}, line {step.start_mark.line + 1}"
    loader = yaml.SafeLoader("")
    content = loader.construct_object(step, deep=True)
    if isinstance(content, str):
        content = {content: None}
    if not isinstance(content, dict) or len(content) != 1:
        raise UsageError(f"{where}: a step is one METHOD: {{PARAMETER: VALUE}}.")
    ((name, given),) = content.items()
    if not isinstance(given, dict | None):
        raise UsageError(f"{where}: the parameters of {name} are {given!r}, not PARAMETER: VALUE.")
    try:
        return Planned(str(name), base.parameters(str(name), given or {}))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _problem(error: Exception) -> str:
    return " ".join(str(error).split())
