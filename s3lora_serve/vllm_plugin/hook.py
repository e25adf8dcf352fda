"""Installs the gate in a vLLM process: API server, engine or worker."""

from s3lora_serve.errors import FrontEndUnguarded
from s3lora_serve.policy.schema import Policy
from s3lora_serve.settings import load_settings
from s3lora_serve.spectral import report_fallbacks_to
from s3lora_serve.telemetry.policy_gauge import leave_out_former_policies
from s3lora_serve.vllm_plugin import compat, contract, front_end, patches, resolver_patches
from s3lora_serve.vllm_plugin.api.adapter_registrations import AdapterRegistrations
from s3lora_serve.vllm_plugin.api.llm_engine_admission import LLMEngineAdmission
from s3lora_serve.vllm_plugin.api.name_locks import NameLocks
from s3lora_serve.vllm_plugin.api.registration import registering
from s3lora_serve.vllm_plugin.api.resolver_guard import ResolverGuard
from s3lora_serve.vllm_plugin.engine.base_model_tokens import clear_base_model_tokens
from s3lora_serve.vllm_plugin.engine.loader import AdapterLoader
from s3lora_serve.vllm_plugin.engine.rank_alpha_matching import match_patterns
from s3lora_serve.vllm_plugin.engine.requests_without_effect import RequestsWithoutEffect
from s3lora_serve.vllm_plugin.engine.skipping import Skipping
from s3lora_serve.vllm_plugin.engine.worker_methods import WorkerMethods
from s3lora_serve.vllm_plugin.guarded_process import GuardedProcess
from s3lora_serve.vllm_plugin.vllm_version import is_supported

_registrations: AdapterRegistrations | None = None
_installed = False


def install() -> None:
    """Guard this process, once.

    Raises:
        S3LoRAError: invalid policy or environment, an unknown vLLM, or an unguarded front end.
    """
    global _registrations, _installed
    if _installed:
        return
    settings = load_settings()
    process = GuardedProcess(settings)
    _check_front_end(process.policy)
    contract.check_contract()
    if not is_supported(release := compat.installed_version()):
        compat.logger.warning(
            "s3lora: vLLM %s was never checked; it has what the gate relies on", release
        )
    report_fallbacks_to(compat.logger.warning)
    leave_out_former_policies()
    loader = AdapterLoader(process)
    patches.after_create_lora_manager(lambda *_: contract.check_model_runners())
    patches.after_create_lora_manager(loader.models.activate)
    WorkerMethods(process, loader).install()
    if process.policy.mode != "off":
        process.store.prepare()
        _registrations = AdapterRegistrations(process)
        patches.compare_requests_by_name_and_id()
        clear_base_model_tokens()
        match_patterns()
        skipping = Skipping(wanted=settings.skip_stripped, captured=settings.skip_captured)
        patches.after_create_lora_manager(skipping.activate)
        if settings.skip_stripped:
            _take_as_base_requests(process)
        patches.wrap_load_adapter(loader.load)
        patches.wrap_add_adapter(loader.add)
        patches.after_remove_lora(loader.registrations.remove)
        patches.wrap_add_lora(_registrations.add_lora)
        patches.wrap_add_request(LLMEngineAdmission(process).admitted_request)
        patches.wrap_doors(registering)
        resolver_patches.replace_name_locks(NameLocks)
        resolvers = ResolverGuard(process)
        resolver_patches.wrap_resolvers(resolvers.check_name, resolvers.find, resolvers.ask_hub)
        patches.wrap_model_list(_registrations.served.origin)
        patches.wrap_unload(_registrations.check_unload, _registrations.served.remove)
        patches.separate_quarantined_blocks(loader.quarantine.has_path)
    _installed = True


def _take_as_base_requests(process: GuardedProcess) -> None:
    if problem := contract.base_requests_obstacle():
        compat.logger.info("s3lora: adapters without effect cost what others do: %s", problem)
        return
    patches.without_adapter_if(RequestsWithoutEffect(process.store))


def _check_front_end(policy: Policy) -> None:
    """Refuse a front end in which the gate does not decide, unless the policy allows it.

    Raises:
        FrontEndUnguarded: there is one.
    """
    reason = front_end.running()
    if reason is None or policy.mode == "off":
        return
    if policy.unguarded_frontends == "refuse":
        raise FrontEndUnguarded(reason)
    compat.logger.warning("s3lora: %s", reason)


def registrations() -> AdapterRegistrations | None:
    """The registrations of this process, if the gate is installed and its mode is not off."""
    return _registrations
