"""`GET /s3lora/`: what this server serves and what it refused, for people."""

from fastapi.responses import HTMLResponse

from s3lora_serve.pages.render import Page, Row, adapter_page, adapters_page
from s3lora_serve.verdict import served_stripped
from s3lora_serve.vllm_plugin.decisions import Decided
from s3lora_serve.vllm_plugin.registrar import Registrar
from s3lora_serve.vllm_plugin.served import Served


def overview(gate: Registrar, query: str, number: int) -> HTMLResponse:
    """The adapters this server serves, latest first, and those it lately refused."""
    page = adapters_page(
        [_served(gate, adapter) for adapter in reversed(gate.served.all())],
        [_refused(decided) for decided in gate.decisions.refusals()],
        query=query,
        number=number,
        mode=gate.policy.mode,
        policy_digest=gate.policy.digest,
    )
    return _response(page)


def one_adapter(gate: Registrar, name: str, module: str | None) -> HTMLResponse | None:
    """One served adapter; None if there is none of this name."""
    found = gate.served.get(name)
    if found is None:
        return None
    return _response(
        adapter_page(found.verdict, module, quarantined=gate.is_quarantined(found.path))
    )


def _served(gate: Registrar, adapter: Served) -> Row:
    verdict = adapter.verdict
    return Row(
        name=verdict.name,
        decision=verdict.decision.value,
        stripped=served_stripped(verdict),
        modules=len(verdict.modules),
        seconds=verdict.seconds.total,
        time=adapter.time,
        quarantined=gate.is_quarantined(adapter.path),
    )


def _refused(decided: Decided) -> Row:
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
