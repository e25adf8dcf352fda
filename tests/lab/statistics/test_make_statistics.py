"""Statistics are those of the whole model's inputs, made one layer at a time."""

import json

import pytest
import torch
from typer.testing import CliRunner

from s3lora_serve.cli import app
from s3lora_serve.errors import BaseUnaligned
from s3lora_serve.lab.base_model import language_model
from s3lora_serve.lab.base_model.language_model import LanguageModel, common_length
from s3lora_serve.lab.base_model.probes import read_probes
from s3lora_serve.lab.statistics.input_statistics import Choice
from s3lora_serve.lab.statistics.make_statistics import Benign, StatisticsProbes, make_statistics
from s3lora_serve.lab.statistics.statistics_parts import Parts
from s3lora_serve.lab.tokens import ANSWER_TOKENS
from s3lora_serve.repair.statistics_file import read_statistics
from s3lora_serve.spectral.input_directions import input_directions
from s3lora_serve.spectral.output_directions import output_directions
from tests.support.statistics import OUTPUT_RANK, refusal_log_odds
from tests.support.tiny_chat import REFUSAL

SITES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.1.mlp.gate_proj",
)


def whole_model_covariance(model, examples, site, shared):
    """E[x·xᵀ] at a site, from one pass of the whole model for each example."""
    rows, module = [], model.model.get_submodule(site)
    hook = module.register_forward_pre_hook(lambda _module, inputs: rows.append(inputs[0][0]))
    counted = []
    with torch.inference_mode():
        for prompt, answer in examples:
            model.model(torch.tensor([prompt + answer]))
            counted.append(rows.pop()[shared:-1].double())
    hook.remove()
    inputs = torch.cat(counted)
    return inputs.mT @ inputs / len(inputs)


def refused(model, file):
    probes = read_probes(file, "harmful").probes
    prompts = [model.prompt(probe.prompt) for probe in probes]
    return [(prompt, model.answer(REFUSAL, end=False)) for prompt in prompts]


def answered(model, files):
    found = []
    for file in files:
        prompts = [model.prompt(probe.prompt) for probe in read_probes(file, "benign").probes]
        answers = model.greedy(prompts, ANSWER_TOKENS)
        found.append(
            [(p, model.answer(text, end=False)) for p, text in zip(prompts, answers, strict=True)]
        )
    return found


def examples(model, chat):
    """What the chat's statistics are of, and how many tokens all prompts share."""
    harmful = refused(model, chat.harmful)
    benign = answered(model, (chat.benign, chat.skill))
    shared = common_length([prompt for part in (harmful, *benign) for prompt, _ in part])
    return harmful, benign, shared


@pytest.mark.parametrize("site", SITES)
def test_they_are_the_pairs_of_the_whole_models_covariances(chat, statistics, site):
    model = LanguageModel.load(chat.base, dtype="float32")
    harmful, benign, shared = examples(model, chat)
    C_h = whole_model_covariance(model, harmful, site, shared)
    C_b = sum(whole_model_covariance(model, part, site, shared) for part in benign) / len(benign)
    expected = input_directions(C_h, C_b, rank=16, epsilon=0.1, dtype=torch.float32)
    found = read_statistics(statistics)
    kept, record = found.sites[site], found.about.sites[site]
    assert torch.allclose(kept.mu, expected.statistics.mu, rtol=1e-3, atol=1e-6)
    assert record.harmful_captured == pytest.approx(expected.harmful_captured, abs=1e-3)
    assert record.benign_captured == pytest.approx(expected.benign_captured, abs=1e-3)
    assert found.outputs[site].width == len(model.model.get_submodule(site).weight)


@pytest.mark.parametrize("site", SITES)
def test_they_are_of_the_gradients_of_the_whole_models_log_odds(chat, statistics, site):
    model = LanguageModel.load(chat.base, dtype="float32")
    harmful, _, shared = examples(model, chat)
    module, rows, added, taken = model.model.get_submodule(site), [], [], []

    def add(_module, inputs, output):
        added.append(torch.zeros_like(output, requires_grad=True))
        taken.append(inputs[0][0, shared:-1].detach().double())
        return output + added[-1]

    module.register_forward_hook(add)
    for prompt, answer in harmful:
        total = refusal_log_odds(model, prompt, answer)
        [gradient] = torch.autograd.grad(total, [added.pop()])
        rows.append(gradient[0, shared:-1].double())
    g = torch.cat(rows)
    expected = output_directions(g.mT @ g, rank=OUTPUT_RANK, dtype=torch.float32)
    found = read_statistics(statistics)
    kept, V = found.outputs[site], found.by_module[site].V.double()
    shift = kept.Q.double().mT @ g.mT @ torch.cat(taken) @ V / len(harmful)
    assert torch.allclose(kept.shift, shift, rtol=1e-2, atol=1e-3 * float(shift.abs().max()))
    assert torch.allclose(kept.gamma, expected.statistics.gamma, rtol=1e-2, atol=1e-3)
    assert kept.gamma_rest == pytest.approx(expected.statistics.gamma_rest, abs=1e-3)
    leading = (kept.Q[:, 0].float() @ expected.statistics.Q[:, 0]).abs()
    assert float(leading) == pytest.approx(1, abs=1e-3)


