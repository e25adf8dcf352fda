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
from s3lora_serve.offline.sweep import AHEAD, Folder, scan_on_one_thread
from s3lora_serve.policy.schema import Policy

TRIES = 4
"""Times an adapter is begun whose worker or machine dies: Ray's own default of three retries."""


def ray_sweep(
    folders: Iterable[Folder], policy: Policy, device: str, address: str
) -> Iterator[Verdict]:
    """Verdicts in the order of `folders`, each scored by one of the cluster's CPUs.

    What a machine dies over is begun again on another. `address` is `auto` or a cluster's; its
    machines have this package installed, and see the same folders under the same paths.

    Raises:
        ConnectionError: no cluster is there.
    """
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        # A task is retried when its process is gone, not when it returns: no verdict comes twice.
        task: Any = ray.remote(max_retries=TRIES - 1, num_gpus=1 if device == "cuda" else 0)(
            scan_on_one_thread
        )
        shared = ray.put(policy)
        waiting, pending = iter(folders), deque[tuple[Folder, Any]]()
        ahead = AHEAD * max(1, _cores())
        while True:
            for folder in islice(waiting, ahead - len(pending)):
                pending.append((folder, task.remote(_found_anywhere(folder), shared, device)))
            if not pending:
                return
            folder, answer = pending.popleft()
            try:
                verdict = ray.get(answer)
            except RayError as error:
                verdict = _given_up(folder, policy, error)
            yield replace(verdict, path=str(folder))
    finally:
        ray.shutdown()


def _found_anywhere(folder: Folder) -> Folder:
    """A path that does not depend on where a process stands."""
    return folder.absolute() if isinstance(folder, Path) else folder


def _cores() -> int:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(resources.get("CPU", 1))


def _given_up(folder: Folder, policy: Policy, error: RayError) -> Verdict:
    [cause, *_] = str(error).strip().splitlines() or [""]
    reason = Reason.of(GateFailed(f"begun {TRIES} times; {type(error).__name__}: {cause[:200]}"))
    return with_rejection(unread_verdict(folder_name(folder), str(folder), policy), reason)
