"""Scan many adapters on the machines of a Ray cluster (extra: ray)."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from s3lora_serve.adapter.remote_storage import folder_name
from s3lora_serve.admission.verdict import Verdict, unread_verdict, with_rejection
from s3lora_serve.errors import GateFailed, Reason
from s3lora_serve.lab.sweeps.sweep import AHEAD, Folder, scan_on_one_thread
from s3lora_serve.policy.schema import Policy

TRIES = 4
"""Attempts at an adapter if its worker or machine dies: one, and Ray's default of three retries."""


def ray_sweep(
    folders: Iterable[Folder], policy: Policy, device: str, address: str
) -> Iterator[Verdict]:
    """Verdicts in the order of `folders`, each scored on one CPU of the cluster.

    An adapter whose worker or machine dies is retried on another. `address` is `auto` or that of a
    cluster. Its machines need this package and the same folders under the same paths.

    Raises:
        ConnectionError: no cluster was found.
    """
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        # Ray retries a task only if its process died, so each adapter has one verdict.
        task: Any = ray.remote(max_retries=TRIES - 1, num_gpus=1 if device == "cuda" else 0)(
            scan_on_one_thread
        )
        shared = ray.put(policy)
        waiting, pending = iter(folders), deque[tuple[Folder, Any]]()
        ahead = AHEAD * max(1, _cores())
        while True:
            for folder in islice(waiting, ahead - len(pending)):
                pending.append((folder, task.remote(_absolute(folder), shared, device)))
            if not pending:
                return
            folder, answer = pending.popleft()
            try:
                verdict = ray.get(answer)
            except RayError as error:
                verdict = _failure_verdict(folder, policy, error)
            yield replace(verdict, path=str(folder))
    finally:
        ray.shutdown()


def _absolute(folder: Folder) -> Folder:
    """The folder with an absolute path: workers have other working folders."""
    return folder.absolute() if isinstance(folder, Path) else folder


def _cores() -> int:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(resources.get("CPU", 1))


def _failure_verdict(folder: Folder, policy: Policy, error: RayError) -> Verdict:
    [cause, *_] = str(error).strip().splitlines() or [""]
    reason = Reason.of(GateFailed(f"begun {TRIES} times; {type(error).__name__}: {cause[:200]}"))
    return with_rejection(unread_verdict(folder_name(folder), str(folder), policy), reason)
