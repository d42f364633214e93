"""A fleet: measurements cut into units that Dask's workers do, each where a worker carries the label of its hardware.

Dask decides who does what; the results are files in a share, so that a killed worker costs the unit that it was at. What is here
is the client's side: cutting, submitting, trying again, running stragglers a second time, putting the pieces together.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from distributed import Client, Future, LocalCluster, get_worker

from asr_core import isolate, registry
from asr_core.errors import UnavailableError
from asr_core.isolate import Outcome
from parity import data, measure, resume, units, weights
from parity.measurers import LOCAL, Request, UnitTime
from parity.share import Share
from parity.units import Unit

TOPIC = "asr-parity"
ATTEMPTS = 3
# A unit is a straggler when it runs for longer than this many times the median of its kind, and than this many seconds.
STRAGGLER, LEAST_STRAGGLER_S = 3.0, 10.0
KNOWN = 3  # finished units that make a median
# A worker with a label may be restarting; without one for longer than this, nothing can go on.
NOBODY_S = 60.0
MOST_TIMES = 10_000  # units whose times are kept: enough to draw others from
TICK_S = 0.5
CHECK_S = 5.0
CONNECT_S = 30.0


@dataclass
class Plan:
    """One measurement on its way: its units, and the answers so far by unit; ``failed`` is what ended it."""

    request: Request
    units: list[Unit]
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    failed: Outcome | None = None

    @property
    def done(self) -> bool:
        """Whether nothing is waited for any more."""
        return self.failed is not None or len(self.answers) == len(self.units)

    @property
    def label(self) -> str:
        """The label that its workers carry."""
        return label_of(self.request.target)

    def kind(self, unit: Unit) -> str:
        """What a unit's duration can be compared with."""
        return data.CASES if unit.level else self.request.folder.name


@dataclass
class Attempt:
    """One submission of a unit; ``since`` is when it began, at the ``worker``."""

    plan: Plan
    unit: Unit
    future: Future
    since: float | None = None
    worker: str = ""
    repeated: bool = False


def label_of(target: str) -> str:
    """The label of the workers that can run a target: its name, whatever the layout."""
    return target.partition(registry.LAYOUT)[0]


