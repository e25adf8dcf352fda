"""Policies: accepted and rejected files, and the effective policy."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from s3lora_serve.errors import PolicyInvalid, SettingInvalid
from s3lora_serve.policy.file import effective_policy, read_policy, serving_policy
from s3lora_serve.policy.schema import Policy, parse_policy
from s3lora_serve.settings import load_settings

REFERENCE = (Path(__file__).parents[2] / "docs" / "reference.md").read_text()
[TABLE] = re.findall(r"make generate: policy -->\n(.*)<!-- end of policy", REFERENCE, re.DOTALL)
ROWS = dict(re.findall(r"^\| `([\w.\[\]]+)` \| `?(.*?)`? \|", TABLE, re.MULTILINE))
"""The default of each key, as the reference has it."""


def documented():
    """The default policy as the reference has it."""
    whole = {}
    for key, default in ROWS.items():
        *above, last = key.split(".")
        section = whole
        for name in above:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and key.partition(".")[0] != "strip" and "[]" not in key:
            section[last] = {} if default == "below" else yaml.safe_load(default)
    return whole | {"strip": yaml.safe_load(ROWS["strip"])}


def write(folder: Path, text: str) -> Path:
    file = folder / "policy.yaml"
    file.write_text(text)
    return file


def test_the_policy_of_the_reference_is_the_default(tmp_path):
    assert read_policy(write(tmp_path, yaml.safe_dump(documented()))) == Policy()
    assert read_policy(write(tmp_path, "{}")) == Policy()


def keys(value, path=()):
    """The paths of all values in nested mappings."""
    if not isinstance(value, dict) or not value:
        return {path}
    return {each for key, inner in value.items() for each in keys(inner, (*path, key))}


def test_the_policy_of_the_reference_has_every_key():
    everything = Policy().model_dump(mode="json")
    assert {".".join(path) for path in keys(everything)} <= set(ROWS)
    assert keys(everything | {"strip": {"top_k": 10}}) == keys(documented())


def test_off_is_a_mode_and_no_boolean(tmp_path):
    assert read_policy(write(tmp_path, "mode: off")).mode == "off"
    assert read_policy(write(tmp_path, "required: true")).required is True


def test_json_is_accepted_too(tmp_path):
    assert read_policy(write(tmp_path, json.dumps({"strip": {"top_k": 3}}))).strip.top_k == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stirp: {top_k: 3}", "stirp"),
        ("limits: {max_bites: 3}", "max_bites"),
        ("strip: {top_k: 3, fraction: 0.1}", "exactly one"),
        ("strip: {}", "exactly one"),
        ("strip: {top_k: null}", "exactly one"),
        ("strip: {threshold: 1.5}", "threshold"),
        ("strip: {top_k: -1}", "top_k"),
        ("strip: {outliers: .nan}", "outliers"),
        ("mode: sometimes", "mode"),
        ("deny: [abc]", "deny"),
        (f"allow: ['sha256:{'0' * 64}']", "list {digest: .*, config_digest: .*}"),
        (f"allow: [{{digest: 'sha256:{'0' * 64}'}}]", "config_digest"),
        ("limits: {formats: [pickle]}", "formats"),
        ("- a list", "expected a mapping"),
        ("", "empty: write {} for the defaults"),
        ("# a comment\n", "empty"),
        ("mode: audit\nmode: off", "given twice"),
        ("a: [1", "not YAML"),
        ("rules: [{match: {adapter: x}, strip: {}}]", r"rules\.0: strip"),
        ("rules: [{match: {adapter: x}, mode: off}]", r"rules\.0: mode.*server's"),
        ("rules: [{match: {tenant: x}}]", "tenant"),
        ("scorer: {name: magic}", "scorer"),
        ("require_plan: true", "require_plan: true needs plans"),
        ("rules: [{match: {adapter: x}, require_plan: true}]", r"rules\.0: .*needs plans"),
        ("rules: [{match: {adapter: x}, plans: /x}]", r"rules\.0: plans.*server's"),
        (
            "rules: [{match: {path: x}, unguarded_frontends: allow}]",
            r"rules\.0: unguarded.*server's",
        ),
    ],
)
def test_a_bad_policy_is_refused_by_name(tmp_path, text, words):
    with pytest.raises(PolicyInvalid, match=words) as caught:
        read_policy(write(tmp_path, text))
    assert str(caught.value).startswith("S3LORA-901: ")


def test_a_missing_or_huge_policy_file_is_refused(tmp_path):
    with pytest.raises(PolicyInvalid, match="No such file"):
        read_policy(tmp_path / "nope.yaml")
    with pytest.raises(PolicyInvalid, match="larger than"):
        read_policy(write(tmp_path, "#" * (2**20 + 1)))


def test_digest_names_the_meaning_and_not_the_spelling(tmp_path):
    a = "sha256:" + "a" * 64
    b = "sha256:" + "b" * 64
    one = read_policy(write(tmp_path, yaml.safe_dump({"deny": [a, b], "mode": "audit"})))
    two = read_policy(write(tmp_path, json.dumps({"mode": "audit", "deny": [b, a]})))
    assert one.digest == two.digest
    assert one.digest != Policy().digest


def test_allowed_adapters_and_owners_are_part_of_the_digest_whatever_their_order():
    listed = [{"digest": f"sha256:{d * 64}", "config_digest": f"sha256:{c * 64}"}
              for d, c in ("ab", "ba", "aa")]  # fmt: skip
    owners = [{"names": "acme/*", "paths": ["/acme/**"]}]
    one = parse_policy({"allow": listed, "owners": owners}, "test")
    two = parse_policy({"allow": listed[::-1], "owners": owners}, "test")
    assert one.digest == two.digest == parse_policy(one.as_json(), "again").digest
    assert one.digest != parse_policy({"allow": listed[:2], "owners": owners}, "test").digest
    assert one.digest != parse_policy({"allow": listed}, "test").digest


def test_environment_beats_file(tmp_path, monkeypatch):
    monkeypatch.setenv("S3LORA_POLICY", str(write(tmp_path, "mode: audit\nstrip: {top_k: 1}")))
    assert effective_policy().mode == "audit"
    monkeypatch.setenv("S3LORA_MODE", "enforce")
    monkeypatch.setenv("S3LORA_AUDIT_LOG", "/var/log/s3lora.jsonl")
    policy = effective_policy()
    assert (policy.mode, policy.strip.top_k) == ("enforce", 1)
    assert policy.audit.path == Path("/var/log/s3lora.jsonl")


def test_plans_from_the_environment_replace_the_files_and_satisfy_require_plan(
    tmp_path, monkeypatch
):
    file = write(tmp_path, "require_plan: true")
    monkeypatch.setenv("S3LORA_PLANS", "/plans")
    assert effective_policy(file=file).plans == Path("/plans")
    assert effective_policy().plans == Path("/plans")
    assert effective_policy(file=write(tmp_path, "{}")).plans == Path("/plans")
    assert effective_policy(file=write(tmp_path, "plans: /other")).plans == Path("/plans")
    with pytest.raises(PolicyInvalid, match="expected a mapping"):
        effective_policy(file=write(tmp_path, "[a list]"))


def test_a_rule_may_require_a_plan():
    rules = [{"match": {"adapter": "acme/*"}, "require_plan": True}]
    policy = parse_policy({"plans": "/plans", "rules": rules}, "test")
    assert policy.for_adapter("acme/a", "/x", None).require_plan
    assert not policy.for_adapter("other", "/x", None).require_plan


@pytest.mark.parametrize(
    "text", ["scorer: {name: spsvd}", "rules: [{match: {adapter: x}, scorer: {name: svd}}]"]
)
def test_a_slow_scorer_is_for_offline_use_only(tmp_path, monkeypatch, text):
    monkeypatch.setenv("S3LORA_POLICY", str(write(tmp_path, text)))
    assert effective_policy()
    with pytest.raises(PolicyInvalid, match="offline"):
        serving_policy()


def test_a_bad_setting_names_itself_and_its_value(monkeypatch):
    monkeypatch.setenv("S3LORA_MODE", "enforced")
    with pytest.raises(SettingInvalid, match="S3LORA_MODE='enforced'"):
        load_settings()


RULES = {
    "strip": {"top_k": 10},
    "limits": {"max_rank": 64},
    "rules": [
        {"match": {"adapter": "acme/*"}, "strip": {"threshold": 0.3}, "limits": {"seconds": 5}},
        {"match": {"path": "/tenants/**", "base_model": "llama*"}, "on_uninformative": "admit"},
        {"match": {"adapter": "acme/vip"}, "strip": {"top_k": 1}},
    ],
}


def test_first_matching_rule_replaces_strip_whole_and_merges_the_rest():
    policy = parse_policy(RULES, "test")
    acme = policy.for_adapter("acme/vip", "/x", None)
    assert acme.strip.rule == ("threshold", 0.3)
    assert (acme.limits.seconds, acme.limits.max_rank) == (5, 64)
    tenant = policy.for_adapter("other", "/tenants/a/b", "llama-8b")
    assert tenant.on_uninformative == "admit"
    assert policy.for_adapter("other", "/tenants/a/b", None).on_uninformative == "reject"
    assert policy.for_adapter("acme/eu/vip", "/x", None).strip.rule == ("top_k", 10)


def test_modules_are_selected_by_projection_or_full_name():
    policy = Policy(modules=("q_proj", "model.layers.0.*"))
    assert policy.selects("model.layers.7.self_attn.q_proj")
    assert policy.selects("model.layers.0.mlp.up_proj")
    assert not policy.selects("model.layers.7.mlp.up_proj")


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=9) | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*Policy.model_fields, "top_k", "match", "seconds", "x"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_data_is_a_policy_or_a_named_refusal(data):
    try:
        policy = parse_policy(data, "test")
    except PolicyInvalid as error:
        refusal = str(error)
        assert refusal.startswith("S3LORA-901: test: ")
    else:
        assert parse_policy(policy.as_json(), "again").digest == policy.digest
