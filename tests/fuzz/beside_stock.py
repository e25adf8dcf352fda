"""A program: drawn adapters on one real engine, as stock vLLM loads them and as the gate does.

What counts is the adapter's slot, the kernels' only input. Stock serves an adapter if it raises
nothing and the slot is not zero. Then the gate's slot is the same, or it refuses with a code that
one of the adapter's changes explains; and it never serves what stock does not.
"""

import sys
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from safetensors import safe_open

from tests.fuzz.changed_adapters import ZERO, Drawn, changed_adapters
from tests.runs.architectures.models import named
from tests.runs.architectures.served import ENGINE
from tests.support.adapters import CONFIG, WEIGHTS
from tests.support.programs import print_result
from tests.support.slots import slot_buffers

Slot = dict[str, torch.Tensor]


class BothWays:
    """An engine in this process, its worker's adapters, and vLLM's own code beside the gate's."""

    def __init__(self, model: Path, **engine: Any) -> None:
        from vllm.lora.peft_helper import PEFTHelper

        self._helper = PEFTHelper
        own = vars(PEFTHelper)["_match_pattern"]
        from vllm import LLM

        self.engine = LLM(str(model), **ENGINE | {"max_cpu_loras": 4} | engine).llm_engine
        self._matching = {True: vars(PEFTHelper)["_match_pattern"], False: own}
        [self._worker] = self.engine.collective_rpc(lambda worker: worker)
        self._ids = count(1)

    @property
    def _manager(self) -> Any:
        return self._worker.model_runner.lora_manager

    def stock(self, folder: Path) -> Slot | str:
        """The slot as vLLM's own code fills it, or what it raises."""
        from vllm.lora.request import LoRARequest

        from s3lora_serve.vllm_plugin import patches

        self._helper._match_pattern = self._matching[False]
        number = next(self._ids)
        try:
            lora = patches.load_adapter(self._manager, LoRARequest("a", number, str(folder)))
            self._manager._adapter_manager.add_adapter(lora)
            self._manager._adapter_manager.activate_adapter(number)
            return self._slot()
        except Exception as error:  # noqa: BLE001 - it is what is asked for
            return f"{type(error).__name__}: {error}"
        finally:
            self._clear()
            self._helper._match_pattern = self._matching[True]

    def guarded(self, folder: Path) -> tuple[Slot, Any]:
        """The slot as the gate has it filled, and why it refused."""
        from vllm.lora.request import LoRARequest

        number = next(self._ids)
        try:
            self.engine.add_lora(LoRARequest("a", number, str(folder)))
            [(_, refused)] = self.engine.collective_rpc("s3lora_loaded", args=("", number))
            if refused is None:
                self._manager._adapter_manager.activate_adapter(number)
            return self._slot(), refused
        finally:
            self._clear()

    def _slot(self) -> Slot:
        adapters = self._manager._adapter_manager
        return {name: buffer.clone() for name, buffer in slot_buffers(adapters, 0)}

    def _clear(self) -> None:
        """An empty slot, whatever happened: vLLM leaves half-filled ones."""
        adapters = self._manager._adapter_manager
        for number in list(adapters.list_adapters()):
            self.engine.remove_lora(number)
        adapters._active_adapters.clear()
        adapters.lora_index_to_id[:] = [None] * len(adapters.lora_index_to_id)
        for layer in adapters.modules.values():
            layer.reset_lora(0)


def _acts(slot: Slot) -> bool:
    """Whether any module has both factors: an update of one alone is zero."""
    return any("lora_b" in name for name in slot)


def check(both: BothWays, drawn: Drawn, seen: dict[str, int]) -> None:
    """Load an adapter both ways and compare."""
    with tempfile.TemporaryDirectory() as folder:
        drawn.write(Path(folder))
        stock = both.stock(Path(folder))
        slot, refused = both.guarded(Path(folder))
    served = not isinstance(stock, str) and _acts(stock)
    code = refused and refused[0]
    kind = f"{'served' if served else 'not served'}, {code or 'admitted'}"
    seen[kind] = seen.get(kind, 0) + 1
    if isinstance(stock, str):
        assert code, f"the gate serves what stock does not: {stock}"
    elif code:
        assert not served or code in drawn.allowed, f"{refused} of an adapter that stock serves"
    else:
        assert served or ZERO in drawn.allowed, "nothing is placed, and the gate serves it"
        assert slot.keys() == stock.keys()
        assert all(torch.equal(tensor, stock[name]) for name, tensor in slot.items())


def main(name: str, examples: int, start: int) -> None:
    """Draw examples for an adapter of the architecture of this name."""
    architecture = named(name)
    seen: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        adapter = architecture.make_adapter(Path(folder) / "adapter")
        with safe_open(adapter / WEIGHTS, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        config = (adapter / CONFIG).read_text()
        both = BothWays(architecture.make_model(Path(folder) / "model"), **architecture.engine)

        @seed(start)
        @settings(
            max_examples=examples, deadline=None, database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(changed_adapters(shapes, config))
        def compare(drawn: Drawn) -> None:
            check(both, drawn, seen)

        compare()
    print_result(seen)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
