"""Check at start that the policy's alignment reference was made for the served model."""

from pathlib import Path

from s3lora_serve.admission.scoring import alignment_reference
from s3lora_serve.alignment.checkpoint import config_digest
from s3lora_serve.errors import PolicyInvalid, RefusedByVLLM
from s3lora_serve.policy.schema import Policy
from s3lora_serve.vllm_plugin.engine.lora_modules import WorkerModel


def check_reference_fits(model: WorkerModel, policy: Policy) -> None:
    """Check config, module names and shapes, as far as this worker knows them.

    An adapter with a module that the reference lacks is refused later, at its admission.

    Raises:
        PolicyInvalid: the reference was made for another model.
    """
    reference = alignment_reference(policy)
    if reference is None:
        return
    base_model, shapes = model.base_model, model.modules.shapes
    made_for = reference.about.config_digest
    served = config_digest(Path(base_model)) if base_model else None
    if None not in (made_for, served) and made_for != served:
        raise PolicyInvalid(
            f"scorer.reference was made for a model with config {made_for}, {base_model} has"
            f" {served}: make one for the served model"
        )
    keys = {f"base_model.model.{name}.lora_B.weight": name for name in reference.about.modules}
    try:
        names = model.modules.mapped(keys)
    except RefusedByVLLM as refusal:
        raise PolicyInvalid(f"scorer.reference: {refusal.problem}") from None
    for key, target in names.items():
        record = reference.about.modules[keys[key]]
        if target in shapes and shapes[target] != record.shape:
            raise PolicyInvalid(
                f"scorer.reference has {keys[key]} as {record.shape}, the served model as"
                f" {shapes[target]}"
            )
    if model.modules.is_whole and not shapes.keys() & set(names.values()):
        raise PolicyInvalid("scorer.reference has no module of the served model")
