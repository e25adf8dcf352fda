"""What a calibration and an evaluation aim at by default; commands show it without torch."""

MAX_ASR = 0.05
"""The attack success rate to reach. Ours."""

STEPS = 24
"""Steps of Adam in one round of a search. Ours: on most of the bench's adapters it ends after 16 of
24, with better gates than 16 at most give."""