class Fleet:
    """A :class:`~parity.measurers.Measurer` over a Dask cluster; ``size`` is the number of utterances of one unit."""

    def __init__(self, client: Client, share: Share, size: int) -> None:
        self.client, self.share, self.size = client, share, size
        self.times: list[UnitTime] = []
        self._plans: dict[str, Plan] = {}
        self._attempts: dict[str, Attempt] = {}
        self._durations: dict[str, list[float]] = defaultdict(list)
        self._finished: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._labels: tuple[float, dict[str, set[str]]] = (-np.inf, {})
        self._seen: dict[str, float] = {}
        self._submitted = 0
        self._utterances: list[data.Utterance] = []
        self._n_mels = 0
        self._published: set[str] = set()
        self._shards: list[range] = []
        self._code = resume.code_version()
        client.subscribe_topic(TOPIC, self._begun)

    def prepare(self, utterances: list[data.Utterance], n_mels: int, work: Path) -> None:
        """Cut the utterances into shards; whichever worker measures one first makes its features."""
        self._utterances, self._n_mels = utterances, n_mels
        self._shards = units.shards(len(utterances), self.size)

    def require(self, target: str) -> None:
        """Raise :class:`UnavailableError` where no worker carries the target's label."""
        if not self._carriers(label_of(target)):
            raise UnavailableError(f"no worker of the cluster carries the label {label_of(target)!r}.")

    def expect(self, requests: Iterable[Request], timeout: float | None) -> None:
        """Submit the units of measurements, the first ones first."""
        for request in requests:
            self._plan(request, timeout)

    def measure(self, request: Request, progress: isolate.Progress, timeout: float | None) -> Outcome:
        """Wait until the units of a measurement are done, and put their files together in its folder."""
        plan = self._plan(request, timeout)
        self._await(plan, progress)
        if plan.failed:
            return plan.failed
        outcomes = self._gather(plan)
        if request.reference is None and request.level:  # PyTorch's cases are forced to its own tokens
            own = replace(request, reference=request.folder)
            cases = self._begin(Plan(own, [self._cases(own, timeout)]), f"{request.folder.name}-{data.CASES}")
            self._await(cases, progress)
            if cases.failed:
                return cases.failed
            outcomes += self._gather(cases)
        return units.joined(outcomes)

    def _await(self, plan: Plan, progress: isolate.Progress) -> None:
        while not plan.done:
            self._next_event()
            every = self._plans.values()
            answered, known = sum(len(one.answers) for one in every), sum(len(one.units) for one in every)
            progress(f"{len(plan.answers)}/{len(plan.units)} units, {answered}/{known} of all begun")

    def _gather(self, plan: Plan) -> list[dict[str, Any]]:
        """Put the shards' files together as one process would have written them; returns the outcomes in their order."""
        outcomes = []
        target = plan.request.folder
        for i, unit in enumerate(plan.units):
            with tempfile.TemporaryDirectory(prefix="asr-export-unit-") as folder:
                outcomes.append(units.unpack(self.share, unit.result, Path(folder)))
                if unit.level:
                    continue
                with (target / measure.DECODED).open("ab") as decoded:
                    decoded.write((Path(folder) / measure.DECODED).read_bytes())
                for probe in unit.probes:
                    made = weights.weights_file(Path(folder), probe)
                    shutil.move(made, weights.weights_file(target, self._shards[i][probe]))
        return outcomes

    def _plan(self, request: Request, timeout: float | None) -> Plan:
        name = request.folder.name
        if name in self._plans:
            return self._plans[name]
        cut = self._cut(request, timeout)
        if request.level and request.reference:
            cut.append(self._cases(request, timeout))
        return self._begin(Plan(request, cut), name)

    def _begin(self, plan: Plan, name: str) -> Plan:
        self._plans[name] = plan
        for unit in plan.units:
            known = units.finished(self.share, unit.result)
            if known is None:
                self._publish_recordings(plan, unit)
                self._submit(plan, unit)
            else:
                plan.answers[unit.name] = known
        return plan

    def _publish_recordings(self, plan: Plan, unit: Unit) -> None:
        """What the unit's features are made from, just before it: the first workers begin while the rest is on its way."""
        if unit.recordings is None or unit.recordings in self._published:
            return
        self._published.add(unit.recordings)
        shard = self._shards[plan.units.index(unit)]
        with tempfile.TemporaryDirectory(prefix="asr-export-recordings-") as folder:
            data.collect(self._utterances[shard.start : shard.stop], Path(folder))
            self.share.publish(Path(folder), unit.recordings)

    def _cut(self, request: Request, timeout: float | None) -> list[Unit]:
        """The units of a measurement's utterances."""
        whole, tokens = self._unit(request, timeout), _tokens(request)
        cut = []
        for i, shard in enumerate(self._shards):
            inside = [probe for probe in request.probes if probe in shard]
            place = f"{shard.start}-{shard.stop}"  # an interrupted run may go on with units of another size
            cut.append(
                replace(
                    whole,
                    name=f"{request.folder.name}-{i}",
                    result=f"{whole.result}/{place}.zip",
                    inputs=f"features/{place}",
                    recordings=f"recordings/{place}",
                    probes=tuple(shard.index(probe) for probe in inside),
                    forced=None if tokens is None else tuple(tokens[probe] for probe in inside),
                )
            )
        return cut

    def _cases(self, request: Request, timeout: float | None) -> Unit:
        """The unit of a measurement's failure classes and modes of transcription. Publishes what they hear."""
        self.share.publish(request.work / data.CASES, data.CASES)
        whole, tokens = self._unit(request, timeout), _tokens(request) or []
        return replace(
            whole,
            name=f"{request.folder.name}-{data.CASES}",
            result=f"{whole.result}/{data.CASES}.zip",
            inputs=data.CASES,
            probes=tuple(range(len(request.probes))),
            forced=tuple(tokens[probe] for probe in request.probes),
            level=request.level,
        )

    def _unit(self, request: Request, timeout: float | None) -> Unit:
        """What all units of a measurement share; ``result`` is the folder of theirs. Publishes the model."""
        name, seal = request.folder.name, resume.seal(request.path)
        model = f"models/{name}-{resume.sha256(seal)[:16]}"
        self.share.publish(request.path, model)
        tokens = _tokens(request)
        forced = json.dumps(tokens and [tokens[probe] for probe in request.probes])
        return Unit(
            name=name,
            result=f"results/{name}-{resume.sha256(seal, forced)[:16]}",
            target=request.target,
            model=model,
            inputs="",
            recordings=None,
            n_mels=self._n_mels,
            probes=(),
            forced=None,
            threads=request.threads,
            max_new_tokens=request.max_new_tokens,
            level=None,
            timeout=timeout,
            code=self._code,
        )

    def _submit(self, plan: Plan, unit: Unit, elsewhere: Sequence[str] | None = None) -> None:
        """Hand a unit to Dask; ``elsewhere`` are the only workers that may have it."""
        self._submitted += 1
        key = f"{TOPIC}-{unit.name}-{uuid.uuid4().hex}"
        future = self.client.submit(
            work,
            unit,
            self.share.address,
            key,
            key=key,
            pure=False,
            resources={plan.label: 1},
            workers=elsewhere,
            priority=-self._submitted,  # in the order of the report; a straggler's second run after all that waits
        )
        self._attempts[key] = Attempt(plan, unit, future)
        future.add_done_callback(self._finished.put)

    def _begun(self, event: tuple[float, Any]) -> None:
        """A worker says that it began an attempt (again, where the first worker died)."""
        message = event[1]
        attempt = self._attempts.get(message["key"])
        if attempt is not None:
            attempt.since, attempt.worker = time.monotonic(), message["worker"]

    def _next_event(self) -> None:
        """Take in what has ended, for at most a tick, and look after what has not."""
        with suppress(queue.Empty):
            self._ended(self._finished.get(timeout=TICK_S))
            while True:
                self._ended(self._finished.get_nowait())
        self._look_after_labels()
        self._look_after_stragglers()

    def _ended(self, future: Future) -> None:
        attempt = self._attempts.pop(future.key, None)
        if attempt is None or attempt.plan.done or attempt.unit.name in attempt.plan.answers:
            return
        if future.status == "cancelled":
            raise UnavailableError("the cluster's scheduler is gone. Start it and run again: what is finished is kept.")
        outcome, answer = _outcome(future)
        plan, unit = attempt.plan, attempt.unit
        if outcome.status == "ok":
            plan.answers[unit.name] = answer
            self._durations[plan.kind(unit)].append(outcome.seconds)
            self._note(attempt, outcome.own_s)
            self._drop(lambda other: other.unit is unit)
            return
        plan.attempts[unit.name] += 1
        if outcome.status == "crashed" and plan.attempts[unit.name] < ATTEMPTS:
            self._submit(plan, unit)
        elif not any(other.unit is unit for other in self._attempts.values()):
            plan.failed = outcome
            self._drop(lambda other: other.plan is plan)

    def _note(self, attempt: Attempt, own_s: float) -> None:
        if attempt.since is None or len(self.times) == MOST_TIMES:
            return
        count = 0 if attempt.unit.level else len(self._shards[attempt.plan.units.index(attempt.unit)])
        self.times.append(UnitTime(attempt.unit.name, attempt.worker, attempt.since, time.monotonic(), own_s, count))

    def _drop(self, unwanted: Callable[[Attempt], bool]) -> None:
        """Cancel attempts whose results nobody needs any more, and end those that run."""
        for key, attempt in list(self._attempts.items()):
            if unwanted(attempt):
                del self._attempts[key]
                attempt.future.cancel()
                if attempt.worker:
                    self.client.run(abandon, attempt.unit.name, workers=[attempt.worker], wait=False, on_error="ignore")

    def _look_after_stragglers(self) -> None:
        """Run again elsewhere, once, what takes much longer than its like."""
        for attempt in list(self._attempts.values()):
            known = self._durations[attempt.plan.kind(attempt.unit)]
            if attempt.since is None or attempt.repeated or len(known) < KNOWN:
                continue
            if time.monotonic() - attempt.since > max(STRAGGLER * median(known), LEAST_STRAGGLER_S):
                others = self._carriers(attempt.plan.label) - {attempt.worker}
                if others:
                    attempt.repeated = True
                    self._submit(attempt.plan, attempt.unit, sorted(others))

    def _look_after_labels(self) -> None:
        """Raise :class:`UnavailableError` where a label that units wait for has had no worker for long."""
        now = time.monotonic()
        for label in {attempt.plan.label for attempt in self._attempts.values()}:
            if self._carriers(label):
                self._seen[label] = now
            elif now - self._seen.setdefault(label, now) > NOBODY_S:
                raise UnavailableError(
                    f"the cluster has had no worker with the label {label!r} for {NOBODY_S:.0f} s. "
                    "Start one and run again: what is finished is kept."
                )

    def _carriers(self, label: str) -> set[str]:
        """The addresses of the workers that carry a label, as of a few seconds ago."""
        asked, known = self._labels
        if time.monotonic() - asked > CHECK_S:
            known = defaultdict(set)
            for address, worker in self.client.scheduler_info(n_workers=-1)["workers"].items():
                for carried in worker["resources"]:
                    known[carried].add(address)
            self._labels = (time.monotonic(), known)
        return set(known.get(label, ()))

    def close(self) -> None:
        """Leave nothing running on the workers."""
        self._drop(lambda attempt: True)
        self.client.unsubscribe_topic(TOPIC)
        self.client.run(abandon, None, wait=False, on_error="ignore")


