"""A line of the audit log is bounded in bytes, and what is cut from it is recoverable."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3lora_serve.admission.verdict import ModuleVerdict
from s3lora_serve.errors import Reason
from s3lora_serve.signatures.records import Attester, Signer
from s3lora_serve.telemetry.audit_event import AuditEvent, Copy, Event, Requester
from s3lora_serve.telemetry.audit_line import MAX_LINE_BYTES, MAX_TEXT_BYTES, line_of
from tests.support.verdicts import admitted

KEYS = {
    "previous", "time", "adapter", "path", "digest", "door", "decision", "reason", "mode",
    "scorer", "policy_digest", "vllm_version", "stripped", "seconds",
    "selected_by", "plan_digest", "served_digest", "transformed", "projected",
    "repaired", "repair", "suspicion", "signed_by", "attested_by", "scored_by",
    "event", "asked_by", "stored_copy", "replaced_by", "failure", "count", "since", "cut",
    "left_out",
}  # fmt: skip
DIGEST = "sha256:" + "d" * 64
PROJECTIONS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
HOSTILE = ['a\nb"}', "\ud800 lone", "\u2028", "\x1b[2J"]


def verdict(**changes):
    return admitted(**({"digest": DIGEST, "policy_digest": DIGEST} | changes))


def modules(names, **flags):
    plain = (None, "q_proj", (64, 64), 8, 0.5, 0.4, (), None, None)
    return tuple(ModuleVerdict(name, *plain, **({"stripped": False} | flags)) for name in names)


def entry(event):
    line = line_of(event, DIGEST, "0.32.0")
    assert len(line) <= MAX_LINE_BYTES
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    return json.loads(line)


def decision(verdict, **more):
    return AuditEvent(Event.DECISION, verdict, door="http", stored_copy="0" * 64, **more)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_a_line_has_the_contracts_keys():
    found = entry(decision(verdict(), asked_by=Requester("12ab", "10.0.0.7")))
    assert set(found) == KEYS
    assert [found["adapter"], found["door"], found["decision"]] == ["acme", "http", "admitted"]
    assert found["asked_by"] == {"key": "12ab", "address": "10.0.0.7"}
    assert (found["count"], found["since"], found["cut"]) == (1, None, None)
    assert found["time"].endswith("Z")


def test_an_event_without_a_door_has_its_name_there():
    assert entry(AuditEvent(Event.UNLOAD, verdict()))["door"] == "unload"


def test_a_path_and_a_name_of_four_thousand_characters_take_two_kilobytes_and_their_digests():
    """Their 4096 characters took 12 bytes each as JSON: 49 kB a line."""
    text = "𝕏" * 4096
    line = line_of(decision(verdict(name=text, path=text)), DIGEST, "0.32.0")
    assert len(line) < 4096
    found = json.loads(line)
    assert found["adapter"] == "𝕏" * ((MAX_TEXT_BYTES - 6) // 12) + "…"
    whole = {"sha256": sha256(text.encode()), "bytes": 4 * 4096}
    assert found["cut"] == {"adapter": whole, "path": whole}


@pytest.mark.parametrize("name", [*HOSTILE, "x" * MAX_TEXT_BYTES])
def test_a_name_within_the_bound_is_whole(name):
    found = entry(decision(verdict(name=name)))
    assert (found["adapter"], found["cut"]) == (name, None)


def test_the_modules_of_a_70b_adapter_are_all_named():
    names = [
        f"base_model.model.model.layers.{layer}.{projection}"
        for layer in range(80)
        for projection in PROJECTIONS
    ]
    found = entry(decision(verdict(modules=modules(names, stripped=True))))
    assert found["stripped"] == names
    assert found["cut"] is None


def test_names_beyond_the_bound_are_counted_and_their_list_is_digested():
    names = [f"model.layers.0.mlp.experts.{number}.down_proj" for number in range(5000)]
    flags = {"stripped": True, "transformed": True}
    found = entry(decision(verdict(modules=modules(names, **flags))))
    assert found["stripped"] == names[: len(found["stripped"])]
    assert len(found["stripped"]) > 500
    whole = json.dumps(names, separators=(",", ":")).encode()
    cut = {"sha256": sha256(whole), "count": 5000}
    assert found["cut"] == {"stripped": cut, "transformed": cut}


texts = st.sampled_from(["", "a", "𝕏", "\ud800", '"', "\n", "é"]).flatmap(
    lambda character: st.integers(0, 1500).map(lambda times: character * times)
) | st.text(max_size=20)


@given(st.data())
def test_no_event_exceeds_the_bound_and_all_that_is_cut_is_digested(data):
    def text():
        return data.draw(texts)

    names = data.draw(st.lists(texts, max_size=4)) * data.draw(st.integers(1, 30))
    flags = data.draw(
        st.fixed_dictionaries(
            dict.fromkeys(("stripped", "transformed", "projected"), st.booleans())
        )
    )
    made = verdict(
        name=text(), path=text(), digest=text(), reason=Reason(text(), ""), plan_digest=text(),
        served_digest=text(), scorer={"name": text(), "parameters": {"reference": text()}},
        signed_by=Signer("key", text(), text()), attested_by=Attester(text(), text(), text()),
        modules=modules(names, **flags),
    )  # fmt: skip
    asked = Requester(text(), text())
    copy = Copy(text(), text())
    found = entry(decision(made, asked_by=asked, replaced_by=copy, failure=text()))
    cut = found["cut"] or {}
    for field, whole in (("adapter", made.name), ("path", made.path)):
        if field in cut:
            assert cut[field]["sha256"] == sha256(whole.encode(errors="surrogatepass"))
            assert found[field].endswith("…")
            assert whole.startswith(found[field][:-1])
        else:
            assert found[field] == whole
    for field in ("stripped", "transformed", "projected"):
        whole = list(getattr(made, field))
        assert found[field] == whole[: len(found[field])]
        assert (field in cut) == (len(found[field]) < len(whole))
