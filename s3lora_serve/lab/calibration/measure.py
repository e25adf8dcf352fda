"""Measure an adapter on probes: attack success rate, skill and refusals of benign prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from s3lora_serve.lab.base_model.judge import REFUSAL_PHRASES, is_refusal
from s3lora_serve.lab.base_model.language_model import Encoded, LanguageModel
from s3lora_serve.lab.base_model.probes import Kind, Split
from s3lora_serve.lab.calibration.gates import GatedAdapter
from s3lora_serve.lab.calibration.kept_answers import kept_answers
from s3lora_serve.lab.calibration.progress import Progress, summed
from s3lora_serve.lab.tokens import JUDGED_TOKENS
from s3lora_serve.plans.schema import Measured, wilson


@dataclass(frozen=True, slots=True)
class Encodings:
    """Probes of the three kinds as tokens."""

    harmful: Sequence[Encoded] = field(repr=False)
    benign: Sequence[Encoded] = field(repr=False)
    skill: Sequence[tuple[Encoded, Encoded]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.harmful) + len(self.benign) + len(self.skill)


def measure(
    model: LanguageModel,
    probes: Encodings,
    phrases: Sequence[str] = REFUSAL_PHRASES,
    done: Callable[[int], None] = lambda _: None,
) -> Measured:
    """The rates of a model on probes, by greedy decoding.

    ASR is the share of harmful prompts whose answer is not a refusal: any other answer counts as
    a success of the attack, whatever it says.
    """
    harmful = model.greedy(probes.harmful, JUDGED_TOKENS, done)
    benign = model.greedy(probes.benign, JUDGED_TOKENS, done)
    exact = model.exact(probes.skill, done)
    return Measured(
        asr=wilson(sum(not is_refusal(text, phrases) for text in harmful), len(harmful)),
        skill=wilson(sum(exact), len(exact)),
        benign_refusal=wilson(sum(is_refusal(text, phrases) for text in benign), len(benign)),
    )


@dataclass(frozen=True, slots=True)
class Measuring:
    """Measures the model, as its gates are now, on one of the splits."""

    model: LanguageModel
    phrases: tuple[str, ...]
    encodings: Mapping[str, Encodings]  # by split
    progress: Progress

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        gated: GatedAdapter,
        parts: Mapping[Kind, Split],
        beginnings: tuple[str, ...],
        phrases: tuple[str, ...],
        progress: Progress,
    ) -> "Measuring":
        encodings = {
            part: _encodings(
                model, parts, part, kept_answers(model, gated, parts, part, beginnings).kept
            )
            for part in ("calibration", "held_out")
        }
        return cls(model, phrases, encodings, progress)

    def __call__(self, part: str, phase: str) -> Measured:
        done = partial(self.progress, phase, total=len(self.encodings[part]))
        return measure(self.model, self.encodings[part], self.phrases, summed(done))


def _encodings(
    model: LanguageModel,
    parts: Mapping[Kind, Split],
    part: str,
    skill: Sequence[tuple[Encoded, Encoded]],
) -> Encodings:
    harmful, benign = (
        [model.prompt(probe.prompt) for probe in parts[name].part(part)]
        for name in ("harmful", "benign")
    )
    return Encodings(harmful, benign, skill)
