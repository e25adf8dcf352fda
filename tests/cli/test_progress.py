"""Long work says how far it is, also where there is no terminal."""

import io

import pytest
from rich.console import Console

from s3lora_serve.cli import progress


@pytest.fixture
def written(monkeypatch):
    """What is written to a standard error that is a file."""
    file = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=file, width=40))
    return file


def test_without_a_terminal_each_phase_has_its_lines_and_nothing_moves(written):
    with progress.phase_bars() as shown:
        for done in range(1, 46):
            shown(
                "search",
                done,
                45,
                "ASR 0.02, skill 0.98, benign refused 0.00" if done == 30 else "",
            )
        shown("after, held out", 3, 9)
    lines = written.getvalue().splitlines()
    assert lines == [
        "search: 45 steps",
        "search: 30 of 45, 0 s: ASR 0.02, skill 0.98, benign refused 0.00",
        "search: 45 of 45, 0 s",
        "after, held out: 9 steps",
    ]


def test_names_that_look_like_markup_are_text(written):
    with progress.phase_bars() as shown:
        shown("[red]phase", 1, 1)
    assert "[red]phase: 1 steps" in written.getvalue()


def test_on_a_terminal_there_are_bars(monkeypatch):
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=80)
    monkeypatch.setattr(progress, "Console", lambda **_: terminal)
    with progress.phase_bars() as shown:
        shown("search", 45, 45)
    assert "45/45" in file.getvalue()
