"""The allow list names an adapter by its weights and its configuration."""

from s3lora_serve import Policy, scan_adapter
from tests.support.adapters import copy_with


def allowed(verdict):
    return Policy(allow=[{"digest": verdict.digest, "config_digest": verdict.config_digest}])


def test_allowed_weights_are_not_admitted_whole_under_another_configuration(spiked, tmp_path):
    own = scan_adapter(spiked)
    assert own.stripped
    policy = allowed(own)
    assert scan_adapter(spiked, policy).stripped == ()
    louder = scan_adapter(copy_with(spiked, tmp_path / "louder", lora_alpha=32), policy)
    assert (louder.digest, louder.decision) == (own.digest, "stripped")
    turned = copy_with(spiked, tmp_path / "turned", lora_alpha=-16)
    verdict = scan_adapter(turned, policy)
    assert (verdict.digest, verdict.reason.code) == (own.digest, "S3LORA-223")
    assert scan_adapter(turned, allowed(verdict)).decision == "admitted"
