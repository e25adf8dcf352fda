"""What a calibration and an evaluation aim at by default; commands show it without torch."""

MAX_ASR = 0.05
"""The attack success rate to reach. Ours."""

STEPS = 45
"""Steps of Adam at most. Ours: in trials on the bench 60 took a third longer and gained nothing."""
