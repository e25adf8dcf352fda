"""Globs: their meaning, and their cost for the names that a tenant would choose to freeze a server.

Cost is counted in executed lines of the matcher, not in time.
"""

import re
import sys
from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3lora_serve.errors import PolicyInvalid, TooLong
from s3lora_serve.policy import globs
from s3lora_serve.policy.globs import MAX_GLOB, glob_matches
from s3lora_serve.policy.lengths import MAX_NAME, MAX_PATH
from s3lora_serve.policy.schema import Policy, parse_policy


def by_regular_expression(pattern, text):
    """The meaning of a glob, by a search that goes back: for short texts only."""
    parts = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.findall(r"\*\*|\*|\?|[^*?]+", pattern)
    expression = "".join(parts.get(token, re.escape(token)) for token in tokens)
    return re.fullmatch(expression, text, re.DOTALL) is not None


def lines_executed(pattern, text):
    """Lines of the matcher that run for a glob and a text."""
    counted = 0

    def count(frame, event, _):
        nonlocal counted
        if frame.f_code.co_filename != globs.__file__:
            return None
        counted += event == "line"
        return count

    globs._compiled.cache_clear()
    before = sys.gettrace()
    sys.settrace(count)
    try:
        glob_matches(pattern, text)
    finally:
        sys.settrace(before)
    return counted


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        ("*", "q_proj", True), ("q_*", "q_proj", True), ("*q_proj", "model.0.q_proj", True),
        ("a/*", "a/b", True), ("a/*", "a/b/c", False), ("a/**", "a/b/c", True),
        ("a?c", "abc", True), ("a?c", "a/c", False), ("[ab]", "a", False), ("[ab]", "[ab]", True),
        ("a.c", "abc", False), ("", "", True), ("", "a", False), ("*", "a\nb", True),
        ("*/b*", "x/a/b", False), ("**/b*", "x/a/b", True), ("a***c", "a/b/c", True),
    ],
)  # fmt: skip
def test_globs(pattern, text, matches):
    assert glob_matches(pattern, text) is matches


@given(st.text("*?/ab.\n", max_size=9), st.text("/ab.\n", max_size=12))
def test_globs_mean_what_the_regular_expressions_meant(pattern, text):
    assert glob_matches(pattern, text) == by_regular_expression(pattern, text)


@given(st.text("*?ab.", max_size=9), st.text(max_size=9) | st.text("ab.", max_size=12))
def test_without_slashes_globs_are_those_of_fnmatch(pattern, text):
    if "/" not in text:
        assert glob_matches(pattern, text) == fnmatchcase(text, pattern)


@pytest.mark.timeout(60)  # a search that goes back does not end: then this is the failure
@pytest.mark.parametrize(
    "pattern", ["*-*-*-*-*-*-*-*x", "**-**-**-*-*-*-*x", "?*" * 100 + "x", "*a" * 100 + "x"]
)
@pytest.mark.parametrize("text", ["-" * MAX_PATH, "a" * MAX_PATH, "a-/" * 1365], ids=len)
def test_a_text_costs_the_same_few_lines_for_each_character(pattern, text):
    assert lines_executed(pattern, text) <= 5 * len(text) + 12 * len(pattern) + 30


@settings(deadline=None)  # a clock says nothing here
@given(st.text("*?/ab-", max_size=40), st.text("/ab-", max_size=200))
def test_no_glob_and_text_cost_more_than_their_lengths(pattern, text):
    assert lines_executed(pattern, text) <= 5 * len(text) + 12 * len(pattern) + 30


def test_globs_of_a_policy_are_bounded():
    long = "*" * (MAX_GLOB + 1)
    for data in (
        {"modules": [long]},
        {"experiments": {"names": long}},
        *({"rules": [{"match": {key: long}}]} for key in ("adapter", "path", "base_model")),
    ):
        with pytest.raises(PolicyInvalid, match="at most 4096 characters"):
            parse_policy(data, "test")


@pytest.mark.parametrize(
    ("name", "path"), [("n" * (MAX_NAME + 1), "/x"), ("n", "/" * (MAX_PATH + 1))]
)
def test_no_rule_is_matched_with_a_name_or_path_that_is_too_long(name, path):
    with pytest.raises(TooLong) as caught:
        Policy().for_adapter(name, path, None)
    assert len(str(caught.value)) < MAX_NAME
    assert Policy().for_adapter(name[:MAX_NAME], path[:MAX_PATH], None) == Policy()
