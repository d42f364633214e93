"""A reference interpreter for Core ML programs: what a saved ``.mlpackage`` computes, on machines that have no Core ML.

It executes the program that was saved, operation by operation, in float32, and rounds every result to the type that the program
declares for it. So it proves the graph, the weights and the rounding to types; it says nothing about the arithmetic inside
Apple's units, and nothing about speed. What it doesn't know is an error, never a guess.

Floating-point tensors of any declared type are kept as float32, integers as int64.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from asr_core import registry
from asr_core.errors import UnavailableError
from runners.coreml import NEIGHBOURS

WEIGHTS = "Data/com.apple.CoreML/weights"

State = dict[str, Tensor]
Values = dict[str, Tensor]
Round = Callable[[Tensor], Tensor]

# How a result is rounded to its declared type; None where it is held as it is.
ROUNDING: dict[str, Round | None] = {
    "fp32": None,
    "bool": None,
    "fp16": lambda x: x.half().float(),
    "int32": lambda x: x.to(torch.int32).long(),
    "int16": lambda x: x.to(torch.int16).long(),
    "uint16": lambda x: x & 0xFFFF,
}


@dataclass(frozen=True)
class Known:
    """An operation that the interpreter knows.

    The function's parameters are named as the operation's inputs; their annotations tell which are tensors and which must be
    constants. ``moves`` tells that results are values of the inputs, which need no rounding.
    """

    function: Callable[..., Any]
    moves: bool
    inputs: Mapping[str, str]


@dataclass
class Step:
    """One operation, compiled: ``names`` are the values that it reads and makes, ``done`` those that nothing reads later."""

    run: Callable[[Values, State], None]
    names: list[str]
    place: str
    done: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Declared:
    """Name, shape and type of a value as the program declares it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, var: Any) -> Declared:
        """Read a variable's declaration."""
        from coremltools.converters.mil.mil import types

        return cls(var.name, tuple(var.shape), types.builtin_to_string(var.dtype))

    def hold(self, array: NDArray[Any]) -> Tensor:
        """An array as the value, rounded to the declared type."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        rounding = ROUNDING[self.dtype]
        if not tensor.is_floating_point():
            return tensor if self.dtype == "bool" else tensor.long()
        return rounding(tensor.float()) if rounding else tensor.float()


class Program:
    """A saved program, loaded and compiled."""

    def __init__(self, package: Path) -> None:
        self.package = package
        function = _load(package)
        placed = function.inputs.values()
        self.inputs = {var.name: Declared.of(var) for var in placed if not _is_state(var)}
        self.states = {var.name: Declared.of(var) for var in placed if _is_state(var)}
        self.outputs = [var.name for var in function.outputs]
        self._constants: Values = {}
        self._steps = [self._compile(op) for op in function.operations if not _is_constant(op)]
        self._plan_release()

    def adopt(self, name: str, array: Any) -> Tensor:
        """An array as the value of the input ``name``; tensors are values already."""
        return array if isinstance(array, Tensor) else self.inputs[name].hold(array)

    def make_state(self) -> State:
        """Every state, filled with zeros."""
        return {name: torch.zeros(declared.shape) for name, declared in self.states.items()}

    def copy_state(self, state: State) -> State:
        """The state once more, to go on from separately."""
        return deepcopy(state)

    @torch.inference_mode()
    def predict(self, inputs: Mapping[str, Any], state: State | None = None) -> Values:
        """Run the program: arrays or adopted tensors by name → tensors by name; ``state`` is changed in place."""
        values = dict(self._constants)
        for name, declared in self.inputs.items():
            given = inputs[name]
            if tuple(given.shape) != declared.shape:
                raise ValueError(f"{self.package.name}: {name} is {list(given.shape)}, the program says {list(declared.shape)}.")
            values[name] = self.adopt(name, given)
        memory = {} if state is None else state
        for step in self._steps:
            try:
                step.run(values, memory)
            except NotImplementedError as error:
                raise self._stop(step.place, str(error)) from error
            for name in step.done:
                del values[name]
        return {name: values[name] for name in self.outputs}

    def _compile(self, op: Any) -> Step:
        place = f"{op.op_type} ({', '.join(var.name for var in op.outputs)})"
        if op.op_type == "read_state":
            return _read_state(op, place)
        if op.op_type == "coreml_update_state":
            self._decompress([op.value])
            return _update_state(op, place)
        known = KNOWN.get(op.op_type)
        if known is None:
            raise self._stop(place, "it doesn't know this operation")
        sources: dict[str, str | list[str]] = {}
        constants: dict[str, Any] = {}
        for name, given in op.inputs.items():
            if given is None:
                continue
            kind = known.inputs.get(name)
            if kind is None:
                raise self._stop(place, f"it doesn't know the input {name!r}")
            if "Tensor" in kind:
                several = list(given) if isinstance(given, (list, tuple)) else None
                self._decompress(several or [given])
                sources[name] = [var.name for var in several] if several else given.name
            elif given.val is None:
                raise self._stop(place, f"the input {name!r} isn't a constant")
            else:
                constants[name] = np.asarray(given.val).tolist()
        return _call(known, sources, constants, [Declared.of(var) for var in op.outputs], place)

    def _decompress(self, variables: Iterable[Any]) -> None:
        """Keep the values of those variables that are constants, compressed or not, as tensors."""
        for var in variables:
            if var.op is not None and _is_constant(var.op) and var.name not in self._constants:
                self._constants[var.name] = Declared.of(var).hold(np.asarray(_constant(var)))

    def _plan_release(self) -> None:
        """Find after which step each value is needed no more: kept, an encoder's attention matrices would fill any memory."""
        seen = {*self._constants, *self.outputs}
        for step in reversed(self._steps):
            step.done = [name for name in dict.fromkeys(step.names) if name not in seen]
            seen.update(step.names)

    def _stop(self, place: str, why: str) -> UnavailableError:
        return UnavailableError(
            f"{self.package}: the interpreter of Core ML programs stops at {place}: {why}. Core ML itself needs macOS 13+."
        )


