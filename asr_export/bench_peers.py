"""Speed of our runners beside the programs that people use instead: ``make bench-peers``.

Every contender is a process of its own; rounds are interleaved; its time is from samples to text, by the processor's clock and
the wall's. Of each --model it decodes the same window of noise to the same number of tokens; of each --judged model it hears
the clips of a manifest to their end, and its words are judged. What cannot take part is named, with the reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import click

from asr_export.cli import handle_errors, open_checkpoint, stage_progress

if TYPE_CHECKING:
    from asr_core.checkpoint import Checkpoint
    from parity.data import Utterance

PEERS = "parity.peers"
OURS = "ours"
ERRORS = "stderr"
SECONDS = 30  # of noise, which is one window


@dataclass(frozen=True)
class Contender:
    """Who is timed: its name in the table, adapter and interpreter, and what it opens."""

    name: str
    adapter: Path
    interpreter: str
    folder: Path
    precision: str


@dataclass(frozen=True)
class Task:
    """Files of raw samples with their languages, the number of forced tokens (None: to the end), what was said (or nothing)."""

    files: tuple[Path, ...]
    languages: tuple[str, ...]
    tokens: int | None
    said: tuple[str, ...] = ()


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, help="Checkpoint that decodes noise to --tokens tokens.")
@click.option("--judged", nargs=2, multiple=True, help="Checkpoint, and the manifest of the clips that it is judged on.")
@click.option("--artifacts", required=True, type=click.Path(exists=True, path_type=Path), help="Their artifacts.")
@click.option("--only", multiple=True, help="Contenders whose name contains this.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(3), help="After one that is not counted.")
@click.option("--tokens", default=100, show_default=True, type=click.IntRange(2, 170))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_file", required=True, type=click.Path(path_type=Path), help="Raw samples go here.")
@click.option("--markdown", type=click.Path(path_type=Path), help="The tables go here too.")
@click.option("--plot", type=click.Path(path_type=Path), help="The picture goes here: png, svg or pdf.")
@handle_errors
def main(
    models: tuple[str, ...], judged: tuple[tuple[str, str], ...], artifacts: Path, only: tuple[str, ...], rounds: int,
    tokens: int, threads: int, json_file: Path, markdown: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    """Run the command."""
    from asr_export import peers_report
    from parity import data, report

    panels: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="asr-export-peers-") as folder:
        scratch = Path(folder)
        for model, manifest in [*((model, None) for model in models), *judged]:
            checkpoint = open_checkpoint(model, None)
            task = spoken(data.read(Path(manifest)), scratch) if manifest else noise(tokens, scratch)
            found, absent = contenders(checkpoint, artifacts, only)
            panels[checkpoint.name] = measure(found, absent, task, scratch / checkpoint.name, rounds, threads)
            panels[checkpoint.name]["wer"] = word_error_rates(checkpoint, task, panels[checkpoint.name].pop("heard"))
    content = {"schema": 1, "host": report.host() | {"threads": threads}, "tokens": tokens, "panels": panels}
    report.write_json(json_file, content)
    written = peers_report.markdown(content)
    click.echo(written)
    if markdown:
        markdown.write_text(written, encoding="utf-8")
    if plot:
        peers_report.draw(plot, content)


def noise(tokens: int, scratch: Path) -> Task:
    """A window of noise: random weights hear nothing in anything."""
    import numpy as np

    file = scratch / "noise.f32"
    (0.1 * np.random.default_rng(0).standard_normal(SECONDS * 16_000)).astype("<f4").tofile(file)
    return Task((file,), ("en",), tokens)


def spoken(utterances: Sequence[Utterance], scratch: Path) -> Task:
    """Clips, decoded to samples."""
    from asr_core import audio

    files = tuple(scratch / f"{index}.f32" for index in range(len(utterances)))
    for file, utterance in zip(files, utterances, strict=True):
        audio.load_audio(utterance.path).astype("<f4").tofile(file)
    return Task(files, tuple(one.language for one in utterances), None, tuple(one.text for one in utterances))


def contenders(checkpoint: Checkpoint, artifacts: Path, only: Sequence[str]) -> tuple[list[Contender], dict[str, str]]:
    """Everyone who could be timed with a checkpoint, ours first, and why others cannot."""
    from asr_core import registry
    from asr_core.artifact import read_manifest
    from parity.session import discover

    made = {(m.target, m.precision): folder for folder in discover(artifacts, checkpoint.name) for m in [read_manifest(folder)]}
    adapter = registry.source(PEERS, OURS)
    found = [
        Contender(f"{OURS}: {target} {precision}", adapter, sys.executable, folder, precision)
        for (target, precision), folder in sorted(made.items())
        if registry.LAYOUT not in target
    ]
    absent = {}
    for name in registry.names(PEERS):
        if name == OURS:
            continue
        peer = registry.load(PEERS, name)
        interpreter = os.environ.get(peer.ENVIRONMENT)
        for precision in peer.PRECISIONS:
            title = f"{peer.PEER} {precision}"
            folder = checkpoint.path if peer.OPENS == "checkpoint" else made.get((peer.OPENS, precision))
            if interpreter is None:
                absent[title] = f"{peer.ENVIRONMENT} names no interpreter that has it"
            elif folder is None:
                absent[title] = f"it opens {peer.OPENS} {precision}, which was not exported"
            else:
                found.append(Contender(title, registry.source(PEERS, name), interpreter, folder, precision))
    return [one for one in found if not only or any(part in one.name for part in only)], absent


def measure(
    found: Sequence[Contender], absent: dict[str, str], task: Task, scratch: Path, rounds: int, threads: int
) -> dict[str, Any]:
    """Seconds of every contender in every round, and what it heard; who does not do the task is moved to the absent."""
    samples: dict[str, list[dict[str, float]]] = {}
    heard: dict[str, list[str]] = {}
    with ExitStack() as stack, stage_progress() as progress:
        bar = progress.add_task("peers", total=None, stage="load")
        running = {one.name: stack.enter_context(_process(one, scratch, threads)) for one in found}
        ready = {name: _ask(process, None) for name, process in running.items()}
        for number in range(rounds + 1):
            # There and back: whoever follows a heavy one finds the caches empty.
            turns = [*running.items()]
            for name, process in turns if number % 2 else reversed(turns):
                if not ready[name].get("ready"):
                    continue
                progress.update(bar, stage=f"round {number}/{rounds}: {name}")
                answers = _round(process, task)
                if "absent" in answers[-1]:
                    ready[name] = answers[-1]
                elif number:
                    clocks = {clock: sum(answer[clock] for answer in answers) for clock in ("cpu_s", "wall_s")}
                    samples.setdefault(name, []).append(clocks)
                    heard[name] = [answer["text"] for answer in answers]
    absent = absent | {name: answer["absent"] for name, answer in ready.items() if "absent" in answer}
    for name in absent:
        samples.pop(name, None)
    return {"samples": samples, "absent": absent, "heard": {name: heard[name] for name in samples}}


def word_error_rates(checkpoint: Checkpoint, task: Task, heard: dict[str, list[str]]) -> dict[str, float]:
    """By contender; empty where nothing was said."""
    if not task.said:
        return {}
    from parity.compare import word_errors
    from parity.session import normaliser

    normalise = normaliser(checkpoint)

    def normal(texts: Sequence[str]) -> list[str]:
        return [normalise(text, language) for text, language in zip(texts, task.languages, strict=True)]

    return {name: word_errors(normal(task.said), normal(texts)).rate or 0.0 for name, texts in heard.items()}


def _round(process: subprocess.Popen[str], task: Task) -> list[dict[str, Any]]:
    """One answer a file, up to the first that is none or has another length than was asked for."""
    answers = []
    for file, language in zip(task.files, task.languages, strict=True):
        answer = _ask(process, {"samples": str(file), "language": language, "tokens": task.tokens})
        if "absent" not in answer and task.tokens not in (None, answer["tokens"]):
            answer = {"absent": f"it made {answer['tokens']} tokens instead of {task.tokens}"}
        answers.append(answer)
        if "absent" in answer:
            break
    return answers


def _ask(process: subprocess.Popen[str], question: dict[str, Any] | None) -> dict[str, Any]:
    """The next answer; that of a process which has ended is that it ended."""
    put, get = cast("IO[str]", process.stdin), cast("IO[str]", process.stdout)
    try:
        if question is not None:
            put.write(json.dumps(question) + "\n")
            put.flush()
        line = get.readline()
    except BrokenPipeError:
        line = ""
    if line:
        return dict(json.loads(line))
    process.wait()
    last = (
        Path(cast("list[str]", process.args)[-1], ERRORS).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    )
    return {"absent": " ".join([f"its process ended with exit code {process.returncode}:", *last])}


@contextmanager
def _process(contender: Contender, scratch: Path, threads: int) -> Iterator[subprocess.Popen[str]]:
    from asr_core.isolate import THREAD_VARIABLES

    own = scratch / f"{contender.adapter.stem}-{contender.folder.name}-{contender.precision}"
    own.mkdir(parents=True, exist_ok=True)
    entry = contender.adapter.with_name("_entry.py")
    command = [contender.interpreter, "-P", entry, contender.adapter, contender.folder, contender.precision, threads, own]
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads)) | {"HF_HUB_OFFLINE": "1"}
    if contender.adapter.stem != OURS:
        environment.pop("PYTHONPATH", None)
    with (own / ERRORS).open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
