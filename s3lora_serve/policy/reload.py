"""The policy of a running server: read again whenever the bytes of its file have changed."""

import hashlib
import threading

from s3lora_serve.errors import PolicyInvalid
from s3lora_serve.policy.file import policy_bytes, serving_policy
from s3lora_serve.policy.schema import Policy
from s3lora_serve.settings import Settings

_AT_START_ONLY = ("audit", "required")


class ReloadablePolicy:
    """The policy in force; a changed file takes its place if it is valid."""

    def __init__(self, settings: Settings) -> None:
        """Read the policy.

        Raises:
            PolicyInvalid, SettingInvalid: it is not valid, and nothing may start.
        """
        self._settings = settings
        self._mutex = threading.Lock()
        self._seen = self._file_digest()
        self.current: Policy = serving_policy(settings)

    def reload(self) -> Policy:
        """The policy in force now, after a look at its file.

        Raises:
            PolicyInvalid: the file has changed and is not valid; the policy before stays in force.
        """
        with self._mutex:
            digest = self._file_digest()
            if digest != self._seen:
                changed = serving_policy(self._settings)
                self._check_change(changed)
                self._seen, self.current = digest, changed
            return self.current

    def _file_digest(self) -> bytes | None:
        file = self._settings.policy
        return hashlib.sha256(policy_bytes(file)).digest() if file else None

    def _check_change(self, changed: Policy) -> None:
        """What processes, log files and patched methods depend on is settled at start."""
        fixed = [
            key for key in _AT_START_ONLY if getattr(changed, key) != getattr(self.current, key)
        ]
        if "off" in (changed.mode, self.current.mode) and changed.mode != self.current.mode:
            fixed.append("mode")
        if fixed:
            raise PolicyInvalid(
                f"{self._settings.policy}: {', '.join(fixed)} cannot change while the server runs"
            )
