"""Reload the policy of a running server when the bytes of its file have changed.

A file may be read while somebody writes it. The half that is there is often valid, with fewer
limits. So a changed file has to say where it ends.
"""

import hashlib
import threading
from collections.abc import Callable

from s3lora_serve.errors import PolicyInvalid
from s3lora_serve.policy.file import policy_bytes, says_its_end, serving_policy
from s3lora_serve.policy.schema import Policy
from s3lora_serve.settings import Settings

_AT_START_ONLY = ("audit", "required", "unguarded_frontends")


class ReloadablePolicy:
    """The policy in force. A changed file replaces it if it is valid."""

    def __init__(
        self, settings: Settings, check: Callable[[Policy], None] = lambda _: None
    ) -> None:
        """Read the policy. `check` looks at files that a policy names, and raises PolicyInvalid.

        Raises:
            PolicyInvalid, SettingInvalid: the policy is not valid, so the server must not start.
        """
        self._settings = settings
        self._check = check
        self._mutex = threading.Lock()
        text = self._file_text()
        self._seen = text and hashlib.sha256(text).digest()
        self.current: Policy = serving_policy(settings, text)
        check(self.current)

    def reload(self) -> Policy:
        """Read the file again if it has changed, and return the policy in force.

        Raises:
            PolicyInvalid: the changed file is not valid, or does not say where it ends; the
                previous policy stays in force.
        """
        with self._mutex:
            text = self._file_text()
            digest = text and hashlib.sha256(text).digest()
            if digest != self._seen:
                self._check_end(text or b"")
                changed = serving_policy(self._settings, text)
                self._check_change(changed)
                self._check(changed)
                self._seen, self.current = digest, changed
            return self.current

    def _file_text(self) -> bytes | None:
        file = self._settings.policy
        return policy_bytes(file) if file else None

    def _check_end(self, text: bytes) -> None:
        """Refuse a changed file that may be half written.

        Raises:
            PolicyInvalid: it does not say where it ends.
        """
        if not says_its_end(text):
            raise PolicyInvalid(
                f"{self._settings.policy} changed, and may be half written: its last line is not"
                " `...`, the end of a YAML document. Write the whole to another file, with that"
                " line last, and rename it over this one"
            )

    def _check_change(self, changed: Policy) -> None:
        """Refuse to change keys that take effect only at start.

        Processes, log files and patched methods depend on them.

        Raises:
            PolicyInvalid: such a key differs from the policy in force.
        """
        fixed = [
            key for key in _AT_START_ONLY if getattr(changed, key) != getattr(self.current, key)
        ]
        if "off" in (changed.mode, self.current.mode) and changed.mode != self.current.mode:
            fixed.append("mode")
        if fixed:
            raise PolicyInvalid(
                f"{self._settings.policy}: {', '.join(fixed)} cannot change while the server runs"
            )
