"""Read a safetensors file that an operator names, other than an adapter's, whole and strictly."""

import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError
from torch import Tensor

from s3lora_serve.adapter.operator_file import OPEN_FLAGS, contents, foreign_writer
from s3lora_serve.adapter.safetensors_format import read_header, tensors
from s3lora_serve.errors import WeightsUnreadable

About = TypeVar("About", bound=BaseModel)


class TensorFile(NamedTuple):
    """The contents of one file."""

    path: Path
    digest: str  # sha256 of its bytes
    metadata: dict[str, str]
    tensors: dict[str, Tensor]

    def about(self, schema: type[About], key: str) -> About:
        """The JSON under a key of the metadata, checked against its schema.

        Raises:
            ValueError: it does not fit; the message names the first problem.
        """
        try:
            return schema.model_validate_json(self.metadata.get(key, ""))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or key
            raise ValueError(f"{self.path}: metadata {where[:120]}: {first['msg']}") from None

    def check_names(self, names: Collection[str]) -> None:
        """Check that the file holds tensors of these names and no others.

        Raises:
            ValueError: it does not; the message names one.
        """
        if odd := set(names) ^ self.tensors.keys():
            problem = "lacks" if min(odd) in names else "has the surplus tensor"
            raise ValueError(f"{self.path} {problem} {min(odd)[:120]}")


def read_tensor_file(path: Path, most: int, expected: str | None = None) -> TensorFile:
    """Read a file of at most `most` bytes into memory, then check it.

    Raises:
        ValueError: it cannot be read, is not safetensors, or has another digest than expected.
    """
    try:
        data = contents(os.open(path, OPEN_FLAGS), path, most, owned=False)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    if expected not in (None, digest):
        raise ValueError(f"{path} is {digest}; {expected} was expected")
    return tensor_file(path, digest, memoryview(data))


def tensor_file(path: Path, digest: str, data: memoryview) -> TensorFile:
    """The file that has these bytes, in private memory.

    Raises:
        ValueError: it is not safetensors.
    """
    try:
        header = read_header(data)
        return TensorFile(path, digest, dict(header.metadata), dict(tensors(header, data)))
    except WeightsUnreadable as error:
        raise ValueError(f"{path}: {error.problem}") from None


def check_owner(path: Path) -> None:
    """Check that nobody but this user and root can write the file.

    Raises:
        ValueError: others can, or it cannot be read.
    """
    try:
        problem = foreign_writer(path.stat(), path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    if problem:
        raise ValueError(problem)
