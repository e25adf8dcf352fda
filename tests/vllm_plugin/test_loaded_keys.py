"""What a worker has loaded under each id stays known for as long as the engine holds it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from s3lora_serve.vllm_plugin.bounded_map import MAX_ENTRIES
from s3lora_serve.vllm_plugin.engine.loaded_keys import LoadedKeys


def test_an_adapter_that_the_engine_holds_is_known_after_a_thousand_others():
    """Without its key a worker does not look for a quarantine, and ranks may disagree."""
    keys = LoadedKeys()
    keys.note(1, "held", lambda: {1})
    for other in range(2, MAX_ENTRIES + 500):
        keys.note(other, "evicted later", lambda: {1})
    assert keys.get(1) == "held"
    assert keys.get(2) is None


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(0, 3000), max_size=200))
def test_held_adapters_are_all_known_and_the_others_are_bounded(held):
    keys = LoadedKeys()
    for adapter_id in range(3001):
        keys.note(adapter_id, str(adapter_id), lambda: held)
    assert all(keys.get(adapter_id) for adapter_id in held)
    assert len([i for i in range(3001) if keys.get(i)]) <= MAX_ENTRIES + 1


def test_a_refused_adapter_is_not_known():
    keys = LoadedKeys()
    keys.note(1, "key", set)
    keys.forget(1)
    keys.forget(2)
    assert keys.get(1) is None
