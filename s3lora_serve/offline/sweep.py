"""Scan many adapters: several processes, bounded memory, none stopped by another."""

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
"""Adapters begun for each process before the first of them is asked for."""


def default_jobs() -> int:
    """As many processes as this one may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def sweep(
    folders: Iterable[Folder], policy: Policy, device: str = "auto", jobs: int = 1
) -> Iterator[Verdict]:
    """Verdicts in the order of `folders`, scored by `jobs` processes of one thread each.

    An adapter that takes its process down (out of memory, a crash) is a rejected verdict too.
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
                yield _alone(folder, policy, device)


class _Broken(Exception):
    """A process of the pool died; which adapter it was is not known yet."""

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


def _alone(folder: Folder, policy: Policy, device: str) -> Verdict:
    """One adapter in a process of its own: what takes that down is to blame."""
    with _pool(1) as pool:
        try:
            return pool.submit(scan_on_one_thread, folder, policy, device).result()
        except BrokenProcessPool:
            reason = Reason.of(GateFailed("the process that scored it died"))
            return with_rejection(unread_verdict(folder_name(folder), str(folder), policy), reason)


def scan_on_one_thread(folder: Folder, policy: Policy, device: str) -> Verdict:
    """What a process does that has others beside it, one a core."""
    import torch

    torch.set_num_threads(1)
    return _scan(folder, policy, device)


def _scan(folder: Folder, policy: Policy, device: str) -> Verdict:
    # Taken from the package when called: whoever only hands out work does without torch.
    return s3lora_serve.scan_adapter(folder, policy, device)


def _pool(jobs: int) -> ProcessPoolExecutor:
    # Forked off a process that has imported torch, once, and has no threads to lose.
    context = get_context("forkserver")
    context.set_forkserver_preload(["s3lora_serve.offline.scan"])
    return ProcessPoolExecutor(jobs, context)
