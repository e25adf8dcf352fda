"""`python -m tests.support.captured_operations MODEL NUMBER`: vLLM's GPU operations in Triton's
interpreter, with a row of active ids for each layer and with the one that vLLM has.

Prints for each kind of layer how many calls had a row that differs from vLLM's, how many gave other
results, and how many changed the output of a request whose adapter has no weights there.
"""

import random
import sys
from types import SimpleNamespace

import torch

from tests.support import gpu_operations
from tests.support.gpu_operations import DTYPE, IDS, SLOTS
from tests.support.programs import print_result
from tests.support.random_batches import _operation
from tests.support.triton_interpreter import enable_triton

METADATA = "token_mapping_meta", "prompt_mapping_meta"


def prepared(model):
    """Layers of each kind with rows, vLLM's wrapper, and a manager of both."""
    from vllm.config import CompilationMode, CUDAGraphMode

    from s3lora_serve.vllm_plugin.engine.skipping import Skipping

    vllm_config, layers, wrapper = gpu_operations.prepared(model)
    adapters = SimpleNamespace(
        supports_mm=False,
        modules=layers,
        lora_index_to_id=IDS,
        activate_adapter=lambda _lora_id: True,
    )
    manager = SimpleNamespace(_adapter_manager=adapters, _cached_dummy_lora=False)
    compilation = vllm_config.compilation_config
    compilation.mode = CompilationMode.VLLM_COMPILE
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    Skipping(wanted=True, captured=True).activate(manager, vllm_config)
    assert vllm_config.additional_config == {"s3lora_rows": 1}
    return layers, wrapper, manager


class Trial:
    """Random slots and batches, and one operation on each."""

    def __init__(self, model):
        self.layers, self.wrapper, self.manager = prepared(model)
        self.picked, self.numbers = random.Random(3), torch.Generator().manual_seed(3)
        self.held = {}
        for name in self.layers:
            for slot in range(SLOTS):
                self.place(name, slot, whole=True)
        self.found = {name: {"exits": 0, "different": 0, "touched": 0} for name in self.layers}

    def place(self, name, slot, *, whole=False):
        layer = self.layers[name]
        given = gpu_operations.weights(layer, self.picked, self.numbers)
        if whole or self.picked.random() < 0.5:
            layer.set_lora(slot, *given)
            factors = given if isinstance(given[0], (list, tuple)) else ([given[0]], [given[1]])
            self.held[name, slot] = any(
                a is not None and bool(a.any()) and bool(b.any())
                for a, b in zip(*factors, strict=True)
            )
        else:
            layer.reset_lora(slot)
            self.held[name, slot] = False

    def update(self, requests, tokens):
        gpu_operations.update_metadata(self.wrapper, requests, tokens)

    def rows(self, name):
        own = self.layers[name].punica_wrapper
        return [getattr(own, meta).active_lora_ids for meta in METADATA]

    def step(self):
        name = self.picked.choice(list(self.layers))
        self.place(name, self.picked.randrange(SLOTS))
        requests, tokens = gpu_operations.random_batch(self.picked)
        self.update(requests, tokens)
        layer, found = self.layers[name], self.found[name]
        op, rows, width, out, rest = _operation(layer, tokens, requests)
        x, y = (torch.randn(len(rows), n, generator=self.numbers).to(DTYPE) for n in (width, out))
        ours, theirs = y.clone(), y.clone()
        getattr(layer.punica_wrapper, op)(ours, x.clone(), *rest)
        getattr(self.wrapper, op)(theirs, x.clone(), *rest)
        idle = torch.tensor([not (each and self.held[name, each - 1]) for each in rows])
        theirs_ids = [getattr(self.wrapper, meta).active_lora_ids for meta in METADATA]
        at = int(op.endswith("logits"))
        found["exits"] += int((self.rows(name)[at] != theirs_ids[at]).any())
        found["different"] += int(not torch.equal(ours, theirs))
        found["touched"] += int(not torch.equal(ours[idle], y[idle]))

    def stale_weights(self):
        """Whether weights act that a slot has while its row says it has none."""
        layer = self.layers["down_proj"]
        given = gpu_operations.weights(layer, self.picked, self.numbers)
        type(layer).set_lora(layer, 0, *given)  # past what follows the slots
        layer.reset_lora(1)
        self.held["down_proj", 0] = False
        row = self.rows("down_proj")[0]
        self.update((1, 0), (1, 1, 0))
        row[row == 0] = -1
        x = torch.randn(3, gpu_operations.INNER).to(DTYPE)
        y = torch.randn(3, gpu_operations.WIDTH).to(DTYPE)
        after = y.clone()
        layer.punica_wrapper.add_lora_linear(
            after, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices
        )
        return not torch.equal(after, y)


def main():
    enable_triton()
    trial = Trial(sys.argv[1])
    addresses = {name: [row.data_ptr() for row in trial.rows(name)] for name in trial.layers}
    for _ in range(int(sys.argv[2])):
        trial.step()
    # Slots change and the batch stays: vLLM then writes no metadata, and activates alone.
    trial.update((1,), (1,))
    layer = trial.layers["down_proj"]
    layer.reset_lora(0)
    trial.manager._adapter_manager.activate_adapter(1)
    emptied = trial.rows("down_proj")[0].tolist()
    trial.manager._cached_dummy_lora = {}
    trial.update((1,), (1,))
    print_result({
        "kinds": trial.found,
        "emptied": emptied,
        "warming up": trial.rows("down_proj")[0].tolist(),
        "kept addresses": addresses == {
            name: [row.data_ptr() for row in trial.rows(name)] for name in trial.layers
        },
        "stale weights act": trial.stale_weights(),
    })  # fmt: skip


if __name__ == "__main__":
    main()
