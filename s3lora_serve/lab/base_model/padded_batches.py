"""What is asked of a batch of examples that are padded on the left."""

import torch
from torch import Tensor

from s3lora_serve.lab.base_model.language_model import LanguageModel


def last_logits(model: LanguageModel, ids: Tensor, mask: Tensor, last: int) -> Tensor:
    """The logits of the last tokens, (examples, last, vocabulary)."""
    logits: Tensor = model.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=last,
    ).logits
    return logits


def counted_tokens(mask: Tensor, skipped: int) -> Tensor:
    """Tokens that means are of, (examples, tokens) bool: not the first `skipped` of an example.

    Nor the last one: its successor is not the answer's any more, so its inputs are never used.
    """
    counted = mask.bool() & (mask.cumsum(1) > skipped)
    counted[:, -1] = False
    return counted


def log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    """`z_t − log Σ exp(z_j), j ≠ t`, of each row's token t.

    Shape: (tokens, vocabulary), (tokens,) -> (tokens,).
    """
    own = logits.gather(-1, targets[:, None]).squeeze(-1)
    return own - logits.scatter(-1, targets[:, None], -torch.inf).logsumexp(-1)
