"""What a worker has loaded under each id stays known for as long as the engine holds it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from s3lora_serve.errors import Reason
from s3lora_serve.vllm_plugin.bounded_map import MAX_ENTRIES
from s3lora_serve.vllm_plugin.engine.load_outcomes import LoadOutcomes


def test_an_adapter_that_the_engine_holds_is_known_after_a_thousand_others():
    """Without its key a worker does not look for a quarantine, and ranks may disagree."""
    outcomes = LoadOutcomes()
    outcomes.loaded(1, "held", lambda: {1})
    for other in range(2, MAX_ENTRIES + 500):
        outcomes.loaded(other, "evicted later", lambda: {1})
    assert outcomes.key(1) == "held"
    assert outcomes.key(2) is None


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(0, 3000), max_size=200))
def test_held_adapters_are_all_known_and_the_others_are_bounded(held):
    outcomes = LoadOutcomes()
    for adapter_id in range(3001):
        outcomes.loaded(adapter_id, str(adapter_id), lambda: held)
    assert all(outcomes.key(adapter_id) for adapter_id in held)
    assert len([i for i in range(3001) if outcomes.key(i)]) <= MAX_ENTRIES + 1


def test_a_refused_adapter_is_known_by_its_reason_until_it_is_loaded():
    outcomes, reason = LoadOutcomes(), Reason("S3LORA-109", "holds NaN")
    outcomes.loaded(1, "key", set)
    outcomes.refused(1, reason)
    outcomes.refused(2, reason)
    assert (outcomes.key(1), outcomes.refusal(1), outcomes.refusal(2)) == (None, reason, reason)
    outcomes.loaded(1, "key", set)
    assert (outcomes.key(1), outcomes.refusal(1), outcomes.refusal(2)) == ("key", None, reason)
