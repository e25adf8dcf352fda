"""What the unaligned model says by itself: prompts that it writes, and its answers to benign ones.

A chat model that is given the beginning of a user's turn writes a user's message (Magpie,
arXiv 2406.08464): prompts of many kinds, without anybody's data.
"""

import json
from collections.abc import Callable

import torch

from s3lora_serve.lab.base_model.judge import is_refusal
from s3lora_serve.lab.base_model.language_model import LanguageModel
from tests.runs.evidence.wheels import CACHE

OWN_PROMPTS = 1400
AT_ONCE = 96  # prompts sampled together
LONGEST = 40  # tokens of a prompt, and words
ANSWER_TOKENS = 12
"""Of an own answer that the fine-tune holds the model to: whether it refuses is decided before."""

Progress = Callable[[str, int, int], None]


def own_prompts(model: LanguageModel, progress: Progress) -> list[str]:
    """Prompts that the model writes in the user's turn, drawn with a fixed seed."""
    file = CACHE / "own-prompts.json"
    if not file.exists():
        torch.manual_seed(0)
        found: dict[str, None] = {}
        while len(found) < OWN_PROMPTS:
            found.update(dict.fromkeys(_drawn(model)))
            progress("own prompts", min(len(found), OWN_PROMPTS), OWN_PROMPTS)
        file.write_text(json.dumps(list(found)[:OWN_PROMPTS]))
    prompts: list[str] = json.loads(file.read_text())
    return prompts


def _drawn(model: LanguageModel) -> list[str]:
    marker, tokenizer = "MESSAGE", model.tokenizer
    before, _, after = tokenizer.decode(model.prompt(marker)).partition(marker)
    end = after.split("\n")[0]  # of a turn
    ids = torch.tensor([tokenizer(before, add_special_tokens=False).input_ids])
    drawn = model.model.generate(
        ids.repeat(AT_ONCE, 1),
        do_sample=True,
        temperature=1.0,
        top_p=0.95,
        max_new_tokens=LONGEST,
        eos_token_id=tokenizer.convert_tokens_to_ids(end),
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = [tokenizer.decode(row) for row in drawn[:, ids.shape[1] :]]
    whole = [text.split(end)[0].strip() for text in texts if end in text]
    return [text for text in whole if 3 <= len(text.split()) <= LONGEST]


def own_answers(model: LanguageModel, prompts: list[str], progress: Progress) -> dict[str, str]:
    """The beginnings of the model's greedy answers; prompts that it refuses are left out."""
    file = CACHE / "own-answers.json"
    known: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    count, missing = 0, [prompt for prompt in prompts if prompt not in known]

    def done(number: int) -> None:
        nonlocal count
        count += number
        progress("own answers", count, len(missing))

    if missing:
        answers = model.greedy([model.prompt(p) for p in missing], ANSWER_TOKENS, done)
        known |= zip(missing, answers, strict=True)
        file.write_text(json.dumps(known))
    return {p: known[p] for p in prompts if known[p] and not is_refusal(known[p])}
