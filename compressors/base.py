"""What a method is: a module in :mod:`compressors.methods` with typed parameters and ``apply``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from pydantic import Field, ValidationError

from asr_core import registry
from asr_core.compressed import Effect
from asr_core.dims import Frozen
from asr_core.errors import UsageError
from asr_core.isolate import Progress

if TYPE_CHECKING:
    from compressors.calibration import Calibration
    from compressors.model import Model

METHODS = "compressors.methods"


class Parameters(Frozen):
    """Base of every method's parameters."""


class OnLinears(Parameters):
    """Parameters of a method that treats linear layers one by one."""

    only: list[str] = Field(
        default=[], description="patterns of the weights to treat, as model.decoder.*.fc?.weight; all if empty"
    )


@dataclass(frozen=True)
class Applied:
    """What a method made of a model, and its effect on each tensor that it changed."""

    model: Model
    effects: list[Effect]


class Method(Protocol):
    """A module in ``compressors/methods``.

    ``apply`` changes nothing in place. A method that trains gets the same: it may write checkpoints of its own wherever its
    parameters say, and returns the finished model.
    """

    Parameters: type[Parameters]

    def apply(self, model: Model, parameters: Any, calibration: Calibration, progress: Progress) -> Applied:
        """Compress the model; raises :class:`UsageError` for parameters that don't fit it."""
        ...


def names() -> list[str]:
    """Every method, by name."""
    return registry.names(METHODS)


def method(name: str) -> Method:
    """Load a method; raises :class:`UsageError`, listing the known ones, for an unknown name."""
    if name not in names():
        raise UsageError(f"unknown method {name!r}; the known ones: {', '.join(names())}.")
    return cast("Method", registry.load(METHODS, name))


def parameters(name: str, given: dict[str, Any]) -> Parameters:
    """Check a method's parameters; raises :class:`UsageError` naming every wrong one."""
    wanted = method(name).Parameters
    try:
        return wanted.model_validate(given)
    except ValidationError as error:
        faults = "; ".join(_fault(fault) for fault in error.errors())
        raise UsageError(f"{name}: {faults}. Its parameters: {', '.join(wanted.model_fields)}.") from None


def _fault(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}" if where else message
