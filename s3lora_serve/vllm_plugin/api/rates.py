"""How often each tenant may ask for loads, and be refused, under the policy's `rates`."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from s3lora_serve.errors import RateExceeded
from s3lora_serve.policy.server import Rates
from s3lora_serve.vllm_plugin.api.client import client
from s3lora_serve.vllm_plugin.bounded_map import remember

Clock = Callable[[], float]


def tenant_of(name: str) -> str:
    """Who asks for an adapter: the API key if the server has several, else the name's first part.

    Without a slash in the name, the whole name is the tenant's.
    """
    asks = client.get()
    if asks is not None and asks.has_own_key and asks.requester.key is not None:
        return f"key {asks.requester.key}"
    return name.partition("/")[0]


@dataclass(slots=True)
class _Bucket:
    """Tokens that refill at an even pace, up to those of one minute."""

    tokens: float
    time: float

    def refill(self, per_minute: float, now: float) -> None:
        self.tokens = min(per_minute, self.tokens + (now - self.time) * per_minute / 60)
        self.time = now


class TenantRates:
    """The loads and refusals of each tenant, in one API server process."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._loads: OrderedDict[str, _Bucket] = OrderedDict()
        self._refusals: OrderedDict[str, _Bucket] = OrderedDict()

    def count_load(self, tenant: str, rates: Rates) -> None:
        """Count a load that a tenant asks for.

        Raises:
            RateExceeded: the tenant asked for too many, or too many were refused.
        """
        each = (
            ("refusals", rates.refusals_per_minute, self._refusals),
            ("loads", rates.loads_per_minute, self._loads),
        )
        for what, allowed, buckets in each:
            if allowed is None:
                continue
            bucket = self._bucket(buckets, tenant, allowed)
            if bucket.tokens < 1:
                wait = math.ceil((1 - bucket.tokens) * 60 / allowed)
                raise RateExceeded(
                    f"{tenant!r} has over {allowed:g} {what} a minute (rates.{what}_per_minute)",
                    retry_seconds=wait,
                )
            if what == "loads":
                bucket.tokens -= 1

    def count_refusal(self, tenant: str, rates: Rates) -> None:
        """Count a refused load of a tenant."""
        if rates.refusals_per_minute is not None:
            self._bucket(self._refusals, tenant, rates.refusals_per_minute).tokens -= 1

    def _bucket(
        self, buckets: OrderedDict[str, _Bucket], tenant: str, per_minute: float
    ) -> _Bucket:
        now = self._clock()
        bucket = buckets.get(tenant) or _Bucket(per_minute, now)
        bucket.refill(per_minute, now)
        remember(buckets, tenant, bucket)
        return bucket