def arguments(chat, target):
    harmful = read_probes(chat.harmful, "harmful")
    benign = [Benign(read_probes(chat.benign, "benign"))]
    return chat.base, StatisticsProbes(harmful, benign), target, Choice(rank=8)


def test_an_interrupted_run_goes_on_with_its_layers(chat, tmp_path, monkeypatch):
    target = tmp_path / "s.safetensors"
    whole = tmp_path / "whole.safetensors"
    make_statistics(*arguments(chat, whole))
    made = []

    def stop(phase, done, _total):
        if phase == "gradients" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_statistics(*arguments(chat, target), progress=stop)
    assert not target.exists()
    write = Parts._write
    monkeypatch.setattr(Parts, "_write", lambda *args: made.append(args[1:3]) or write(*args))
    make_statistics(*arguments(chat, target), resume=True)
    assert made == [(0, "outputs")]
    assert target.read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "parts" in path.name] == []


def test_a_base_larger_than_memory_gives_the_same_statistics(chat, tmp_path, monkeypatch):
    whole, layered = tmp_path / "whole.safetensors", tmp_path / "layered.safetensors"
    make_statistics(*arguments(chat, whole))
    size = (chat.base / "model.safetensors").stat().st_size
    monkeypatch.setattr(language_model, "_available_memory", lambda: size // 4)
    placed = []
    load = LanguageModel.load.__func__
    monkeypatch.setattr(
        LanguageModel,
        "load",
        classmethod(lambda *args, **more: placed.append(load(*args, **more)) or placed[-1]),
    )
    make_statistics(*arguments(chat, layered))
    assert "disk" in placed[0].model.hf_device_map.values()
    assert layered.read_bytes() == whole.read_bytes()


def test_a_base_that_complies_is_refused(chat, tmp_path):
    # It answers its benign prompts, so they are no harmful ones.
    base, probes, target, choice = arguments(chat, tmp_path / "s.safetensors")
    probes = StatisticsProbes(read_probes(chat.benign, "harmful"), probes.benign)
    with pytest.raises(BaseUnaligned, match="refuses 0 of 60"):
        make_statistics(base, probes, target, choice)
    assert not target.exists()


def run(*args):
    return CliRunner().invoke(app, ["statistics", *map(str, args)])


def test_the_command_makes_and_shows_a_file(chat, tmp_path):
    file = tmp_path / "s.safetensors"
    done = run("make", chat.base, "--harmful", chat.harmful, "--benign", f"{chat.benign}=2",
               "--benign", chat.skill, "--rank", 4, "-o", file)  # fmt: skip
    assert done.exit_code == 0, done.output
    shown = json.loads(run("show", file, "--format", "json").output)
    assert [probes["weight"] for probes in shown["probes"]] == [1.0, 2.0, 1.0]
    assert len(shown["sites"]) == 8
    assert all(site["largest"] >= site["smallest"] for site in shown["sites"].values())
    assert "8 input sites, rank 4" in run("show", file).output


WRONG = {
    "few probes": (lambda c, f: (c.base, "--harmful", f / "few", "--benign", c.benign), "905"),
    "no such base": (lambda c, f: (f, "--harmful", c.harmful, "--benign", c.benign), "910"),
    "no such file": (lambda c, f: (c.base, "--harmful", f / "no", "--benign", c.benign), "No such"),
    "bad weight": (
        lambda c, _: (c.base, "--harmful", c.harmful, "--benign", f"{c.benign}=-1"),
        "weight",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_ends_with_2_and_leaves_nothing(chat, tmp_path, case):
    (tmp_path / "few").write_text('{"prompt": "a"}\n')
    given, said = WRONG[case]
    done = run("make", *given(chat, tmp_path), "-o", tmp_path / "out" / "s.safetensors")
    assert done.exit_code == 2
    assert said in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few"]


def test_a_base_that_complies_ends_the_command_with_1(chat, tmp_path):
    done = run("make", chat.base, "--harmful", chat.benign, "--benign", chat.benign,
               "-o", tmp_path / "s")  # fmt: skip
    assert done.exit_code == 1
    assert "S3LORA-907" in done.output
