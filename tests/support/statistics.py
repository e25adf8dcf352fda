"""Statistics of the tiny chat model, and small ones that are made up."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from s3lora_serve.lab.base_model.language_model import Encoded
from s3lora_serve.lab.base_model.probes import read_probes
from s3lora_serve.lab.statistics.input_statistics import Choice
from s3lora_serve.lab.statistics.make_statistics import Benign, StatisticsProbes, make_statistics
from s3lora_serve.lab.statistics.refusal_gradients import ODDS_TOKENS
from s3lora_serve.repair.statistics_file import METADATA_KEY
from tests.support import tensor_files
from tests.support.tiny_chat import Chat, one_thread

RANK = 16
OUTPUT_RANK = 16


def chat_statistics(chat: Chat, target: Path, **choice) -> Path:
    """Statistics of the chat model, with its benign probes and requests of the skill's kind."""
    files = [read_probes(file, "benign") for file in (chat.benign, chat.skill)]
    with one_thread():
        make_statistics(
            chat.base,
            StatisticsProbes(
                read_probes(chat.harmful, "harmful"), [Benign(file) for file in files]
            ),
            target,
            Choice(rank=RANK, output_rank=OUTPUT_RANK, **choice),
            dtype="float32",
        )
    return target


def refusal_log_odds(model: Any, prompt: Encoded, answer: Encoded) -> torch.Tensor:
    """Σ log-odds of a refusal's first tokens, from a pass of the whole model; has a gradient."""
    logits = model.model(torch.tensor([prompt + answer])).logits[0].double()
    total = torch.zeros(())
    for place, token in enumerate(answer[:ODDS_TOKENS], len(prompt) - 1):
        p = logits[place].softmax(-1)[token]
        total = total + (p / (1 - p)).log()
    return total


rewritten = partial(tensor_files.rewritten, key=METADATA_KEY)
"""A copy of a file of statistics with tensors and metadata changed."""


def covariance(n: int, seed: int, tokens: int = 40) -> torch.Tensor:
    """The covariance of random inputs with a falling spectrum, (n, n) float64."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=draw).double() * 0.8 ** torch.arange(n).double()
    inputs = torch.randn(tokens, n, generator=draw).double() @ mixing.mT
    return inputs.mT @ inputs / tokens
