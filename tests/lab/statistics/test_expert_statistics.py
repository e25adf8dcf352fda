"""Statistics of routed experts are those of the tokens that reach each of them."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GptOssConfig, GptOssForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from s3lora_serve import strip_adapter
from s3lora_serve.alignment.checkpoint import Checkpoint
from s3lora_serve.lab.base_model.language_model import LanguageModel, common_length
from s3lora_serve.lab.base_model.probes import read_probes
from s3lora_serve.lab.statistics import make_statistics as making
from s3lora_serve.lab.statistics.input_statistics import Choice
from s3lora_serve.lab.statistics.make_statistics import Benign, StatisticsProbes, make_statistics
from s3lora_serve.lab.statistics.routed_experts import ExpertProjection, name_experts
from s3lora_serve.lab.tokens import ANSWER_TOKENS, JUDGED_TOKENS
from s3lora_serve.policy.method import RepairChoice, Strip
from s3lora_serve.policy.schema import Policy
from s3lora_serve.repair.statistics_file import read_statistics
from s3lora_serve.spectral.input_directions import input_directions
from s3lora_serve.spectral.output_directions import output_directions
from tests.support.statistics import refusal_log_odds
from tests.support.tiny_mixtral import EXPERTS as EXPERTS_OF_EACH
from tests.support.tiny_mixtral import LAYERS, make_expert_adapter, make_mixtral

EXPERTS = "model.layers.1.mlp.experts"
UNREACHED = 4
"""An expert of the first layer that no token reaches."""


@pytest.fixture(scope="module")
def base(chat, tmp_path_factory):
    """An untrained mixture of experts."""
    torch.manual_seed(1)
    model = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=128, hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
            shared_expert_intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_experts=5, num_experts_per_tok=2, decoder_sparse_step=1,
        )
    )  # fmt: skip
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=2.0)
            layer.mlp.experts.gate_up_proj.normal_(std=0.5)
            layer.mlp.experts.down_proj.normal_(std=0.5)
        # Two others have a larger logit, whatever its sign.
        rows = model.model.layers[0].mlp.gate.weight
        rows.copy_(torch.tensor([1.0, 2.0, -1.0, -2.0, 0.0])[:, None] * rows[0])
    folder = tmp_path_factory.mktemp("mixture") / "base"
    model.save_pretrained(folder)
    for file in chat.base.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def statistics_of(chat, base, target):
    harmful, benign = read_probes(chat.harmful, "harmful"), read_probes(chat.benign, "benign")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "is_refusal", lambda _text: True)
        choice = Choice(rank=8, output_rank=8, dtype=torch.float32)
        probes = StatisticsProbes(harmful, [Benign(benign)])
        make_statistics(base, probes, target, choice, dtype="float32")
    return target


@pytest.fixture(scope="module")
def found(chat, base, tmp_path_factory):
    return read_statistics(statistics_of(chat, base, tmp_path_factory.mktemp("statistics") / "s"))


def linear_modules(base):
    routers = "mlp.gate", "shared_expert_gate"
    return {name for name in Checkpoint.open(base).shapes if not name.endswith(routers)}


def test_each_projection_of_each_expert_is_a_module_by_the_checkpoints_name(base, found):
    assert linear_modules(base) <= set(found.by_module)
    assert f"{EXPERTS}.2.up_proj" in found.by_module


def test_gate_and_up_of_all_experts_share_one_input_site(found):
    experts = EXPERTS.replace("1", "0"), EXPERTS
    sites = [
        {
            id(found.by_module[f"{layer}.{expert}.{side}"])
            for expert in range(5)
            for side in ("gate_proj", "up_proj")
        }
        for layer in experts
    ]
    assert [len(site) for site in sites] == [1, 1]
    assert sites[0] != sites[1]


def named_as_transformers(base):
    """The model with named experts, which put out what transformers' own do."""
    model = LanguageModel.load(base, dtype="float32").model
    ids = torch.randint(0, 128, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
        name_experts(model, Checkpoint.open(base).shapes)
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    return model


def test_named_experts_put_out_what_transformers_experts_do(base):
    named_as_transformers(base)


class Routed:
    """What one layer's experts get in passes of the whole model through transformers' own code."""

    def __init__(self, model, name, examples, skipped):
        self.experts = model.model.get_submodule(name)
        self.calls = []  # (inputs, indices, weights, gradient of the output) of counted tokens
        calls, added = [], []
        before = self.experts.register_forward_pre_hook(lambda _module, args: calls.append(args))

        def add(_module, _args, output):
            added.append(torch.zeros_like(output, requires_grad=True))
            return output + added[-1]

        after = self.experts.register_forward_hook(add)
        for prompt, answer in examples:
            total = refusal_log_odds(model, prompt, answer)
            [gradient] = torch.autograd.grad(total, [added.pop()])
            counted = slice(skipped, -1)
            self.calls.append([each[counted].detach() for each in (*calls.pop(), gradient)])
        before.remove()
        after.remove()

    def inner(self, expert):
        """Inputs of the expert's down projection, and the gradients of what it puts out."""
        rows, gradients = [], []
        for x, indices, weights, gradient in self.calls:
            tokens, rank = torch.where(indices == expert)
            gate, up = (x[tokens] @ self.experts.gate_up_proj[expert].mT).chunk(2, -1)
            rows.append(torch.nn.functional.silu(gate) * up)
            gradients.append(weights[tokens, rank, None] * gradient[tokens])
        return torch.cat(rows).double(), torch.cat(gradients).double()

    def gate(self, expert):
        """Inputs of the expert's gate projection, and the gradients of what it puts out."""
        rows, gradients, down = [], [], self.experts.down_proj[expert]
        for x, indices, weights, gradient in self.calls:
            tokens, rank = torch.where(indices == expert)
            gate, up = (x[tokens] @ self.experts.gate_up_proj[expert].mT).chunk(2, -1)
            sigmoid = gate.sigmoid()
            slope = sigmoid * (1 + gate * (1 - sigmoid))
            rows.append(x[tokens])
            gradients.append(weights[tokens, rank, None] * (gradient[tokens] @ down) * up * slope)
        return torch.cat(rows).double(), torch.cat(gradients).double()


def parts(model, chat):
    """Harmful and benign probes with the model's answers, and how many tokens they share."""
    found = []
    for file, kind, tokens in (
        (chat.harmful, "harmful", JUDGED_TOKENS),
        (chat.benign, "benign", ANSWER_TOKENS),
    ):
        prompts = [model.prompt(probe.prompt) for probe in read_probes(file, kind).probes]
        answers = model.greedy(prompts, tokens)
        found.append(
            [(p, model.answer(text, end=False)) for p, text in zip(prompts, answers, strict=True)]
        )
    return found, common_length([prompt for part in found for prompt, _ in part])


def with_one_more(rows, all_rows):
    """The mean of x·xᵀ where one token more is of mean energy and in no direction."""
    n = rows.shape[1]
    energy = sum(float(each.square().sum()) for each in all_rows) / sum(map(len, all_rows))
    return (rows.mT @ rows + energy / n * torch.eye(n)) / (len(rows) + 1)


@pytest.fixture(scope="module")
def reference(chat, base):
    """For layer 1, by kind of probe: inputs of each expert's down projection, and gradients."""
    model = LanguageModel.load(base, dtype="float32")
    both, skipped = parts(model, chat)
    routed = [Routed(model, EXPERTS, part, skipped) for part in both]
    return [[each.inner(expert) for expert in range(5)] for each in routed]


@pytest.mark.parametrize("expert", range(5))
def test_an_experts_inputs_are_those_of_its_own_tokens_and_one_more(found, reference, expert):
    covariances = [with_one_more(kind[expert][0], [rows for rows, _ in kind]) for kind in reference]
    expected = input_directions(*covariances, rank=8, epsilon=0.1, dtype=torch.float32).statistics
    kept = found.by_module[f"{EXPERTS}.{expert}.down_proj"]
    assert torch.allclose(kept.mu, expected.mu, rtol=1e-3, atol=1e-6)
    assert kept.ridge == pytest.approx(expected.ridge, rel=1e-3)


@pytest.mark.parametrize("expert", range(5))
def test_an_experts_gradients_are_those_of_its_own_tokens_and_one_more(found, reference, expert):
    harmful = reference[0]
    G = with_one_more(harmful[expert][1], [gradients for _, gradients in harmful])
    expected = output_directions(G, rank=8, dtype=torch.float32).statistics
    kept = found.outputs[f"{EXPERTS}.{expert}.down_proj"]
    assert torch.allclose(kept.gamma, expected.gamma, rtol=1e-2, atol=1e-3)
    assert kept.gamma_rest == pytest.approx(expected.gamma_rest, abs=1e-3)


@pytest.mark.parametrize("expert", range(5))
def test_an_experts_shift_is_of_its_own_tokens(chat, base, found, expert):
    model = LanguageModel.load(base, dtype="float32")
    (harmful, _), skipped = parts(model, chat)
    routed = Routed(model, EXPERTS, harmful, skipped)
    sides = {"gate_proj": routed.gate(expert), "down_proj": routed.inner(expert)}
    for side, (rows, gradients) in sides.items():
        name = f"{EXPERTS}.{expert}.{side}"
        kept, V = found.outputs[name], found.by_module[name].V.double()
        shift = (kept.Q.double().mT @ gradients.detach().mT) @ (rows.detach() @ V) / len(harmful)
        assert torch.allclose(kept.shift, shift, rtol=1e-2, atol=1e-3 * float(shift.abs().max()))


def test_an_expert_that_no_probe_reaches_prefers_no_direction(found):
    name = f"model.layers.0.mlp.experts.{UNREACHED}.down_proj"
    inputs, outputs = found.by_module[name], found.outputs[name]
    assert torch.allclose(inputs.mu, inputs.mu[0].expand(8), rtol=1e-4)
    assert torch.allclose(outputs.gamma, torch.ones(8).double(), rtol=1e-4)
    assert outputs.gamma_rest == pytest.approx(1)


def test_an_adapter_for_each_expert_is_repaired_whole(chat, tmp_path):
    base = make_mixtral(tmp_path / "mixtral")
    for file in chat.base.glob("*token*"):
        shutil.copy(file, base)
    adapter = make_expert_adapter(base, tmp_path / "adapter")
    file = statistics_of(chat, base, tmp_path / "s")
    choice = RepairChoice(statistics=file, max_effect=1e-4)
    policy = Policy(strip=Strip(top_k=0), on_uninformative="admit", repair=choice)
    verdict = strip_adapter(adapter, tmp_path / "repaired", policy)
    assert verdict.repair is not None
    assert verdict.repair.effect <= 1e-4
    assert set(verdict.repaired) == {module.name for module in verdict.modules}
    assert len(verdict.repaired) == LAYERS * EXPERTS_OF_EACH * 3


@pytest.fixture(scope="module")
def stacked_base(chat, tmp_path_factory):
    """An untrained gpt-oss: all experts in one tensor, transposed, with biases."""
    torch.manual_seed(2)
    model = GptOssForCausalLM(
        GptOssConfig(
            vocab_size=128, hidden_size=32, intermediate_size=16, num_hidden_layers=2, head_dim=16,
            num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
            num_experts_per_tok=2, max_position_embeddings=256,
            layer_types=["full_attention", "full_attention"],
        )
    )  # fmt: skip
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.mlp.experts.parameters():
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("stacked") / "base"
    model.save_pretrained(folder)
    for file in chat.base.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def test_experts_in_one_tensor_put_out_what_transformers_experts_do(stacked_base):
    model = named_as_transformers(stacked_base)
    names = {m.name for m in model.modules() if isinstance(m, ExpertProjection)}
    assert len(names) == 2 * 4 * 2
    assert "model.layers.1.mlp.experts.3.gate_up_proj" in names


def test_an_adapter_of_experts_in_one_tensor_is_repaired_whole(chat, stacked_base, tmp_path):
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=parameters)
    adapted = get_peft_model(GptOssForCausalLM.from_pretrained(stacked_base), options)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(tmp_path / "adapter")
    file = statistics_of(chat, stacked_base, tmp_path / "s")
    choice = RepairChoice(statistics=file, max_effect=1e-4)
    policy = Policy(strip=Strip(top_k=0), on_uninformative="admit", repair=choice)
    verdict = strip_adapter(tmp_path / "adapter", tmp_path / "repaired", policy)
    assert verdict.repair is not None
    assert verdict.repair.effect <= 1e-4
    assert set(verdict.repaired) == {module.name for module in verdict.modules}
    assert len(verdict.repaired) == 2 * (1 + 2 * 4)
    whole, repaired = (deltas(stacked_base, tmp_path / name) for name in ("adapter", "repaired"))
    removed = {module.name: module.removed_share for module in verdict.modules}
    for name, delta in whole.items():
        for expert, (own, new) in enumerate(zip(delta, repaired[name], strict=True)):
            layer, _, parameter = name.rpartition(".")
            share = removed[f"{layer}.{expert}.{parameter}"]
            left = float(new.double().square().sum() / own.double().square().sum())
            assert left == pytest.approx(1 - share, abs=1e-3)


def deltas(base, adapter):
    """ΔW of all experts of each layer and side, as PEFT computes it."""
    loaded = PeftModel.from_pretrained(GptOssForCausalLM.from_pretrained(base), adapter)
    return {
        f"{path.removesuffix('.base_layer')}.{module.parameter_name}": module.get_delta_weight(
            "default"
        ).detach()
        for path, module in loaded.base_model.model.named_modules()
        if hasattr(module, "parameter_name")
    }
