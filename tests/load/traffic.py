"""What tenants and users do at the same time, and a check of every answer."""

import random
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.load.tenants import Tenant, tamper
from tests.support.server import Server
from tests.support.tiny_model import CAPITALS, PROMPT

QUESTIONS = [PROMPT.format(country) for country in list(CAPITALS)[:3]]
CLOSE = 1e-3
"""Log-probabilities of one content in batches of different make-up; others are tenths away."""

HELD = 5
"""Adapters that each loader keeps registered: together more than the engine has room for."""

Answer = dict[str, float]


@dataclass
class Traffic:
    """Shared by the threads of one run: who is served, what is expected, what went wrong."""

    server: Server
    tenants: list[Tenant]
    references: dict[str, list[Answer]]
    scratch: Path
    loads: int
    done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._locks = {tenant.name: threading.Lock() for tenant in self.tenants}
        self._mutex = threading.Lock()
        self._left = self.loads
        self._over = threading.Event()

    def run(self, loaders: int = 3, users: int = 2) -> None:
        """Load and unload until all loads are done; users ask the base model meanwhile."""
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
        """Register one adapter after the other, ask those that are, unload the oldest."""
        chance = random.Random(seed)
        held: deque[tuple[Tenant, Path]] = deque()
        while self._take_one():
            tenant = chance.choice(self.tenants)
            if not self._locks[tenant.name].acquire(blocking=False):  # another loader has it
                tenant = self._free_tenant(chance)
            folder = self.scratch / f"{tenant.name}-{time.monotonic_ns()}"
            if self._try(tenant.name, self._register, tenant, folder, chance):
                held.append((tenant, folder))
            else:
                self._forget(tenant, folder)
            for other, _ in chance.sample(held, min(2, len(held))):
                self._try(other.name, self._ask, other.name, chance)
            if len(held) > HELD:
                self._leave(*held.popleft())
        for tenant, folder in held:
            self._leave(tenant, folder)

    def _free_tenant(self, chance: random.Random) -> Tenant:
        """A tenant nobody has, now locked."""
        shuffled = chance.sample(self.tenants, len(self.tenants))
        return next(t for t in shuffled if self._locks[t.name].acquire(blocking=False))

    def _leave(self, tenant: Tenant, folder: Path) -> None:
        self._try(tenant.name, self._unload, tenant)
        self._forget(tenant, folder)

    def _forget(self, tenant: Tenant, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._locks[tenant.name].release()

    def _try(self, name: str, act: Callable[..., Any], *args: Any) -> Any:
        """What an act returns; what it raises is written down, not lost with its thread."""
        try:
            return act(*args)
        except Exception as error:  # noqa: BLE001
            self._wrong(name, repr(error))

    def _register(self, tenant: Tenant, folder: Path, chance: random.Random) -> bool:
        """Whether it is served now: perhaps replaced by itself, its folder meddled with."""
        shutil.copytree(tenant.folder, folder, symlinks=True)
        answer = self.server.load(tenant.name, folder)
        if tenant.code:
            refused = answer.status_code == 400
            told = answer.json()["error"]["message"] if refused else answer.text
            self._check(told.startswith(tenant.code), tenant.name, told)
            return False
        self._check(answer.status_code == 200, tenant.name, answer.text)
        if chance.random() < 0.2:
            again = self.server.load(tenant.name, folder, load_inplace=True)
            self._check(again.status_code == 200, tenant.name, again.text)
        tamper(folder, chance)
        return True

    def _unload(self, tenant: Tenant) -> None:
        gone = self.server.unload(tenant.name)
        self._check(gone.status_code == 200, tenant.name, gone.text)

    def _use(self, seed: int) -> None:
        chance = random.Random(1000 + seed)
        while not self._over.is_set():
            self._try("base", self._ask, "base", chance)

    def _ask(self, name: str, chance: random.Random) -> None:
        which = chance.randrange(len(QUESTIONS))
        started = time.perf_counter()
        given = ask(self.server, name, QUESTIONS[which])
        self.latencies.append(time.perf_counter() - started)
        off = distance(given, self.references[name][which])
        self._check(off < CLOSE, name, f"answers {off:.3g} from its reference")

    def _check(self, held: bool, name: str, problem: str) -> None:
        with self._mutex:
            self.done["checks"] += 1
        if not held:
            self._wrong(name, problem)

    def _wrong(self, name: str, problem: str) -> None:
        with self._mutex:
            self.problems.append(f"{name}: {problem[:300]}")

    def _take_one(self) -> bool:
        with self._mutex:
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
    """Largest difference over the tokens that matter; unlikely ones may fall out of the five."""
    matter = [token for token in theirs if theirs[token] > -6] or list(theirs)[:1]
    return max(abs(ours.get(token, -99.0) - theirs[token]) for token in matter)
