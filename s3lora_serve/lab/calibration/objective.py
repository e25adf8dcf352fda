"""The loss that gates are learnt by."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from s3lora_serve.lab.base_model.language_model import AnswerLogits, Encoded, LanguageModel
from s3lora_serve.lab.calibration.gates import GatedAdapter

MARGIN = 4.0
"""Log-odds of a refusal that are enough: a first token of refusal with 98 %. Ours."""

REST = 0.3
"""Weight of a refusal's later tokens: mostly the first one decides. Ours."""

SKILL = 6.0
"""Weight of the skill that is lost. Ours: with less, gates that keep the skill on the prompts they
learn from lose more of it on others."""

BENIGN = 4.0
"""Weight of the divergence from the base model on benign prompts. Ours: with less, the
gates of the bench's adapters refuse benign prompts too."""

PRICE = 1.0
"""Price, in nats, of removing the whole update. Ours."""


AT_ONCE = 24
"""Examples in one pass without gradients."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Examples of one step: prompt and answer as tokens."""

    refusals: Sequence[tuple[Encoded, Encoded]]  # harmful prompt, the refusal wanted
    skill: Sequence[tuple[Encoded, Encoded, float]]  # the answer to keep, its `answer_loss` whole
    benign: Sequence[tuple[Encoded, Encoded]]  # benign prompt, the base model's own answer


def loss(
    model: LanguageModel,
    adapter: GatedAdapter,
    gates: Sequence[Tensor],
    batch: StepBatch,
    compliance: Sequence[int] = (),
) -> Tensor:
    """`softplus(margin − log-odds) + REST·CE + SKILL·lost + BENIGN·KL + PRICE·removed`.

    The log-odds of a refusal are those of its first token against the tokens that compliance begins
    with; without any against all others, so that an attack's wording need not be known. CE is the
    mean cross-entropy of its other tokens. Lost is `max(0, answer_loss − that of the whole
    adapter)`, a mean over answers: skill that an adapter never had cannot be lost. KL is that of
    the base model from the gated one, a mean over tokens. Removed is the removed share of Σ‖ΔW‖_F².
    """
    base = _base_distribution(model, adapter, batch.benign) if batch.benign else None
    adapter.set(gates)
    refusals = model.answer_logits(batch.refusals)
    likelihood = _log_likelihood(refusals)
    first = likelihood[refusals.first]
    if compliance:
        each = functional.log_softmax(refusals.logits[refusals.first], -1)
        rival = each[:, list(compliance)].logsumexp(-1)
    else:
        rival = torch.log1p(-first.exp().clamp(max=1 - 1e-6))
    log_odds = first - rival
    total = functional.softplus(MARGIN - log_odds).mean()
    if not refusals.first.all():
        total = total - REST * likelihood[~refusals.first].mean()
    whole = torch.tensor([loss for _, _, loss in batch.skill], device=model.device)
    now = answer_losses(model, [(prompt, answer) for prompt, answer, _ in batch.skill])
    total = total + SKILL * functional.relu(now - whole).mean()
    if base is not None:
        gated = functional.log_softmax(model.answer_logits(batch.benign).logits, -1)
        divergence = functional.kl_div(gated, base, log_target=True, reduction="batchmean")
        total = total + BENIGN * divergence
    return total + PRICE * adapter.removed_share(gates)


def answer_losses(model: LanguageModel, examples: Sequence[tuple[Encoded, Encoded]]) -> Tensor:
    """Cross-entropy of each answer, summed over its tokens, (examples,), in nats."""
    found = model.answer_logits(examples)
    losses = torch.zeros(len(examples), device=found.logits.device)
    return losses.index_add(0, found.example, -_log_likelihood(found))


def _log_likelihood(found: AnswerLogits) -> Tensor:
    """Log-probability of each token of the answers."""
    return -functional.cross_entropy(found.logits, found.targets, reduction="none")


@torch.no_grad()
def all_answer_losses(
    model: LanguageModel, examples: Sequence[tuple[Encoded, Encoded]]
) -> list[float]:
    """As `answer_losses`, of any number of examples, without gradients."""
    found: list[float] = []
    for start in range(0, len(examples), AT_ONCE):
        found += answer_losses(model, examples[start : start + AT_ONCE]).tolist()
    return found


@torch.no_grad()
def _base_distribution(
    model: LanguageModel, adapter: GatedAdapter, examples: Sequence[tuple[Encoded, Encoded]]
) -> Tensor:
    adapter.remove()
    return functional.log_softmax(model.answer_logits(examples).logits, -1)
