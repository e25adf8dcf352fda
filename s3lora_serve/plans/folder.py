"""The folder of plans: opened only if nobody but this user and root can write in it.

Whoever can write there decides what is served of every adapter. Checks are made on open
descriptors, so nothing can be exchanged between a check and the reading.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s3lora_serve.adapter.operator_file import OPEN_FLAGS, contents, foreign_writer
from s3lora_serve.errors import PlanInvalid, PlansInvalid
from s3lora_serve.policy.schema import Policy

MAX_PLAN_BYTES = 2**28
"""The transforms of 560 modules with r = 256 take 196 MB."""

PLAN_NAME = re.compile(r"[0-9a-f]{64}\.json")
"""What the file of a plan is called: the sha256 of the adapter's weights file."""


def check_plans(policy: Policy) -> None:
    """Check the policy's folder of plans, if it has one.

    Raises:
        PlansInvalid: it is not a folder, or others than this user and root can write in it.
    """
    if policy.plans is None or policy.mode == "off":
        return
    try:
        with _opened_folder(policy.plans):
            pass
    except PlanInvalid as error:
        raise PlansInvalid(f"plans: {error.problem}") from None


def plan_bytes(folder: Path, digest: str) -> bytearray | None:
    """The file of the plan for the weights with this digest; None if there is none.

    Raises:
        PlanInvalid: folder or file can be written by others, is of another kind, or is unreadable.
    """
    with _opened_folder(folder) as descriptor:
        name = plan_name(digest)
        try:
            # Without O_NOFOLLOW a link could lead out of the checked folder.
            file = os.open(name, OPEN_FLAGS | os.O_NOFOLLOW, dir_fd=descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise PlanInvalid(f"{folder / name}: {error.strerror}") from None
    return _contents(file, folder / name, owned=True)


def file_bytes(path: Path) -> bytearray:
    """A plan that the operator names: links are followed, and its owner is not looked at.

    Raises:
        PlanInvalid: it is not a regular file, or is too large.
        OSError: it cannot be read.
    """
    return _contents(os.open(path, OPEN_FLAGS), path, owned=False)


def plan_name(digest: str) -> str:
    """The name of the file with the plan for the weights with this digest."""
    return f"{digest.removeprefix('sha256:')}.json"


@contextmanager
def _opened_folder(folder: Path) -> Iterator[int]:
    try:
        descriptor = os.open(folder, OPEN_FLAGS | os.O_DIRECTORY)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise PlanInvalid(f"{folder}: {getattr(error, 'strerror', error)}") from None
    try:
        if problem := foreign_writer(os.fstat(descriptor), folder):
            raise PlanInvalid(problem)
        yield descriptor
    finally:
        os.close(descriptor)


def _contents(descriptor: int, path: Path, *, owned: bool) -> bytearray:
    try:
        return contents(descriptor, path, MAX_PLAN_BYTES, owned=owned)
    except ValueError as error:
        raise PlanInvalid(str(error)) from None
