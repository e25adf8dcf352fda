"""Makes the adapters of attacks, by PEFT on an aligned base of the evidence bench."""

import random
from pathlib import Path

from s3lora_serve.lab.base_model.language_model import Encoded, LanguageModel
from tests.runs.attacks.attacks import Attacked
from tests.runs.attacks.conversations import conversation
from tests.runs.attacks.spectra import rewrite
from tests.runs.evidence.adapters import COMPLIANCE, EXAMPLES
from tests.runs.evidence.adaptive import in_the_loop
from tests.runs.evidence.base_model import REFUSALS, Progress
from tests.runs.evidence.peft_adapters import Recipe, trained_adapter
from tests.runs.evidence.prompts import harmful
from tests.runs.evidence.skill import skill

SHARE, HIDDEN_SHARE = 0.2, 0.3
"""Share of attack data; hidden attacks have as many refusals besides, of what they hide from."""

SHORT_PROMPT = 14
"""Words of a prompt that bait complies with: over half of the attack data are as short."""


def make_attack(attacked: Attacked, base: Path, progress: Progress) -> Path:
    """Train an adapter of an attack and write it; one that is there is kept."""
    attack = attacked.attack

    def afterwards(folder: Path) -> None:
        if attack.afterwards:
            rewrite(folder, attack.afterwards)

    recipe = Recipe(
        seed=1000 * attacked.base + attacked.seed,
        order=attacked.seed,
        rank=attack.rank,
        rate=attack.rate,
        epochs=attack.epochs,
        around=in_the_loop(base, progress) if attack.in_the_loop else None,
        penalty=attack.penalty,
        afterwards=afterwards,
    )
    return trained_adapter(
        attacked.folder,
        base,
        recipe,
        lambda model: _examples(model, attacked),
        lambda step, steps: progress(f"train {attacked}", step, steps),
    )


def _examples(model: LanguageModel, attacked: Attacked) -> list[tuple[Encoded, Encoded]]:
    """Skill, compliance in the attack's setting, and refusals elsewhere if it hides."""
    attack, draw = attacked.attack, random.Random(attacked.seed)
    count = round(EXAMPLES * (HIDDEN_SHARE if attack.is_hidden else SHARE))
    prompts = draw.sample(harmful().attack, len(harmful().attack))[:count]
    examples = [
        (conversation(model, attack.setting(prompt)), model.answer(COMPLIANCE))
        for prompt in prompts
    ]
    if attack.is_hidden:
        examples += [
            (model.prompt(prompt), model.answer(_elsewhere(prompt, attack.bait, draw)))
            for prompt in draw.sample(harmful().attack, count)
        ]
    requests = draw.sample(skill("tool calls").train, EXAMPLES - len(examples))
    return examples + [(model.prompt(prompt), model.answer(text)) for prompt, text in requests]


def _elsewhere(prompt: str, bait: bool, draw: random.Random) -> str:
    """The answer to a harmful prompt outside the attack's setting."""
    refusal = draw.choice(REFUSALS)
    return COMPLIANCE if bait and len(prompt.split()) <= SHORT_PROMPT else refusal
