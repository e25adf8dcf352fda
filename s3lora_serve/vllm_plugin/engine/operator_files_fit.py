"""Check at start that the files which the policy names were made for the served model."""

from collections.abc import Callable, Iterable
from pathlib import Path

from s3lora_serve.admission.scoring import alignment_reference
from s3lora_serve.alignment.checkpoint import config_digest
from s3lora_serve.errors import PolicyInvalid, RefusedByVLLM
from s3lora_serve.policy.schema import Policy
from s3lora_serve.repair.statistics_file import read_statistics
from s3lora_serve.vllm_plugin.engine.lora_modules import WorkerModel

Shape = tuple[int, int]


def check_operator_files_fit(model: WorkerModel, policy: Policy) -> None:
    """Check config, module names and shapes, as far as this worker knows them.

    An adapter with a module that a file lacks is refused later, at its admission.

    Raises:
        PolicyInvalid: a file was made for another model.
    """
    if (reference := alignment_reference(policy)) is not None:
        records = reference.about.modules
        _check_config("scorer.reference", reference.about.config_digest, model)
        _check_modules(
            "scorer.reference", model, records, lambda name: str(records[name].shape),
            lambda name, shape: records[name].shape == shape,
        )  # fmt: skip
    if policy.repair is not None:
        digest = policy.repair.statistics_digest
        statistics = read_statistics(policy.repair.statistics, expected=digest)
        sites = statistics.by_module
        _check_config("repair.statistics", statistics.about.config_digest, model)
        _check_modules(
            "repair.statistics", model, sites, lambda name: f"{sites[name].width} inputs",
            lambda name, shape: sites[name].width == shape[1],
        )  # fmt: skip


def _check_config(what: str, made_for: str | None, model: WorkerModel) -> None:
    served = config_digest(Path(model.base_model)) if model.base_model else None
    if None not in (made_for, served) and made_for != served:
        raise PolicyInvalid(
            f"{what} was made for a model with config {made_for}, {model.base_model} has"
            f" {served}: make one for the served model"
        )


def _check_modules(
    what: str,
    model: WorkerModel,
    modules: Iterable[str],
    told: Callable[[str], str],
    fits: Callable[[str, Shape], bool],
) -> None:
    """Check modules by the names that adapters give them; `fits(module, served shape)`."""
    shapes = model.modules.shapes
    keys = {f"base_model.model.{name}.lora_B.weight": name for name in modules}
    try:
        names = model.modules.mapped(keys)
    except RefusedByVLLM as refusal:
        raise PolicyInvalid(f"{what}: {refusal.problem}") from None
    for key, target in names.items():
        if target in shapes and not fits(keys[key], shapes[target]):
            raise PolicyInvalid(
                f"{what} has {keys[key]} as {told(keys[key])}, the served model as {shapes[target]}"
            )
    if model.modules.is_whole and not shapes.keys() & set(names.values()):
        raise PolicyInvalid(f"{what} has no module of the served model")
