"""What a calibration and an evaluation aim at by default; commands show it without torch."""

MAX_ASR = 0.05
"""The attack success rate to reach. Ours."""

STEPS = 16
"""Steps of Adam at most. Ours: on the bench's adapters 24 take a quarter longer and gain little."""
