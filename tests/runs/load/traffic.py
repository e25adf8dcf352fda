"""Concurrent actions of tenants and users, with a check of every answer."""

import random
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.runs.load.tenants import Tenant, tamper
from tests.support.server import Server
from tests.support.tiny_model import CAPITALS, PROMPT

QUESTIONS = [PROMPT.format(country) for country in list(CAPITALS)[:3]]
CLOSE = 1e-3
"""Bound on the difference of log-probabilities of the same content in different batches; other
content differs by tenths."""

HELD = 5
"""Adapters that each loader keeps registered; together they exceed the engine's capacity."""

Answer = dict[str, float]


@dataclass
class Traffic:
    """State shared by the threads of one run: tenants, expected answers, problems."""

    server: Server
    tenants: list[Tenant]
    references: dict[str, list[Answer]]
    scratch: Path
    loads: int
    until: float = float("inf")  # monotonic seconds, after which nothing more is registered
    tampers: bool = True  # registered folders are edited, cut or deleted
    base_share: float = float("inf")  # requests to the base model for one served adapter, at most
    done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._locks = {tenant.name: threading.Lock() for tenant in self.tenants}
        self._mutex = threading.Lock()
        self._left = self.loads
        self._over = threading.Event()
        self._queue: list[Tenant] = []
        self.registered: set[str] = set()

    def cut_off(self) -> None:
        """From now on failures are the server's end, which is wanted, and nothing is begun."""
        self.until = 0.0
        self._over.set()

    def run(self, loaders: int = 3, users: int = 2) -> None:
        """Load and unload until all loads are done, while users query the base model."""
        asking = [threading.Thread(target=self._use, args=(i,)) for i in range(users)]
        loading = [threading.Thread(target=self._load, args=(i,)) for i in range(loaders)]
        for thread in asking + loading:
            thread.start()
        for thread in loading:
            thread.join()
        self._over.set()
        for thread in asking:
            thread.join()

    def _load(self, seed: int) -> None:
        """Register adapters one after another, query the served ones, unload the oldest."""
        generator = random.Random(seed)
        held: deque[tuple[Tenant, Path]] = deque()
        while self._take_one():
            tenant = self._next(generator)
            folder = self.scratch / f"{tenant.name}-{time.monotonic_ns()}"
            if self._try(tenant.name, self._register, tenant, folder, generator):
                held.append((tenant, folder))
            else:
                self._forget(tenant, folder)
            for other, _ in generator.sample(held, min(2, len(held))):
                self._try(other.name, self._ask, other.name, generator)
            if len(held) > HELD:
                self._unload_and_forget(*held.popleft())
        for tenant, folder in held:
            self._unload_and_forget(tenant, folder)

    def _next(self, generator: random.Random) -> Tenant:
        """A tenant that no other loader uses, now locked; each comes once before any twice."""
        with self._mutex:
            while True:
                if not self._queue:
                    self._queue = generator.sample(self.tenants, len(self.tenants))
                tenant = self._queue.pop()
                if self._locks[tenant.name].acquire(blocking=False):
                    return tenant

    def _unload_and_forget(self, tenant: Tenant, folder: Path) -> None:
        self._try(tenant.name, self._unload, tenant)
        self._forget(tenant, folder)

    def _forget(self, tenant: Tenant, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._locks[tenant.name].release()

    def _try(self, name: str, action: Callable[..., Any], *args: Any) -> Any:
        """The action's result; an exception is recorded instead of ending the thread."""
        try:
            return action(*args)
        except Exception as error:  # noqa: BLE001
            self._record_problem(name, repr(error))

    def _register(self, tenant: Tenant, folder: Path, generator: random.Random) -> bool:
        """Register, sometimes replace it, then tamper with the folder; true if served."""
        tenant.write(folder)
        self.registered.add(tenant.name)
        answer = self.server.load(tenant.name, folder)
        if tenant.code:
            refused = answer.status_code == 400
            message = answer.json()["error"]["message"] if refused else answer.text
            self._check(message.startswith(tenant.code), tenant.name, message)
            return False
        self._check(answer.status_code == 200, tenant.name, answer.text)
        if generator.random() < 0.2:
            again = self.server.load(tenant.name, folder, load_inplace=True)
            self._check(again.status_code == 200, tenant.name, again.text)
        if self.tampers:
            tamper(folder, generator)
        with self._mutex:
            self.done["served"] += 1
        return True

    def _unload(self, tenant: Tenant) -> None:
        gone = self.server.unload(tenant.name)
        self._check(gone.status_code == 200, tenant.name, gone.text)

    def _use(self, seed: int) -> None:
        generator = random.Random(1000 + seed)
        while not self._over.is_set():
            if self.done["base requests"] > self.base_share * (self.done["served"] + 1):
                time.sleep(0.01)
                continue
            self._try("base", self._ask, "base", generator)

    def _ask(self, name: str, generator: random.Random) -> None:
        which = generator.randrange(len(QUESTIONS))
        started = time.perf_counter()
        given = ask(self.server, name, QUESTIONS[which])
        self.latencies.append(time.perf_counter() - started)
        self.done["base requests"] += name == "base"
        known = self.references.get(name)
        off = distance(given, known[which]) if known else 0.0
        self._check(off < CLOSE, name, f"answers {off:.3g} from its reference")

    def _check(self, held: bool, name: str, problem: str) -> None:
        with self._mutex:
            self.done["checks"] += 1
        if not held:
            self._record_problem(name, problem)

    def _record_problem(self, name: str, problem: str) -> None:
        with self._mutex:
            if self.until:
                self.problems.append(f"{name}: {problem[:300]}")
            else:
                self.done["cut off"] += 1

    def _take_one(self) -> bool:
        with self._mutex:
            if time.monotonic() > self.until:
                return False
            self._left -= 1
            self.done["loads"] += self._left >= 0
            return self._left >= 0


def ask(server: Server, name: str, question: str) -> Answer:
    """The likeliest next tokens and their log-probabilities."""
    body = {"model": name, "prompt": question, "max_tokens": 4, "temperature": 0, "logprobs": 5}
    answer = server.post("/v1/completions", ignore_eos=True, **body)
    answer.raise_for_status()
    found: Answer = answer.json()["choices"][0]["logprobs"]["top_logprobs"][0]
    return found


def distance(ours: Answer, theirs: Answer) -> float:
    """Largest difference over the likely tokens; unlikely ones may be missing among the five."""
    likely = [token for token in theirs if theirs[token] > -6] or list(theirs)[:1]
    return max(abs(ours.get(token, -99.0) - theirs[token]) for token in likely)