def _load(package: Path) -> Any:
    """The program's main function, with its weights."""
    ct = registry.import_alone("coremltools", without=NEIGHBOURS)
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = ct.utils.load_spec(str(package))
    return load(spec, spec.specificationVersion, str(package / WEIGHTS)).functions["main"]


def _is_state(var: Any) -> bool:
    from coremltools.converters.mil.mil import types

    return bool(types.is_state(var.sym_type))


def _is_constant(op: Any) -> bool:
    return str(op.op_type).startswith("const")  # const, constexpr_lut_to_dense, …


def _constant(var: Any) -> Any:
    """The value of a constant, compressed or not; coremltools itself does not see that a palette can be compressed, too."""
    if var is None or var.val is not None:
        return None if var is None else var.val
    nested = [part for part in var.op.inputs.values() if part is not None and part.val is None]
    if not nested:
        return var.op.materialized_val_inference()
    parts = inspect.signature(var.op.decompress).parameters
    return var.op.decompress(**{name: _constant(var.op.inputs.get(name)) for name in parts})


def _read_state(op: Any, place: str) -> Step:
    state, out = op.input.name, op.outputs[0].name

    def run(values: Values, memory: State) -> None:
        values[out] = memory[state]

    return Step(run, [out], place)


def _update_state(op: Any, place: str) -> Step:
    """Write a state, rounded to its type; the result is what a later read would give."""
    state, value, out = Declared.of(op.state), op.value.name, op.outputs[0].name
    rounding = ROUNDING[state.dtype]

    def run(values: Values, memory: State) -> None:
        new = values[value]
        memory[state.name] = values[out] = rounding(new) if rounding else new

    return Step(run, [value, out], place)


def _call(
    known: Known, sources: Mapping[str, str | list[str]], constants: Mapping[str, Any], outputs: list[Declared], place: str
) -> Step:
    """An operation as a closure over its constants, which finds its tensors by name and checks the shapes of its results."""
    function = partial(known.function, **constants)
    single = {name: source for name, source in sources.items() if isinstance(source, str)}
    several = {name: source for name, source in sources.items() if not isinstance(source, str)}
    out = [(declared.name, declared.shape, None if known.moves else ROUNDING[declared.dtype]) for declared in outputs]

    def run(values: Values, _memory: State) -> None:
        given: dict[str, Any] = {name: values[source] for name, source in single.items()}
        for name, many in several.items():
            given[name] = [values[source] for source in many]
        results = function(**given)
        for (name, shape, rounding), result in zip(out, results if len(out) > 1 else (results,), strict=True):
            if result.shape != shape:
                raise NotImplementedError(f"it makes {list(result.shape)} where the program says {list(shape)}")
            values[name] = rounding(result) if rounding else result

    read = [*single.values(), *(source for many in several.values() for source in many)]
    return Step(run, [*read, *(declared.name for declared in outputs)], place)


# --- what the operations mean (coremltools' documentation of its MIL operations); parameters carry the operations' own names

KNOWN: dict[str, Known] = {}


def _operation(function: Callable[..., Any], *, moves: bool = False) -> Callable[..., Any]:
    inputs = {name: str(parameter.annotation) for name, parameter in inspect.signature(function).parameters.items()}
    KNOWN[function.__name__.strip("_")] = Known(function, moves, inputs)
    return function


_moving = partial(_operation, moves=True)


def _elementwise(name: str, meaning: Callable[[Tensor, Tensor], Tensor]) -> None:
    def named(x: Tensor, y: Tensor) -> Tensor:
        return meaning(x, y)

    KNOWN[name] = Known(named, moves=False, inputs={"x": "Tensor", "y": "Tensor"})


for _name in ("add", "sub", "mul", "maximum", "minimum", "greater", "greater_equal", "less", "less_equal", "logical_and"):
    _elementwise(_name, getattr(torch, _name))
