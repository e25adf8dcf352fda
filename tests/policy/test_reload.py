"""A running server takes up a changed policy as a whole or not at all."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from s3lora_serve.errors import PolicyInvalid
from s3lora_serve.policy.reload import ReloadablePolicy
from s3lora_serve.policy.schema import Policy
from s3lora_serve.settings import Settings

END = "...\n"
BEFORE = "limits: {roots: [/adapters]}\n"
POLICIES = {
    "block": "mode: audit\nlimits:\n  min_rank: 2\n  roots:\n    - /a\n    - /b\ndeny: []\n",
    "comments": "# the policy ...\nmode: audit  # enforce\n\n# ...\nlimits: {max_rank: 16}\n",
    "flow": "{mode: audit, limits: {min_rank: 2}, deny: []}  # } ...\n",
    "several lines": "limits: {\n  min_rank: 2,\n  roots: [/a,\n/b]}\nplans: '/a\n  b'\n",
    "a text in lines": "plans: |\n  /plans\n  ...\nlimits: {min_rank: 2}\n",
    "rules": yaml.safe_dump({"rules": [{"match": {"path": "/ä/**"}, "strip": {"top_k": 1}}] * 2}),
    "beginning and end": "---\nrequire_plan: false\nstore: {max_bytes: 123456}\n",
    "Windows": "mode: audit\r\nlimits: {max_rank: 16}\r\n",
}
JSON = json.dumps({"mode": "audit", "limits": {"roots": ["/a", "/b"]}, "deny": []}, indent=1)


@pytest.fixture
def file(tmp_path) -> Path:
    file = tmp_path / "policy.yaml"
    file.write_text(BEFORE)
    return file


def prefixes_taken_up(file, text, whole):
    """The policies that some beginning of a text makes of a server's, other than the whole's."""
    found = []
    file.write_text(BEFORE)
    policy = ReloadablePolicy(Settings(policy=file))
    for length in range(len(text)):
        in_force = policy.current
        file.write_bytes(text[:length])
        try:
            changed = policy.reload()
        except PolicyInvalid:
            assert policy.current is in_force
        else:
            if changed != whole:
                found.append(text[:length])
    return found


@pytest.mark.parametrize("text", [*(text + END for text in POLICIES.values()), JSON, "{}"])
def test_no_beginning_of_a_policy_is_taken_up_with_another_meaning(file, text):
    policy = ReloadablePolicy(Settings(policy=file))
    file.write_bytes(text.encode())
    whole = policy.reload()
    assert whole.limits.roots != (Path("/adapters"),)
    assert prefixes_taken_up(file, text.encode(), whole) == []


VALUES = st.sampled_from(["...", "a\n...\nb", "}", "/ä\n", "'", '"', "# }", "\n...", "/x y"])
DATA = st.fixed_dictionaries(
    {"mode": st.sampled_from(["audit", "enforce"])},
    optional={
        "plans": VALUES,
        "limits": st.fixed_dictionaries({"roots": st.lists(VALUES, max_size=2)}),
        "modules": st.lists(VALUES, min_size=1, max_size=2),
        "signatures": st.fixed_dictionaries({"keys": st.lists(VALUES, max_size=2)}),
    },
)


@settings(max_examples=50, deadline=None)
@given(DATA, st.booleans(), st.sampled_from(["", '"', "'", "|"]), st.integers(20, 80))
def test_no_beginning_of_a_written_policy_is_taken_up(tmp_path_factory, data, flow, style, width):
    file = tmp_path_factory.mktemp("policy") / "policy.yaml"
    text = yaml.dump(
        data, explicit_end=True, default_flow_style=flow, default_style=style or None,
        width=width, allow_unicode=True,
    ).encode()  # fmt: skip
    file.write_text(BEFORE)
    policy = ReloadablePolicy(Settings(policy=file))
    file.write_bytes(text)
    assert prefixes_taken_up(file, text, policy.reload()) == []


@pytest.mark.parametrize(
    "text", ["", "\n", "# mode: audit\n", "mode: audit\n", f"# nothing\n{END}"]
)
def test_a_file_that_is_empty_or_does_not_say_its_end_changes_nothing(file, text):
    policy = ReloadablePolicy(Settings(policy=file))
    file.write_text(text)
    with pytest.raises(PolicyInvalid, match=re.escape("`...`") + "|empty"):
        policy.reload()
    assert policy.current.limits.roots == (Path("/adapters"),)
    file.write_text(f"mode: audit\n{END}")
    assert policy.reload() == Policy(mode="audit")


def test_at_start_a_file_needs_no_end_and_an_empty_one_is_refused(file):
    assert ReloadablePolicy(Settings(policy=file)).reload().limits.roots
    file.write_text("")
    with pytest.raises(PolicyInvalid, match="empty"):
        ReloadablePolicy(Settings(policy=file))


def test_the_checked_bytes_are_those_that_are_taken_up(file, monkeypatch):
    """A file that changes between its check and its reading is another one."""
    policy = ReloadablePolicy(Settings(policy=file))
    file.write_text(f"{BEFORE}mode: audit\n{END}")
    opened = Path.open

    def open_and_cut(self, *arguments):
        stream = opened(self, *arguments)
        if self == file:
            content = stream.read()
            stream.seek(0)
            file.unlink()  # the open stream still reads the whole
            with opened(file, "wb") as other:
                other.write(content[:-15])
        return stream

    monkeypatch.setattr(Path, "open", open_and_cut)
    assert policy.reload().mode == "audit"
    assert policy.current.limits.roots == (Path("/adapters"),)
