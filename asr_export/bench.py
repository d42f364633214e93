"""``asr-bench``: decode and encoder speed of every runner as ratios to PyTorch, interleaved in one run.

Each runner lives in a process of its own with its threads pinned; in every round each does the same work in turn, so that a
machine that speeds up or slows down does so for all of them. PyTorch is transformers with scaled-dot-product attention and a
KV cache. A second table holds decoding against the least that a step has to read from memory; where the time of the one farthest
from it goes is said by operation.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asr_export import profile
from asr_export.cli import checkpoint_options, handle_errors, open_checkpoint, stage_progress

if TYPE_CHECKING:
    from rich.table import Table

    from asr_core.dims import Dims
    from runners.base import Runner

REFERENCE = "pytorch-fp32"
PROMPT = 4  # tokens before the forced ones
PARTS = ("encode_s", "prompt_s", "decode_s")
Sample = dict[str, float | None]
Samples = dict[str, list[Sample]]


@dataclass(frozen=True)
class Contender:
    """One runner to time: its name in the table, its target, what it opens, and for PyTorch perhaps which variant."""

    name: str
    target: str
    path: Path
    variant: str | None = None
    provider: str | None = None


@click.command(help=__doc__)
@checkpoint_options
@click.option("--artifacts", type=click.Path(exists=True, path_type=Path), help="Its artifacts.")
@click.option(
    "--variant", "variants", multiple=True, help="A way to speed PyTorch up; 'all', or one of those that a wrong one lists."
)
@click.option("--provider", "providers", multiple=True, help="ONNX artifacts on a GPU, too: cuda, tensorrt.")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(3), help="Interleaved rounds.")
@click.option("--tokens", default=100, show_default=True, type=click.IntRange(1, 400), help="Forced tokens a window.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_file", required=True, type=click.Path(path_type=Path), help="Raw samples go here.")
@handle_errors
def main(
    model: str,
    adapter: str | None,
    artifacts: Path | None,
    variants: tuple[str, ...],
    providers: tuple[str, ...],
    rounds: int,
    tokens: int,
    threads: int,
    json_file: Path,
) -> None:
    """Run the command."""
    from rich.console import Console

    from asr_core.artifact import read_manifest
    from parity import report
    from parity.session import discover

    checkpoint = open_checkpoint(model, adapter)
    folders = discover(artifacts, checkpoint.name) if artifacts else []
    contenders = [Contender(REFERENCE, "pytorch", checkpoint.path)]
    contenders += [Contender(f"pytorch {name}", "pytorch", checkpoint.path, name) for name in _chosen(variants)]
    contenders += [Contender(f"{m.target}-{m.precision}", m.target, f) for f in folders for m in [read_manifest(f)]]
    contenders += _on_providers(contenders, providers)
    samples = measure(contenders, rounds, tokens, threads)
    on_cpu = [c for c in contenders if c.name in samples and c.variant is None and c.provider is None]
    roofs = _roofs(checkpoint.dims, on_cpu, tokens, threads)
    content = {"schema": 2, "host": report.host() | {"threads": threads}, "model": checkpoint.name, "tokens": tokens}
    report.write_json(json_file, content | {"samples": samples, "roofs": {name: asdict(roof) for name, roof in roofs.items()}})
    terminal = Console()
    terminal = terminal if terminal.is_terminal else Console(width=140)
    terminal.print(table(samples))
    reached = {name: roof.floor_s / _step_s(samples[name], tokens) for name, roof in roofs.items()}
    terminal.print(roofline(samples, roofs, reached, tokens))
    slowest = _slowest(contenders, reached, threads)
    if slowest:
        terminal.print(profile.table([slowest]))


@dataclass(frozen=True)
class Roof:
    """What a decode step reads at least, and the seconds that memory takes to hand it over."""

    bytes: int
    floor_s: float


def _roofs(dims: Dims, contenders: list[Contender], tokens: int, threads: int) -> dict[str, Roof]:
    from asr_core import isolate
    from asr_core.artifact import read_manifest
    from parity.roofline import FLOAT32, cache_bytes, step_bytes

    outcome = isolate.run("parity.roofline:bandwidth", {}, threads=threads)
    speed = isolate.result_or_raise(outcome, "timing the memory")["bytes_per_s"]
    roofs = {}
    for contender in contenders:
        precision, width = "fp32", FLOAT32
        if contender.name != REFERENCE:
            manifest = read_manifest(contender.path)
            precision, width = manifest.precision, cache_bytes(manifest.tensors)
        size = step_bytes(dims, precision, width, PROMPT + (tokens - 1) / 2)
        roofs[contender.name] = Roof(size, size / speed)
    return roofs


def _step_s(own: list[Sample], tokens: int) -> float:
    return statistics.median(sample["decode_s"] or 0.0 for sample in own) / tokens


def roofline(samples: Samples, roofs: dict[str, Roof], reached: dict[str, float], tokens: int) -> Table:
    """Bytes of a step, the floor that memory sets, and the share of it that is reached."""
    from rich.table import Table

    speed = max(roof.bytes / roof.floor_s for roof in roofs.values()) / 1e9
    out = Table(title=f"Decode steps and the memory's floor, {speed:.1f} GB/s measured", title_justify="left")
    out.add_column("runner", no_wrap=True)
    for head in ("MB a step", "floor ms", "step ms", "share"):
        out.add_column(head, justify="right", no_wrap=True)
    for name, roof in roofs.items():
        step = _step_s(samples[name], tokens)
        out.add_row(name, f"{roof.bytes / 1e6:.1f}", f"{1000 * roof.floor_s:.2f}", f"{1000 * step:.2f}", f"{reached[name]:.0%}")
    return out


def _slowest(contenders: list[Contender], reached: dict[str, float], threads: int) -> tuple[str, Any] | None:
    """The profile of the runner that is farthest from its floor, of those whose runtimes tell."""
    from asr_core import isolate

    known = {contender.name: contender for contender in contenders}
    for name in sorted(reached, key=reached.__getitem__):
        given = {"target": known[name].target, "path": str(known[name].path), "threads": threads, "windows": 2, "steps": 20}
        outcome = isolate.run("parity.profile:measure", given, threads=threads)
        calls = isolate.result_or_raise(outcome, f"profiling {name}")["calls"]
        if calls is not None:
            return name, calls
    return None


def _chosen(variants: tuple[str, ...]) -> tuple[str, ...]:
    """The names of variants; raises :class:`UsageError` for an unknown one."""
    if not variants:
        return ()
    from asr_core.errors import UsageError
    from runners._pytorch_variants import NAMES

    if "all" in variants:
        return NAMES
    unknown = sorted(set(variants) - set(NAMES))
    if unknown:
        raise UsageError(f"PyTorch has no variant {unknown[0]!r}; it has: {', '.join(NAMES)}.")
    return variants


def _on_providers(contenders: list[Contender], providers: tuple[str, ...]) -> list[Contender]:
    """Those whose runtimes have providers, once more on each; raises :class:`UsageError` for one that none of them knows."""
    from asr_core.errors import UsageError
    from runners.base import providers_of

    known = {c.name: providers_of(c.target) for c in contenders} if providers else {}
    unknown = set(providers).difference(*known.values())
    if unknown:
        raise UsageError(f"no artifact here runs on {min(unknown)!r}: ONNX's run on cuda and tensorrt.")
    return [
        replace(one, name=f"{one.name} {provider}", provider=provider)
        for provider in providers
        for one in contenders
        if provider in known[one.name]
    ]


def measure(contenders: list[Contender], rounds: int, tokens: int, threads: int, *, processor: bool = False) -> Samples:
    """Seconds of every contender in every round, one warm-up round not counted: see :func:`_once`.

    With ``processor``, those that it computed: what else runs on a busy machine then counts less.
    """
    samples: Samples = {contender.name: [] for contender in contenders}
    with ExitStack() as stack, stage_progress() as progress:
        bar = progress.add_task("benchmark", total=None, stage="load")
        pipes = {c.name: stack.enter_context(_process(c, tokens, threads, processor=processor)) for c in contenders}
        for name, pipe in list(pipes.items()):
            needs = pipe.recv()
            if needs:
                click.echo(f"{name}: not measured, {needs}")
                del pipes[name], samples[name]
        for number in range(rounds + 1):
            for name, pipe in pipes.items():
                progress.update(bar, stage=f"round {number}/{rounds}: {name}")
                pipe.send("go")
                sample = pipe.recv()
                if number:
                    samples[name].append(sample)
    return samples


def table(samples: Samples) -> Table:
    """Median ratios to PyTorch of the same round, with their spread; a dash where a runtime does not tell."""
    import numpy as np
    from rich.table import Table

    out = Table(title="Speed-up over PyTorch: median of the rounds (lowest to highest), median ms", title_justify="left")
    out.add_column("runner", no_wrap=True)
    for part in PARTS:
        out.add_column(part.removesuffix("_s"), justify="right", no_wrap=True)
    for name, own in samples.items():
        cells = []
        for part in PARTS:
            pairs = [
                (_comparable(base, sample, part), sample[part]) for base, sample in zip(samples[REFERENCE], own, strict=True)
            ]
            times = [time for _, time in pairs if time is not None]
            ratios = [base / time for base, time in pairs if time is not None]
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
            cells.append(f"{np.median(ratios):.2f}× {spread} {1000 * np.median(times):.1f}" if ratios else "–")
        out.add_row(name, *cells)
    return out


def _comparable(base: Sample, sample: Sample, part: str) -> float:
    """PyTorch's seconds for the same work: a runtime that decodes by itself counts its prompt with the rest."""
    seconds = base[part] or 0.0
    if part == "decode_s" and sample["prompt_s"] is None:
        return seconds + (base["prompt_s"] or 0.0)
    return seconds