_elementwise("equal", torch.eq)
_elementwise("not_equal", torch.ne)
_elementwise("real_div", torch.true_divide)


@_operation
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


@_operation
def _matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return (x.transpose(-1, -2) if transpose_x else x) @ (y.transpose(-1, -2) if transpose_y else y)


CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d}


@_operation
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    if pad_type not in ("valid", "custom"):
        raise NotImplementedError(f"it doesn't know pad_type {pad_type!r}")
    axes = x.ndim - 2
    if axes not in CONVOLUTIONS:
        raise NotImplementedError(f"it doesn't convolve over {axes} axes")
    if pad_type == "custom" and pad:
        # MIL pads [before, after] from the first axis on, torch from the last one on.
        x = F.pad(x, [amount for axis in reversed(range(axes)) for amount in pad[2 * axis : 2 * axis + 2]])
    ones = [1] * axes
    return CONVOLUTIONS[axes](x, weight, bias, strides or ones, [0] * axes, dilations or ones, groups)


@_operation
def _layer_norm(x: Tensor, axes: list[int], gamma: Tensor, beta: Tensor, epsilon: float = 1e-5) -> Tensor:
    if [axis % x.ndim for axis in axes] != list(range(x.ndim - len(axes), x.ndim)):
        raise NotImplementedError(f"it normalises over the last axes, not {axes}")
    return F.layer_norm(x, x.shape[-len(axes) :], gamma, beta, epsilon)


@_operation
def _gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode != "EXACT":
        raise NotImplementedError(f"it doesn't know mode {mode!r}")
    return F.gelu(x)


@_operation
def _softmax(x: Tensor, axis: int = -1) -> Tensor:
    return x.softmax(axis)


@_operation
def _reduce_sum(x: Tensor, axes: list[int], keep_dims: bool = False) -> Tensor:
    return x.sum(axes, keepdim=keep_dims)


@_operation
def _reduce_mean(x: Tensor, axes: list[int], keep_dims: bool = False) -> Tensor:
    return x.mean(axes, keep_dims)


@_operation
def _reduce_max(x: Tensor, axes: list[int], keep_dims: bool = False) -> Tensor:
    return x.amax(axes, keep_dims)


@_operation
def _log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return (x + epsilon).log()


@_operation
def _cast(x: Tensor, dtype: str) -> Tensor:
    if dtype == "bool":
        return x != 0
    return x.float() if dtype.startswith("fp") else x.long()


@_moving
def _identity(x: Tensor) -> Tensor:
    return x


@_moving
def _transpose(x: Tensor, perm: list[int]) -> Tensor:
    return x.permute(perm)


@_moving
def _reshape(x: Tensor, shape: list[int]) -> Tensor:
    return x.reshape(shape)


@_moving
def _expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@_moving
def _squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(axes)


@_moving
def _tile(x: Tensor, reps: list[int]) -> Tensor:
    if all(size == 1 or times == 1 for size, times in zip(x.shape, reps, strict=True)):
        return x.expand([size * times for size, times in zip(x.shape, reps, strict=True)])
    return x.tile(reps)


@_moving
def _concat(values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
    if interleave:
        raise NotImplementedError("it doesn't interleave")
    return torch.cat(values, axis)


@_moving
def _split(x: Tensor, axis: int, split_sizes: list[int] | None = None, num_splits: int | None = None) -> tuple[Tensor, ...]:
    if split_sizes is None:
        split_sizes = [x.shape[axis] // (num_splits or 1)] * (num_splits or 1)
    return tuple(x.split(split_sizes, axis))


@_moving
def _select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


@_moving
def _gather(x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:  # noqa: ARG001
    # Indices are always validated: torch refuses negative ones and those beyond the end.
    if batch_dims:
        raise NotImplementedError("it doesn't gather in batches")
    axis %= x.ndim
    picked = x.index_select(axis, indices.reshape(-1))
    return picked.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def _slices(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None,
    begin_mask: list[bool] | None,
    end_mask: list[bool] | None,
    squeeze_mask: list[bool] | None,
) -> tuple[slice | int, ...]:
    """What the slicing operations address, as an index: masked bounds are the axis's own, squeezed axes take one element."""
    no = [False] * x.ndim
    steps = stride or [1] * x.ndim
    if min(steps) < 1:
        raise NotImplementedError("it doesn't slice backwards")
    masks = zip(begin_mask or no, end_mask or no, squeeze_mask or no, strict=True)
    return tuple(
        first if squeezed else slice(None if from_start else first, None if to_end else last, step)
        for first, last, step, (from_start, to_end, squeezed) in zip(begin, end, steps, masks, strict=True)
    )


@_moving
def _slice_by_index(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    return x[_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


@_moving
def _slice_update(
    x: Tensor,
    update: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    updated = x.clone()
    updated[_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)] = update
    return updated
