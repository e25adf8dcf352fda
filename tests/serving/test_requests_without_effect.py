"""Requests for adapters that act nowhere are the base model's to the engine, and only those."""

from pathlib import Path

import pytest

from tests.support.adapters import copy_with
from tests.support.programs import run_program
from tests.support.server import ONE_CORE

pytestmark = pytest.mark.serving

POLICY = """
limits: {max_stripped_fraction: 1.0}
strip: {top_k: 0}
rules: [{match: {adapter: nothing}, strip: {threshold: 0.0}}]
"""
PATHS = {"PYTHONPATH": str(Path.cwd()), "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
"""Workers receive a function of the tests and must be able to import it."""


def asked(model, trained, folder, **more):
    (folder / "policy.yaml").write_text(POLICY)
    settings = {"S3LORA_POLICY": str(folder / "policy.yaml"), "S3LORA_STATE_DIR": str(folder)}
    folders = copy_with(trained, folder / "whole"), copy_with(trained, folder / "nothing")
    program = "-m", "tests.support.adapters_in_batches", model, folder, *folders
    return run_program(*program, **settings, **ONE_CORE, **PATHS, **more)[0]


@pytest.fixture(scope="module")
def found(model, trained, tmp_path_factory):
    return asked(model, trained, tmp_path_factory.mktemp("without-effect"))


def test_an_adapter_stripped_whole_is_in_no_batch_and_answers_as_the_base_model(found):
    assert found["whole"]["seen"] == [["whole"]]
    assert found["base"]["seen"] == found["nothing"]["seen"] == [[]]
    assert found["nothing"]["answers"] == found["base"]["answers"] != found["whole"]["answers"]


def test_beside_another_adapter_both_answer_as_they_do_alone(found):
    assert ["whole"] in found["together"]["seen"]
    nothing, whole, base = found["together"]["answers"]
    for one, alone in ((nothing, "base"), (whole, "whole"), (base, "base")):
        for position, expected in zip(one, found[alone]["answers"][0], strict=True):
            assert position == pytest.approx(expected, abs=1e-4)


def test_it_uses_the_base_models_prefix_cache(found):
    assert found["nothing"]["cached"] == [0]
    assert found["after base"]["cached"][0] > 0
    assert found["after base"]["answers"][0][0] == pytest.approx(
        found["base"]["answers"][0][0], abs=1e-4
    )


def test_an_adapter_is_in_no_batch_once_a_worker_has_quarantined_it(found):
    assert found["quarantine"]["seen"] == [["whole"]]
    assert found["quarantined"]["seen"] == [[]]
    assert found["quarantine"]["answers"] == found["base"]["answers"]
    assert found["quarantined"]["answers"] == found["base"]["answers"]


@pytest.mark.slow  # an engine more, to compare what a switch does not change
def test_without_skipping_the_answers_are_the_same(found, model, trained, tmp_path):
    other = asked(model, trained, tmp_path, S3LORA_SKIP_STRIPPED="0")
    assert other["nothing"]["seen"] == [["nothing"]]
    assert other["quarantined"]["seen"] == [["whole"]]
    for name in ("base", "nothing", "whole", "quarantine", "quarantined"):
        assert other[name]["answers"] == found[name]["answers"], name
