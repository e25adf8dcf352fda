"""`GET /s3lora/`: the page with the adapters that this server serves and refused."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fastapi.responses import HTMLResponse

from s3lora_serve.admission.verdict import Verdict, served_stripped_count
from s3lora_serve.pages.html import Page
from s3lora_serve.pages.server_pages import AdapterRow, adapter_page, adapters_page
from s3lora_serve.plans.planner_records import plan_progress
from s3lora_serve.policy.schema import Policy
from s3lora_serve.store.stored_spectra import with_spectra
from s3lora_serve.vllm_plugin.api.recent_decisions import RecentDecision
from s3lora_serve.vllm_plugin.api.served_adapters import ServedAdapter, ServedAdapters


def overview(
    policy: Policy,
    served: ServedAdapters,
    adapters: Sequence[ServedAdapter],
    refused: Sequence[RecentDecision],
    query: str,
    number: int,
) -> HTMLResponse:
    """The served adapters, latest first, and the recently refused ones.

    `adapters` are those of `served`, listed on the server's loop, which changes them.
    """
    page = adapters_page(
        adapters[::-1],
        [_refused(decided) for decided in refused],
        partial(_served, served, policy.plans),
        query=query,
        number=number,
        mode=policy.mode,
        policy_digest=policy.digest,
    )
    return _response(page)


def one_adapter(served: ServedAdapters, adapter: ServedAdapter, module: str | None) -> HTMLResponse:
    """The page of one served adapter."""
    verdict = with_spectra(adapter.verdict, adapter.path)
    return _response(adapter_page(verdict, module, quarantined=served.is_quarantined(adapter)))


def _served(served: ServedAdapters, plans: Path | None, adapter: ServedAdapter) -> AdapterRow:
    verdict = adapter.verdict
    return AdapterRow(
        name=verdict.name,
        decision=verdict.decision.value,
        stripped=served_stripped_count(verdict),
        modules=len(verdict.modules),
        seconds=verdict.seconds.total,
        time=adapter.time,
        quarantined=served.is_quarantined(adapter),
        selected_by=verdict.selected_by,
        transformed=len(verdict.transformed) if verdict.mode == "enforce" else 0,
        projected=len(verdict.projected) if verdict.mode == "enforce" else 0,
        repaired=len(verdict.repaired) if verdict.mode == "enforce" else 0,
        suspicion=verdict.suspicion,
        experiment=adapter.experiment is not None,
        plan=None if plans is None or adapter.experiment else _plan(plans, verdict),
    )


def _plan(plans: Path, verdict: Verdict) -> str | None:
    """How far the plan for a served adapter is."""
    if verdict.plan_digest is not None or verdict.digest is None:
        return "obeyed" if verdict.digest else None
    progress, code = plan_progress(plans, verdict.digest)
    return f"{progress}: {code}" if code else progress


def _refused(decided: RecentDecision) -> AdapterRow:
    reason = decided.reason
    return AdapterRow(
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
