"""The servers that a planner watches: what they serve, what is asked for, and loads in place."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from s3lora_serve.adapter.private_copy import copy_adapter
from s3lora_serve.errors import AdapterRejected, ServerFailed
from s3lora_serve.policy.limits import Limits

PAGE = 1000
"""Adapters in one answer: the most that a server gives."""

SECONDS = 60
LOAD_SECONDS = 600
"""A load may take as long as a policy allows."""

AT_WORK = "vllm:lora_requests_info"
"""vLLM's gauge whose labels list the adapters of the requests under way, separated by commas."""


@dataclass(frozen=True, slots=True)
class Served:
    """One adapter under one name on one server."""

    server: str  # URL
    name: str
    path: str  # that it was registered with
    digest: str
    config_digest: str | None
    plan_digest: str | None  # of the plan that decided on it

    @property
    def tenant(self) -> str:
        """The name's first part, as the policy's rates have it."""
        return self.name.partition("/")[0]


class LoadRefused(ServerFailed):
    """The server refuses an adapter: it would refuse it again."""


class FleetServer:
    """One guarded server, or several API servers behind one URL."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Name the server and its API key, if it has one."""
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=SECONDS)

    def adapters(self) -> list[Served]:
        """What the server serves by files that were read; experiments are left alone.

        Raises:
            ServerFailed: it does not answer, or is not guarded.
        """
        experiments = self._experiments()
        try:
            found = [_served(self.url, each) for each in self._verdicts() if each["digest"]]
        except (KeyError, TypeError) as error:
            raise ServerFailed(f"{self.url} answers with no verdicts: {error!r}") from None
        return [each for each in found if each.name not in experiments]

    def takes_plans(self) -> bool:
        """Whether its policy names a folder of plans, as far as it says.

        Raises:
            ServerFailed: it does not answer.
        """
        answer = self._answer("GET", "/s3lora/policy")
        try:
            return answer.json()["policy"]["plans"] is not None
        except (ValueError, KeyError, TypeError):
            return True  # it will be seen when there is a plan

    def at_work(self, names: Sequence[str]) -> set[str]:
        """Which of these adapters have requests under way, as far as the server's metrics say."""
        try:
            text = self._client.get("/metrics").text
            families = list(text_string_to_metric_families(text))
        except (httpx.HTTPError, ValueError):
            return set()
        samples = [s for family in families for s in family.samples if s.name == AT_WORK]
        if not samples:
            return set()
        # vLLM keeps a series for each set of adapters that it ever had; the value is its time.
        now = max(samples, key=lambda sample: sample.value)
        listed = [v for label, v in now.labels.items() if label.endswith("lora_adapters")]
        return set(names) & {name for text in listed for name in text.split(",")}

    def load_again(self, adapter: Served) -> None:
        """Register an adapter again under its name and path, in place.

        Raises:
            LoadRefused: the server refuses it.
            ServerFailed: it does not answer, or turns the load away for now.
        """
        body = {"lora_name": adapter.name, "lora_path": adapter.path, "load_inplace": True}
        answer = self._answer("POST", "/v1/load_lora_adapter", body, LOAD_SECONDS)
        if answer.status_code != 200:
            said = f"{self.url} answered {answer.status_code}: {answer.text[:300]}"
            raise LoadRefused(said) if answer.status_code == 400 else ServerFailed(said)

    def find(self, name: str) -> Served | None:
        """What the server serves under a name now; None: nothing."""
        return next((each for each in self.adapters() if each.name == name), None)

    def _experiments(self) -> set[str]:
        answer = self._answer("GET", "/s3lora/experiments")
        if answer.status_code == 404:  # it loads no adapters at run time
            return set()
        return set(self._value(answer, "registered"))

    def _verdicts(self) -> Iterator[dict[str, Any]]:
        offset = 0
        while True:
            path = f"/s3lora/adapters?offset={offset}&limit={PAGE}&modules=false"
            found = self._value(self._answer("GET", path), "adapters")
            yield from found
            if len(found) < PAGE:
                return
            offset += PAGE

    def _value(self, answer: httpx.Response, key: str) -> list[Any]:
        """A list in a server's JSON answer."""
        try:
            found = answer.json()[key]
        except (ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, list):
            raise ServerFailed(
                f"{self.url} is no guarded server: {answer.url.path} answered"
                f" {answer.status_code} {answer.text[:100]!r}"
            )
        return found

    def _answer(
        self, method: str, path: str, body: dict[str, Any] | None = None, seconds: float = SECONDS
    ) -> httpx.Response:
        try:
            return self._client.request(method, path, json=body, timeout=seconds)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerFailed(f"{self.url}: {str(error) or type(error).__name__}") from None


def _served(server: str, verdict: dict[str, Any]) -> Served:
    # A plan that keeps every module whole is obeyed too; then repair chooses what is changed.
    plan = None if verdict["decision"] == "rejected" else verdict["plan_digest"]
    return Served(
        server, verdict["name"], verdict["path"], verdict["digest"], verdict["config_digest"], plan
    )


def holds(path: str, digest: str) -> bool:
    """Whether the adapter folder at this path holds the weights with this digest now."""
    try:
        return copy_adapter(Path(path), Limits()).digest == digest
    except (AdapterRejected, OSError):
        return False
