"""Directions against dense float64: the closed form is the minimum, and its means are those."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s3lora_serve.adapter.private_copy import copy_adapter
from s3lora_serve.adapter.reader import read_adapter
from s3lora_serve.lab.base_model.language_model import LanguageModel
from s3lora_serve.lab.base_model.probes import read_probes
from s3lora_serve.lab.calibration import directions as module
from s3lora_serve.lab.calibration.directions import directions, examples_run
from s3lora_serve.lab.calibration.gate_families import START, DirectionGates
from s3lora_serve.lab.calibration.gates import attach
from s3lora_serve.lab.tokens import ODDS_TOKENS
from s3lora_serve.policy.limits import Limits

CPU = torch.device("cpu")


def _gram(k, draw, rows):
    X = torch.randn(rows, k, generator=draw).double()
    return X.T @ X / rows


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 999), st.floats(0.01, 100))
@settings(deadline=None)
def test_gates_start_as_the_minimum_of_what_is_left_and_what_is_lost(k, rows, seed, scale):
    draw = torch.Generator().manual_seed(seed)
    H, K, G = _gram(k, draw, rows), _gram(k, draw, 2 * k + 2), _gram(k, draw, rows) * scale
    found = module._joint(H, K, G)
    ridged = K + module.RIDGE * K.trace() / k * torch.eye(k)
    M = found.R @ (found.whole / (1 + found.harm / START["directions"])) @ found.Z.T
    slope = G @ M @ H + START["directions"] * (M - torch.eye(k)) @ ridged
    assert float(slope.norm()) <= 1e-6 * float(ridged.norm() + G.norm() * H.norm())


@given(st.integers(1, 12), st.integers(0, 999))
@settings(deadline=None)
def test_strength_zero_is_the_whole_adapter_and_no_strength_makes_an_update_larger(k, seed):
    draw = torch.Generator().manual_seed(seed)
    found = module._joint(*(_gram(k, draw, 2 * k + 2) for _ in range(3)))
    sizes = torch.rand(k, generator=draw) + 0.01
    gates = DirectionGates([found], [sizes], CPU)
    assert torch.allclose(gates.matrices(0.0)[0].detach(), torch.eye(k), atol=1e-3)
    for strength in (0.5, 1.0, 4.0):
        M = gates.matrices(strength)[0].detach()
        assert float((M * sizes).norm()) <= float(sizes.norm()) * (1 + 1e-5)


@pytest.fixture(scope="module")
def attached(chat):
    model = LanguageModel.load(chat.base, dtype="float32")
    adapter = read_adapter(copy_adapter(chat.adapter, Limits()), Limits())
    return model, attach(model.model, adapter)


@pytest.fixture(scope="module")
def examples(chat, attached):
    model, _ = attached
    prompts = [probe.prompt for probe in read_probes(chat.harmful, "harmful").probes[:20]]
    return [(model.prompt(prompt), model.answer("no sorry", end=False)) for prompt in prompts]


def test_means_are_those_of_each_example_alone(attached, examples):
    model, gated = attached
    gated.remove()
    H, G = module._means(model, gated, examples, 1, lambda _: None, with_gradients=True)
    place = len(gated.layers) // 2
    layer, inputs, outputs, count = gated.layers[place], 0.0, 0.0, 0
    for prompt, answer in examples:
        kept = {}

        def note(_layer, given, output, kept=kept):
            kept["x"] = given[0].detach()
            kept["y"] = output + torch.zeros_like(output, requires_grad=True)
            return kept["y"]

        hook = layer.register_forward_hook(note)
        ids = torch.tensor([prompt + answer])
        logits = model.model(input_ids=ids).logits[0].float()
        hook.remove()
        odds = 0.0
        for token in range(min(ODDS_TOKENS, len(answer))):
            row = logits[len(prompt) + token - 1]
            chance = torch.softmax(row, 0)[answer[token]]
            odds = odds + torch.log(chance) - torch.log1p(-chance)
        [g] = torch.autograd.grad(odds, [kept["y"]])
        z = (kept["x"][0, 1:-1] @ layer.V).double() * layer.S
        u = (g[0, 1:-1] @ layer.U).double()
        inputs, outputs, count = inputs + z.T @ z, outputs + u.T @ u, count + len(z)
    assert torch.allclose(H[place], inputs / count, rtol=1e-3, atol=1e-5 * float(inputs.max()))
    assert torch.allclose(G[place], outputs / count, rtol=1e-2, atol=1e-4 * float(outputs.max()))


def test_an_adapter_that_is_removed_stays_so_and_no_hook_is_left(attached, examples):
    model, gated = attached
    done = []
    found = directions(model, gated, examples, [examples[:5], []], done.append)
    assert sum(done) == examples_run(examples, examples[:5], []) == 25
    assert len(found) == len(gated.layers)
    assert all(layer.is_removed and not layer._forward_hooks for layer in gated.layers)
