"""Loads by which servers take plans that lie ready: adapters registered again in place."""

from collections.abc import Callable, Iterable, Sequence

from s3lora_serve.errors import ServerFailed
from s3lora_serve.lab.planner.fleet import FleetServer, LoadRefused, Served, holds

SHORT = 19
"""Characters of a digest in a line: enough to tell adapters apart."""


class PlanLoads:
    """Has each adapter loaded again once, and once more only if the server could not say yes or no.

    A folder that holds other weights by now is left alone: its owner has not asked the server to
    serve those.
    """

    def __init__(self, servers: Sequence[FleetServer], say: Callable[[str, str], None]) -> None:
        """Take what says a line about a thing, once."""
        self._servers = {server.url: server for server in servers}
        self._say = say
        self._ended: set[tuple[str, str, str]] = set()  # (server, name, digest)

    def apply(self, ready: Iterable[Served]) -> int:
        """Load adapters again whose plans lie ready; how many have yet to be asked once more."""
        ready = list(ready)
        later = 0
        for each in ready:
            if each.plan_digest is None and _key(each) not in self._ended:
                ended, said = self._load(each)
                self._say(f"{each.name!r} on {each.server}", said)
                if ended:
                    self._ended.add(_key(each))
                later += not ended
        self._ended &= {_key(each) for each in ready}
        return later

    def _load(self, adapter: Served) -> tuple[bool, str]:
        """Whether there is nothing more to try, and a line that says what came of it."""
        about = f"{adapter.name!r} on {adapter.server}"
        if not holds(adapter.path, adapter.digest):
            return (
                True,
                f"{about}: its folder holds other weights than are served, and is left alone",
            )
        server = self._servers[adapter.server]
        try:
            # A long round may be over an adapter that was replaced or unloaded meanwhile.
            if server.find(adapter.name) != adapter:
                return False, f"{about} is not what it was: it is looked at again"
            server.load_again(adapter)
            now = server.find(adapter.name)
        except LoadRefused as refusal:
            return True, f"{about} is refused: {refusal}"
        except ServerFailed as error:
            return False, f"{about} is not registered again yet: {error}"
        if now is None or now.plan_digest is None:
            return True, f"{about} does not obey its plan: has the server's policy this folder?"
        return True, f"{about} obeys plan {now.plan_digest[:SHORT]}"


def _key(served: Served) -> tuple[str, str, str]:
    return served.server, served.name, served.digest
