"""Watches guarded servers, and makes a plan for each adapter that is served without one."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass

from s3lora_serve.errors import GateFailed, Reason, ServerFailed
from s3lora_serve.lab.planner.calibrator import CalibrationEnd, CalibrationTask, Calibrators
from s3lora_serve.lab.planner.fleet import FleetServer, Served
from s3lora_serve.lab.planner.plan_loads import SHORT, PlanLoads
from s3lora_serve.lab.planner.plan_state import PlanState
from s3lora_serve.lab.planner.planner_metrics import PlannerMetrics
from s3lora_serve.lab.planner.turns import Turns, Waiting

Say = Callable[[str], None]
"""Takes one line for each change."""

PAUSE_SECONDS = 60.0
"""From a base model that cannot be loaded, or complies with the probes, to the next try. Ours."""

MAX_TOLD = 10_000
"""Lines that are remembered so that each is said once: tenants choose how many there are."""


@dataclass(slots=True)
class _Running:
    waiting: Waiting
    future: "Future[CalibrationEnd]"
    lock: ExitStack
    started: float  # on the monotonic clock


class Planner:
    """Calibrates adapters, fairly among tenants, and has servers take their plans."""

    def __init__(
        self,
        servers: Sequence[FleetServer],
        state: PlanState,
        calibrators: Calibrators,
        metrics: PlannerMetrics,
        say: Say,
    ) -> None:
        self._servers, self._state, self._calibrators = servers, state, calibrators
        self._metrics, self._say = metrics, say
        self._running: dict[str, _Running] = {}  # by digest
        self._turns = Turns()
        self._told: dict[str, str] = {}  # the last line of each server and adapter
        self._loads = PlanLoads(servers, self._say_once)
        self._paused_until = 0.0  # on the monotonic clock
        self.obstacle: str | None = None  # why no adapter at all can be calibrated
        self.has_failed = False  # at the last look: one is given up, or a server does not answer

    def round(self) -> int:
        """Look at all servers, end and begin calibrations; how many adapters wait for a plan.

        Those count too whose plan a server has yet to take.

        Raises:
            OSError: the storage of plans or records fails.
        """
        self._end_calibrations()
        served = self._looked()
        by_digest: dict[str, list[Served]] = {}
        for each in served:
            by_digest.setdefault(each.digest, []).append(each)
        planned = {digest for digest in by_digest if self._state.has_plan(digest)}
        untaken = self._loads.apply(each for each in served if each.digest in planned)
        self.has_failed |= untaken > 0
        waiting = self._waiting({d: found for d, found in by_digest.items() if d not in planned})
        self._begin(waiting)
        self._state.prune()
        return len(waiting) + untaken

    @property
    def is_working(self) -> bool:
        """Whether a calibration is under way."""
        return bool(self._running)

    def close(self) -> None:
        """End all calibrations; another planner goes on with their searches."""
        self._calibrators.close()
        for running in self._running.values():
            running.lock.close()
        self._running.clear()

    def _looked(self) -> list[Served]:
        """What all servers serve; one that does not answer is reported and left out."""
        found: list[Served] = []
        unreachable = 0
        for server in self._servers:
            try:
                found += server.adapters()
                self._told.pop(server.url, None)
                if not server.takes_plans():
                    said = "its policy names no folder of plans, so it takes none"
                    self._say_once(f"{server.url} policy", f"{server.url}: {said}")
            except ServerFailed as error:
                unreachable += 1
                self._say_once(server.url, str(error))
        self._metrics.unreachable.set(unreachable)
        self.has_failed = unreachable > 0
        return found

    def _waiting(self, unplanned: dict[str, list[Served]]) -> list[Waiting]:
        """Adapters that wait for a calibration or are in one; those given up are counted apart."""
        now = time.time()
        lacking = {
            digest: served
            for digest, served in unplanned.items()
            if any(each.plan_digest is None for each in served)
        }
        at_work = self._at_work(lacking)
        waiting, given_up = [], 0
        for digest, served in lacking.items():
            if len({each.config_digest for each in served}) > 1:
                # A plan is for one configuration: the servers would refuse the others.
                self._say_once(digest, f"{digest[:SHORT]} is served with several configurations")
                given_up += 1
                continue
            record = self._state.record(digest)
            if record.has_failed:
                given_up += 1
                continue
            names = {each.name for each in served}
            facts = record.first_seen, bool(names & at_work), record.is_due(now)
            waiting.append(Waiting(digest, tuple(served), *facts))
        self._metrics.waiting.set(len(waiting))
        self._metrics.given_up.set(given_up)
        self.has_failed |= given_up > 0
        self._metrics.oldest_seconds.set(max((now - each.since for each in waiting), default=0))
        return waiting

    def _at_work(self, lacking: dict[str, list[Served]]) -> set[str]:
        names: set[str] = set()
        for server in self._servers if lacking else ():
            own = [e.name for served in lacking.values() for e in served if e.server == server.url]
            names |= server.at_work(own)
        return names

    def _begin(self, waiting: list[Waiting]) -> None:
        """Begin calibrations on all free workers."""
        if time.monotonic() < self._paused_until:
            return
        todo = [each for each in waiting if each.is_due and each.digest not in self._running]
        while todo and self._calibrators.free():
            todo = self._turns.ordered(todo, (each.waiting for each in self._running.values()))
            self._begin_one(todo.pop(0))

    def _begin_one(self, waiting: Waiting) -> None:
        lock = ExitStack()
        if not lock.enter_context(self._state.lock(waiting.digest)):
            lock.close()  # another planner has it
            return
        # Another planner may have ended its work meanwhile.
        record = self._state.record(waiting.digest)
        if self._state.has_plan(waiting.digest) or not record.is_due(time.time()):
            lock.close()
            return
        one = waiting.served[0]
        search = self._state.search_file(waiting.digest)
        begins = "goes on with its saved search" if search.exists() else "begins"
        task = CalibrationTask(waiting.digest, one.path, str(search))
        future = self._calibrators.submit(task)
        self._running[waiting.digest] = _Running(waiting, future, lock, time.monotonic())
        self._say(f"{one.name!r} {waiting.digest[:SHORT]}: calibration {begins}")

    def _end_calibrations(self) -> None:
        for digest, running in list(self._running.items()):
            if running.future.done():
                try:
                    self._end_one(running)
                except OSError as error:  # it is written at the next round: minutes went into it
                    self._say_once(digest, f"{error.filename}: {error.strerror}")
                    continue
                del self._running[digest]
                running.lock.close()

    def _end_one(self, running: _Running) -> None:
        """Write a plan, or note why there is none.

        Raises:
            OSError: the storage takes neither.
        """
        waiting, end = running.waiting, _end_of(running.future)
        about = f"{waiting.served[0].name!r} {waiting.digest[:SHORT]}"
        if end.is_planners:
            self._pause(about, end)
        elif end.plan is not None:
            self.obstacle = None
            self._state.write_plan(waiting.digest, end.plan + "\n")
            self._say(f"{about}: plan made in {end.seconds:.0f} s, {end.told}")
        else:
            reason = end.reason or Reason.of(GateFailed("the calibration gave no reason"))
            record = self._state.note_failure(waiting.digest, reason, may_pass=end.may_pass)
            then = "given up" if record.has_failed else "tried again later"
            self._say(f"{about}: no plan, {then}: {reason}")
        # A worker that died says nothing of its time, which others waited for all the same.
        taken = time.monotonic() - running.started
        self._turns.spend(waiting.tenant, max(taken, end.seconds))
        self._metrics.seconds.observe(taken)
        self._metrics.plans.labels("made" if end.plan is not None else "failed").inc()

    def _pause(self, about: str, end: CalibrationEnd) -> None:
        """Begin nothing for a while: base model or probes are at fault, and no adapter."""
        self.obstacle = str(end.reason)
        self._paused_until = time.monotonic() + PAUSE_SECONDS
        self._say_once("obstacle", f"no calibration can be made ({about}): {self.obstacle}")

    def _say_once(self, about: str, text: str) -> None:
        if self._told.get(about) != text:
            if len(self._told) >= MAX_TOLD:
                self._told.clear()
            self._told[about] = text
            self._say(text)


def _end_of(future: "Future[CalibrationEnd]") -> CalibrationEnd:
    """The end of a calibration, also where its worker died."""
    try:
        return future.result()
    except Exception as error:  # noqa: BLE001 - whatever ends a worker, the planner goes on
        died = GateFailed(f"the worker died: {type(error).__name__}: {str(error)[:200]}")
        return CalibrationEnd(0.0, reason=Reason.of(died), may_pass=True)
