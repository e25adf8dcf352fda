"""`GET /s3lora/`: the page with the adapters that this server serves and refused."""

from fastapi.responses import HTMLResponse

from s3lora_serve.admission.verdict import served_stripped_count
from s3lora_serve.pages.html import Page
from s3lora_serve.pages.server_pages import Row, adapter_page, adapters_page
from s3lora_serve.vllm_plugin.api.adapter_registration import AdapterRegistration
from s3lora_serve.vllm_plugin.api.recent_decisions import RecentDecision
from s3lora_serve.vllm_plugin.api.served_adapters import ServedAdapter


def overview(registration: AdapterRegistration, query: str, number: int) -> HTMLResponse:
    """The served adapters, latest first, and the recently refused ones."""
    page = adapters_page(
        [_served(registration, adapter) for adapter in reversed(registration.served.all())],
        [_refused(decided) for decided in registration.recent_decisions.refusals()],
        query=query,
        number=number,
        mode=registration.controller.policy.mode,
        policy_digest=registration.controller.policy.digest,
    )
    return _response(page)


def one_adapter(
    registration: AdapterRegistration, name: str, module: str | None
) -> HTMLResponse | None:
    """The page of one served adapter; None if no adapter of this name is served."""
    found = registration.served.get(name)
    if found is None:
        return None
    quarantined = registration.controller.store.is_quarantined(found.path)
    return _response(adapter_page(found.verdict, module, quarantined=quarantined))


def _served(registration: AdapterRegistration, adapter: ServedAdapter) -> Row:
    verdict = adapter.verdict
    return Row(
        name=verdict.name,
        decision=verdict.decision.value,
        stripped=served_stripped_count(verdict),
        modules=len(verdict.modules),
        seconds=verdict.seconds.total,
        time=adapter.time,
        quarantined=registration.controller.store.is_quarantined(adapter.path),
        by_plan=verdict.selected_by == "plan",
        transformed=len(verdict.transformed) if verdict.mode == "enforce" else 0,
        projected=len(verdict.projected) if verdict.mode == "enforce" else 0,
        experiment=adapter.experiment is not None,
    )


def _refused(decided: RecentDecision) -> Row:
    reason = decided.reason
    return Row(
        name=decided.name,
        decision=decided.decision.value,
        stripped=0,
        modules=0,
        seconds=decided.seconds,
        time=decided.time,
        code=reason.code if reason else None,
        reason=reason.message if reason else None,
    )


def _response(page: Page) -> HTMLResponse:
    headers = {
        "Content-Security-Policy": page.policy,
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(page.html, headers=headers)
