"""A running guarded server: its experiments over HTTP."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx

from s3lora_serve.errors import EvaluationFailed
from s3lora_serve.lab.evaluation.trials import Trial

REGISTER_SECONDS = 600
"""A download and the decision may take as long as a policy allows."""

SECONDS = 60
"""For all other requests."""

LATE_ATTEMPTS, LATE_SECONDS = 20, 0.5
"""A registration that was interrupted goes on in the server: its end is asked for until it is."""


class NoAnswer(EvaluationFailed):
    """The server was not reached, or did not answer in time."""


class GuardedServer:
    """The server at a URL, with its API key if it has one."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self.key = key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=SECONDS)

    def names(self, needed: set[str]) -> str:
        """The glob of names for experiments.

        Raises:
            EvaluationFailed: the server is not guarded, or does not allow what is needed.
        """
        answer = self._ask("GET", "/s3lora/experiments")
        names, allow = answer.get("names"), set(answer.get("allow") or ())
        if not isinstance(names, str):
            raise EvaluationFailed(f"the policy of {self.url} allows no experiments")
        if closed := sorted(needed - allow):
            raise EvaluationFailed(
                f"the policy of {self.url} allows experiments to set {sorted(allow)}, not"
                f" {closed[0]}"
            )
        return names

    @contextmanager
    def experiment(self, name: str, path: str, trial: Trial) -> Iterator[dict[str, Any]]:
        """The verdict on an adapter that is registered for the time of this context.

        Raises:
            EvaluationFailed: it is refused, the server does not answer, or enforces nothing.
        """
        body = {"lora_name": name, "lora_path": path, "settings": trial.settings}
        if trial.plan is not None:
            body["plan"] = trial.plan
        attempts = LATE_ATTEMPTS
        try:
            verdict = self._ask("POST", "/s3lora/experiments", body, REGISTER_SECONDS)
            attempts = 1
            if verdict.get("mode") != "enforce":
                raise EvaluationFailed(
                    f"{self.url} is in mode {verdict.get('mode')}: it serves"
                    " adapters whole, so all settings are equal"
                )
            if trial.plan is None and verdict.get("selected_by") == "plan":
                raise EvaluationFailed(
                    f"{self.url} has a plan for the adapter, which decides whatever is set: add"
                    " plan to experiments.allow in its policy"
                )
            yield verdict
        except EvaluationFailed as error:
            attempts = LATE_ATTEMPTS if isinstance(error, NoAnswer) else 1
            raise
        finally:
            self._end(name, attempts)

    def _end(self, name: str, attempts: int) -> None:
        """Unload an experiment. One whose registration got no answer may be registered late."""
        for attempt in range(attempts):
            try:
                self._ask("DELETE", f"/s3lora/experiments/{quote(name)}")
                return
            except EvaluationFailed:  # gone with the server, or not registered
                if attempt + 1 < attempts:
                    time.sleep(LATE_SECONDS)

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, seconds: float = SECONDS
    ) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, json=body, timeout=seconds)
            found = answer.json()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NoAnswer(f"{self.url}: {str(error) or type(error).__name__}") from None
        except ValueError:
            raise EvaluationFailed(
                f"{self.url} is no guarded server, or loads no adapters at run time: {path}"
                f" answered {answer.status_code} {answer.text[:100]!r}"
            ) from None
        if answer.status_code == 404 and path == "/s3lora/experiments":
            raise EvaluationFailed(
                f"{self.url} has no experiments: it is not guarded, its gate is off, or it loads no"
                " adapters at run time (VLLM_ALLOW_RUNTIME_LORA_UPDATING)"
            )
        if answer.status_code != 200 or not isinstance(found, dict):
            raise EvaluationFailed(f"{self.url} answered {answer.status_code}: {_text(found)}")
        return found


def _text(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    if isinstance(error, dict):
        return f"{error.get('code', '')} {error.get('message', error)}".strip()[:500]
    return str(error)[:500]