@contextmanager
def _process(contender: Contender, tokens: int, threads: int, *, processor: bool) -> Iterator[Connection]:
    from asr_core.isolate import THREAD_VARIABLES

    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # A spawned process takes the environment of the moment.
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    process = context.Process(target=_serve, args=(contender, tokens, threads, theirs, processor), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()


def _serve(contender: Contender, tokens: int, threads: int, pipe: Any, processor: bool) -> None:
    import numpy as np

    from asr_core.errors import UnavailableError

    try:
        runner = _open(contender, threads)
    except UnavailableError as error:
        pipe.send(str(error))
        return
    pipe.send("" if runner.timed else f"needs {runner.timing_needs}")
    generator = np.random.default_rng(0)
    mel = generator.standard_normal((1, runner.dims.n_mels, 3000)).astype(np.float32)
    forced = generator.integers(0, runner.tokens.end, tokens)
    clock = time.process_time if processor else time.perf_counter
    while pipe.recv():
        pipe.send(_once(runner, mel, forced, clock))


def _open(contender: Contender, threads: int) -> Runner:
    from runners import base

    if contender.variant is None:
        return base.open_runner(contender.target, contender.path, threads, contender.provider)
    from runners import _pytorch_variants

    return _pytorch_variants.open(contender.path, threads, contender.variant)


def _once(runner: Runner, mel: Any, forced: Any, clock: Callable[[], float]) -> Sample:
    """Seconds to encode one window, to take in the prompt, and to decode forced tokens one by one.

    A runtime that decodes by itself decodes as many free tokens instead and does not tell the prompt's share: None.
    """
    import numpy as np

    from asr_core.decode import DecodeOptions
    from runners.base import StepRunner

    if not isinstance(runner, StepRunner):
        decoded = runner.generate(mel, DecodeOptions(max_new_tokens=len(forced)))[0]
        scale = len(forced) / max(1, len(decoded.tokens))
        return {"encode_s": decoded.timings.encode_s, "prompt_s": None, "decode_s": decoded.timings.decode_s * scale}
    started = clock()
    state = runner.encode(mel)
    encoded = clock()
    runner.step(np.array([runner.tokens.prompt()], np.int64), state)
    prompted = clock()
    for token in forced:
        runner.step(np.array([[token]], np.int64), state)
    return {"encode_s": encoded - started, "prompt_s": prompted - encoded, "decode_s": clock() - prompted}