def work(unit: Unit, address: str, key: str) -> dict[str, Any]:
    """What a worker does: the unit, having told the client that it begins."""
    worker = get_worker()
    return units.run(unit, address, lambda: worker.log_event(TOPIC, {"key": key, "worker": worker.address}))


async def abandon(name: str | None) -> None:  # Dask can leave only coroutines unwaited for
    """As :func:`parity.units.abandon`, for a worker that nobody waits for: it may be frozen."""
    units.abandon(name)


def _outcome(future: Future) -> tuple[Outcome, dict[str, Any]]:
    """The outcome of an attempt, a crashed one where it was lost with its workers."""
    try:
        answer = future.result()
    except Exception as error:  # noqa: BLE001 - whatever happens on a worker costs that attempt alone
        return Outcome("crashed", {}, f"{type(error).__name__}: {error}", 0.0), {}
    return units.outcome_of(answer), answer


def _tokens(request: Request) -> list[tuple[int, ...]] | None:
    """PyTorch's tokens of every utterance; None where PyTorch itself is measured."""
    if request.reference is None:
        return None
    return [tuple(one["tokens"]) for one in measure.read_decoded(request.reference)]


@contextmanager
def connect(cluster: str, share: str, size: int, threads: int, *, fresh: bool) -> Iterator[Fleet]:
    """A fleet at a scheduler's address, or ``local``; its share is removed when all went well.

    ``size`` is the number of utterances of a unit. ``fresh`` drops what an earlier run left in the share. Raises
    :class:`UnavailableError` where nobody answers at the address.
    """
    with ExitStack() as stack:
        place = Share(share, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asr-export-fleet-"))))
        if fresh:
            place.remove()
        place.check()
        client = stack.enter_context(_client(cluster, threads))
        fleet = Fleet(client, place, size)
        try:
            yield fleet
        finally:
            fleet.close()
        place.remove()


@contextmanager
def _client(cluster: str, threads: int) -> Iterator[Client]:
    if cluster != LOCAL:
        try:
            client = Client(cluster, timeout=CONNECT_S)
        except (OSError, ValueError, TypeError) as error:
            raise UnavailableError(f"no Dask scheduler answers at {cluster}: {error}") from error
        with client:
            yield client
        return
    labels = dict.fromkeys(filter(_runs_here, registry.names("runners")), 1)
    workers = max(1, (os.cpu_count() or 1) // threads)
    # The models live in the workers' own processes: a limit on the workers would not see them.
    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=1, resources=labels, dashboard_address=None, memory_limit=0, silence_logs=True
        ) as here,
        Client(here) as client,
    ):
        yield client


def _runs_here(target: str) -> bool:
    try:
        registry.require(target)
    except UnavailableError:
        return False
    return True
