"""Scan many adapters with several processes and bounded memory. A failure affects one adapter."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import s3lora_serve
from s3lora_serve.adapter.remote_storage import RemoteFolder, folder_name
from s3lora_serve.admission.verdict import Verdict, unread_verdict, with_rejection
from s3lora_serve.errors import GateFailed, Reason
from s3lora_serve.policy.schema import Policy

Folder = Path | RemoteFolder

AHEAD = 4
"""Adapters submitted for each process before the first result is awaited."""


def default_jobs() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def sweep(
    folders: Iterable[Folder], policy: Policy, device: str = "auto", jobs: int = 1
) -> Iterator[Verdict]:
    """Verdicts in the order of `folders`, scored by `jobs` processes of one thread each.

    With `jobs=1`, this process scores them. With more, an adapter whose process dies (out of
    memory, a crash) gets a rejected verdict.
    """
    if jobs == 1:
        for folder in folders:
            yield _scan(folder, policy, device)
        return
    waiting = iter(folders)
    while begun := list(islice(waiting, 1)):
        try:
            yield from _pooled(begun, waiting, policy, device, jobs)
        except _Broken as broken:
            for folder in broken.undecided:
                yield _scan_alone(folder, policy, device)


class _Broken(Exception):
    """A process of the pool died. The adapter that caused it is one of `undecided`."""

    def __init__(self, undecided: list[Folder]) -> None:
        super().__init__()
        self.undecided = undecided


def _pooled(
    begun: list[Folder], waiting: Iterator[Folder], policy: Policy, device: str, jobs: int
) -> Iterator[Verdict]:
    with _pool(jobs) as pool:
        pending: deque[tuple[Folder, Future[Verdict]]] = deque()

        def begin(folders: Iterable[Folder]) -> None:
            for folder in folders:
                try:
                    pending.append(
                        (folder, pool.submit(scan_on_one_thread, folder, policy, device))
                    )
                except BrokenProcessPool:
                    raise _Broken([*(other for other, _ in pending), folder]) from None

        begin(begun)
        begin(islice(waiting, AHEAD * jobs))
        while pending:
            try:
                verdict = pending[0][1].result()
            except BrokenProcessPool:
                raise _Broken([folder for folder, _ in pending]) from None
            pending.popleft()
            yield verdict
            begin(islice(waiting, 1))


def _scan_alone(folder: Folder, policy: Policy, device: str) -> Verdict:
    """Scan one adapter in its own process. If that process dies, this adapter is the cause."""
    with _pool(1) as pool:
        try:
            return pool.submit(scan_on_one_thread, folder, policy, device).result()
        except BrokenProcessPool:
            reason = Reason.of(GateFailed("the process that scored it died"))
            return with_rejection(unread_verdict(folder_name(folder), str(folder), policy), reason)


def scan_on_one_thread(folder: Folder, policy: Policy, device: str) -> Verdict:
    """Scan with one torch thread, because one such process runs on each core."""
    import torch

    torch.set_num_threads(1)
    return _scan(folder, policy, device)


def _scan(folder: Folder, policy: Policy, device: str) -> Verdict:
    # Looked up at call time: a process that only submits work does not import torch.
    return s3lora_serve.scan_adapter(folder, policy, device)


def _pool(jobs: int) -> ProcessPoolExecutor:
    # Fork from a server process that has imported torch once and runs no threads.
    context = get_context("forkserver")
    context.set_forkserver_preload(["s3lora_serve.offline.scan"])
    return ProcessPoolExecutor(jobs, context)
