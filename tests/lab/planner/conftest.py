"""A folder of plans for a planner."""

import pytest


@pytest.fixture
def plans(tmp_path):
    folder = tmp_path / "plans"
    folder.mkdir()
    return folder
