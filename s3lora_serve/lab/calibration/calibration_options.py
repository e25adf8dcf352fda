"""What an operator can set of a calibration."""

from dataclasses import dataclass

from s3lora_serve.lab.base_model.judge import REFUSAL_PHRASES
from s3lora_serve.lab.calibration.gate_families import By
from s3lora_serve.lab.calibration.search import STRENGTHS, SearchOptions
from s3lora_serve.plans.defaults import MAX_ASR, STEPS


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """What an operator can set."""

    max_asr: float = MAX_ASR
    by: By = "directions"
    steps: int = STEPS
    seed: int = 0
    refusals: tuple[str, ...] = ()  # texts; none: the base model's own refusals
    compliance: tuple[str, ...] = ()  # how an attack's answers begin; none: anything but refusals
    phrases: tuple[str, ...] = REFUSAL_PHRASES
    strengths: tuple[float, ...] = STRENGTHS
    compare: bool = False  # also measure whole modules at equal removed norm

    @property
    def of_search(self) -> SearchOptions:
        """Those of the search for gates."""
        return SearchOptions(self.by, self.steps, self.seed, self.strengths, self.compare)
