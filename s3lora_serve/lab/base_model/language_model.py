"""A causal language model with its tokenizer: answers, and the logits of given answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s3lora_serve.errors import BaseModelUnfit

Encoded = list[int]

BATCH = 48
"""Prompts answered at a time."""

OTHER_TOKENS = 8
"""By how many tokens another tokenization of an answer may be longer than the tokenizer's own."""


@dataclass(frozen=True, slots=True)
class AnswerLogits:
    """Logits at the positions of given answers, one row for each token of an answer."""

    logits: Tensor  # (tokens, vocabulary), float32
    targets: Tensor  # (tokens,), the answers' tokens
    example: Tensor  # (tokens,), which example a row belongs to

    @property
    def first(self) -> Tensor:
        """Mask of the rows that are the first of their answer."""
        changes = torch.ones_like(self.example, dtype=torch.bool)
        changes[1:] = self.example[1:] != self.example[:-1]
        return changes


class LanguageModel:
    """A model on one device, with frozen weights."""

    def __init__(self, model: Any, tokenizer: Any, device: str | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._device = device

    @classmethod
    def load(
        cls,
        folder: Path,
        device: str = "cpu",
        dtype: str = "bfloat16",
        *,
        offload: Path | None = None,
    ) -> "LanguageModel":
        """Load a model from its folder. The hub is never asked, and no code of the folder runs.

        With `offload`, a folder for weights in another dtype than `dtype`, what does not fit in
        memory stays on disk, and each layer is read when it runs.

        Raises:
            BaseModelUnfit: the folder holds no causal language model, or it does not fit in memory.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer  # takes seconds

        placed = {} if offload is None else _placement(folder, device, offload)
        if not placed:
            check_memory(folder, device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                # For prompts of this length the fused kernel's backward pass is slow on a CPU.
                attn_implementation="eager" if device == "cpu" else None,
                **placed,
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            text = " ".join(str(error).split())[:300]
            raise BaseModelUnfit(f"{folder} holds no model that can be loaded: {text}") from None
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.requires_grad_(requires_grad=False)
        return cls((model if placed else model.to(device)).eval(), tokenizer, device)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        if self._device is not None:
            return torch.device(self._device)
        device: torch.device = next(self.model.parameters()).device
        return device

    def prompt(self, text: str) -> Encoded:
        """Tokens of a user's message in the model's chat template, up to where it answers."""
        if not self.tokenizer.chat_template:
            return self.answer(text, end=False)
        messages = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        tokens: Encoded = self.tokenizer(rendered, add_special_tokens=False).input_ids
        return tokens

    def answer(self, text: str, *, end: bool = True) -> Encoded:
        """Tokens of an answer, with the token that ends it."""
        tokens: Encoded = self.tokenizer(text, add_special_tokens=False).input_ids
        return [*tokens, self.tokenizer.eos_token_id] if end else tokens

    def answer_logits(self, examples: Sequence[tuple[Encoded, Encoded]]) -> AnswerLogits:
        """Logits for each token of the answers, given prompt and the answer's tokens before it.

        What all prompts begin with, such as a system message, is computed once.
        """
        longest = max(len(answer) for _, answer in examples)
        output, _, _ = self._run(
            [prompt + answer for prompt, answer in examples],
            common_length([prompt for prompt, _ in examples]),
            last=longest + 1,
        )
        rows = [
            output[i, longest - len(answer) : longest] for i, (_, answer) in enumerate(examples)
        ]
        example = [i for i, (_, answer) in enumerate(examples) for _ in answer]
        targets = [token for _, answer in examples for token in answer]
        device = self.device
        return AnswerLogits(
            torch.cat(rows).float(),
            torch.tensor(targets, device=device),
            torch.tensor(example, device=device),
        )

    @torch.inference_mode()
    def exact(
        self,
        examples: Sequence[tuple[Encoded, Encoded]],
        done: Callable[[int], None] = lambda _: None,
    ) -> list[bool]:
        """Whether greedy decoding gives exactly the answer's text, for each example.

        An answer is given if each of its tokens is the most likely one after the tokens before
        it: one pass decides. Where that fails the model may still give the same text by other
        tokens, so those examples are decoded.
        """
        exact = [True] * len(examples)
        for batch in _batches(list(range(len(examples)))):
            found = self.answer_logits([examples[i] for i in batch])
            wrong = found.example[found.logits.argmax(-1) != found.targets]
            if places := sorted(set(wrong.tolist())):
                missed = [examples[batch[place]] for place in places]
                for place, same in zip(places, self._same_texts(missed), strict=True):
                    exact[batch[place]] = same
            done(len(batch))
        return exact

    def _same_texts(self, examples: Sequence[tuple[Encoded, Encoded]]) -> list[bool]:
        """Whether the decoded text is the answer's, or begins with an answer that has no end."""
        answers = [answer for _, answer in examples]
        decoded = self._decoded(
            [prompt for prompt, _ in examples], max(map(len, answers)) + OTHER_TOKENS
        )
        texts, expected = (
            self.tokenizer.batch_decode(rows, skip_special_tokens=True)
            for rows in (decoded, answers)
        )
        ended = [answer[-1] == self.tokenizer.eos_token_id for answer in answers]
        return [
            text == wanted if whole else text.startswith(wanted)
            for text, wanted, whole in zip(texts, expected, ended, strict=True)
        ]

    @torch.inference_mode()
    def greedy(
        self, prompts: Sequence[Encoded], tokens: int, done: Callable[[int], None] = lambda _: None
    ) -> list[str]:
        """The first tokens of the model's greedy answer to each prompt, as text."""
        answers = [""] * len(prompts)
        for batch in _batches(sorted(range(len(prompts)), key=lambda i: len(prompts[i]))):
            decoded = self._decoded([prompts[i] for i in batch], tokens)
            texts = self.tokenizer.batch_decode(decoded, skip_special_tokens=True)
            for place, text in zip(batch, texts, strict=True):
                answers[place] = text
            done(len(batch))
        return answers

    def _decoded(self, prompts: Sequence[Encoded], tokens: int) -> list[Encoded]:
        """Greedy decoding of a batch, each answer up to the token that ends it."""
        logits, mask, cache = self._run(prompts, common_length(prompts), last=1)
        found = [logits[:, -1].argmax(-1)]
        ended = self.tokenizer.eos_token_id
        running = found[0] != ended
        while len(found) < tokens and running.any():
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            logits = self.model(
                input_ids=found[-1][:, None],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
            ).logits
            found.append(logits[:, -1].argmax(-1))
            running &= found[-1] != ended
        rows = torch.stack(found, 1).tolist()
        return [row[: row.index(ended)] if ended in row else row for row in rows]

    def _run(
        self, sequences: Sequence[Encoded], shared: int, *, last: int
    ) -> tuple[Tensor, Tensor, Any]:
        """Logits of the last places, mask and cache; the first `shared` tokens are computed once.

        Logits are (sequences, last, vocabulary); padding lies between shared and other tokens.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        if shared:
            prefix = torch.tensor([sequences[0][:shared]], device=self.device)
            self.model(input_ids=prefix, past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(len(sequences))
        ids, mask = self.padded([sequence[shared:] for sequence in sequences])
        mask = torch.cat([torch.ones_like(mask[:, :1]).expand(-1, shared), mask], 1)
        width = ids.shape[1]
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, shared:],
            past_key_values=cache,
            # As places: a slice is not contiguous, and its product copies the output matrix for
            # each example of the batch.
            logits_to_keep=torch.arange(max(0, width - last), width, device=self.device),
        )
        return output.logits, mask, cache

    def padded(self, sequences: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Sequences padded on the left, and the mask of what is not padding."""
        width = max(map(len, sequences))
        ids = torch.full((len(sequences), width), self.tokenizer.pad_token_id)
        mask = torch.zeros((len(sequences), width), dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, width - len(sequence) :] = torch.tensor(sequence)
            mask[row, width - len(sequence) :] = 1
        return ids.to(self.device), mask.to(self.device)


def _placement(folder: Path, device: str, offload: Path) -> dict[str, Any]:
    """How `from_pretrained` places a model that does not fit; empty if it fits.

    Half of the free memory is for weights. The rest is for what runs and for what is kept.
    """
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = _free_memory(device)
    if free is None or 2 * size <= free:
        return {}
    if find_spec("accelerate") is None:
        raise BaseModelUnfit(
            f"{folder} has {size / 2**30:.1f} GiB of weights, more than fit in memory, and the"
            " package accelerate, which leaves them on disk, is not installed"
        )
    most = {0 if device.startswith("cuda") else "cpu": free // 2}
    return {"device_map": "auto", "max_memory": most, "offload_folder": str(offload)}


def check_memory(folder: Path, device: str) -> None:
    """Check, before anything is read, that the weights fit twice: loaded, and while they load.

    Raises:
        BaseModelUnfit: there are no safetensors weights, or not enough memory.
    """
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if not size:
        raise BaseModelUnfit(f"{folder} holds no safetensors weights of a base model")
    free = _free_memory(device)
    if free is not None and 2 * size > free:
        raise BaseModelUnfit(
            f"{folder} has {size / 2**30:.1f} GiB of weights, and {free / 2**30:.1f} GiB of memory"
            " are free, where twice the weights are needed"
        )


def _free_memory(device: str) -> int | None:
    return torch.cuda.mem_get_info()[0] if device.startswith("cuda") else _available_memory()


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def common_length(prompts: Sequence[Encoded]) -> int:
    """How many first tokens all prompts have in common; the last of the shortest is left out."""
    shortest = min(map(len, prompts))
    same = (len({prompt[i] for prompt in prompts}) == 1 for i in range(shortest - 1))
    return sum(1 for _ in takewhile(bool, same))


def _batches(places: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(places), BATCH):
        yield places[start : start + BATCH]
