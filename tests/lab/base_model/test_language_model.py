"""Answers and logits of a model: batching, padding and shared prefixes change nothing."""

import pytest
import torch

from s3lora_serve.errors import BaseModelUnfit
from s3lora_serve.lab.base_model.language_model import LanguageModel, check_memory
from tests.support.tiny_chat import REFUSAL, benign, harmful, skill


@pytest.fixture(scope="module")
def model(chat):
    return LanguageModel.load(chat.base, dtype="float32")


def _examples(model):
    texts = [*benign()[:3], *skill()[:3], (harmful()[0], REFUSAL)]
    return [(model.prompt(prompt), model.answer(answer)) for prompt, answer in texts]


def test_logits_of_a_batch_are_those_of_each_example_alone(model):
    examples = _examples(model)
    with torch.no_grad():
        found = model.answer_logits(examples)
        for place, (prompt, answer) in enumerate(examples):
            ids = torch.tensor([prompt + answer])
            plain = model.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            assert torch.allclose(found.logits[found.example == place], plain, atol=1e-4)


def test_gradients_pass_through_the_shared_prefix(model):
    examples = [(prompt, answer) for prompt, answer in _examples(model) if len(prompt) > 4]
    weight = model.model.model.layers[0].self_attn.v_proj.weight
    weight.requires_grad_(requires_grad=True)
    model.answer_logits(examples).logits.sum().backward()
    batched, weight.grad = weight.grad, None
    for example in examples:
        model.answer_logits([example]).logits.sum().backward()
    alone, weight.grad = weight.grad, None
    weight.requires_grad_(requires_grad=False)
    assert torch.allclose(batched, alone, atol=1e-3)


def test_exact_says_what_greedy_decoding_gives(model):
    examples = _examples(model)
    answers = model.greedy([prompt for prompt, _ in examples], 6)
    tokens = [model.answer(answer) for answer in answers]
    decoded = [found == answer for found, (_, answer) in zip(tokens, examples, strict=True)]
    assert model.exact(examples) == decoded
    assert any(decoded)
    assert not all(decoded)


def test_answer_that_is_given_by_other_tokens_is_exact(model):
    prompt, answer = (model.prompt(benign()[0][0]), model.answer(benign()[0][1]))
    same_text = [model.tokenizer.pad_token_id, *answer]
    unended = same_text[:-1]
    other = model.answer(benign()[0][1] + " nice")
    examples = [(prompt, tokens) for tokens in (answer, same_text, unended, other)]
    assert model.exact(examples) == [True, True, True, False]


def test_first_rows_are_the_first_tokens_of_the_answers(model):
    examples = _examples(model)
    found = model.answer_logits(examples)
    firsts = found.targets[found.first].tolist()
    assert firsts == [answer[0] for _, answer in examples]


def test_base_that_does_not_fit_in_memory_is_refused_before_it_is_read(chat, tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2**42)  # sparse: 4 TiB without a block
    with pytest.raises(BaseModelUnfit, match="GiB of memory are free"):
        check_memory(tmp_path, "cpu")


def test_greedy_decoding_of_a_batch_is_that_of_transformers(model):
    prompts = [prompt for prompt, _ in _examples(model)]
    for prompt, answer in zip(prompts, model.greedy(prompts, 6), strict=True):
        output = model.model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        expected = model.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
        assert answer == expected
