"""MAS-SVD and the Spectral Sharpness Index on LoRA factors. The only dependency is torch.

>>> import torch
>>> from s3lora_serve.spectral import Factors, score_modules
>>> rank_one = Factors("q_proj", torch.ones(6, 2), torch.ones(2, 5), scaling=2.0)
>>> [score] = score_modules([rank_one], device="cpu")
>>> round(score.ssi, 6), score.spectrum[0] > 0
(1.0, True)
"""

from s3lora_serve.spectral.alignment import Subspace
from s3lora_serve.spectral.base_statistics import InputStatistics, OutputStatistics
from s3lora_serve.spectral.device import warm_up
from s3lora_serve.spectral.fallback import CAUSES as FALLBACK_CAUSES
from s3lora_serve.spectral.fallback import report_to as report_fallbacks_to
from s3lora_serve.spectral.fallback import take_counts as take_fallbacks
from s3lora_serve.spectral.low_rank import mas_svd
from s3lora_serve.spectral.repair_effects import Effect
from s3lora_serve.spectral.result import Spectrum, relative_sharpness, spectral_sharpness
from s3lora_serve.spectral.scorer import (
    Factors,
    ModuleScore,
    Scorer,
    resolve_device,
    score_modules,
)

__all__ = [
    "FALLBACK_CAUSES",
    "Effect",
    "Factors",
    "InputStatistics",
    "ModuleScore",
    "OutputStatistics",
    "Scorer",
    "Spectrum",
    "Subspace",
    "mas_svd",
    "relative_sharpness",
    "report_fallbacks_to",
    "resolve_device",
    "score_modules",
    "spectral_sharpness",
    "take_fallbacks",
    "warm_up",
]
