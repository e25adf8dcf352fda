"""Operators' files of tensors, changed in one place."""

import json

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def rewritten(good, target, change=lambda _: None, about=lambda _: None, *, key):
    """A copy of a file with its tensors and the JSON under a key of its metadata changed."""
    tensors = load_file(good)
    with safe_open(good, "pt") as file:
        metadata = json.loads(file.metadata()[key])
    change(tensors)
    about(metadata)
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(plain, target, metadata={key: json.dumps(metadata)})
    return target


def setting(name, value):
    """A change that replaces one tensor by `value(tensor)`."""

    def change(tensors):
        tensors[name] = value(tensors[name].clone())

    return change


def put(tensor, value, *place):
    """The tensor with one entry set."""
    tensor[place] = value
    return tensor
