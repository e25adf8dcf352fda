"""What a calibration and an evaluation aim at by default; commands show it without torch."""

MAX_ASR = 0.05
"""The attack success rate to reach. Ours."""

STEPS = 24
"""Steps of Adam at most. Ours, from trials on the bench with gates on directions: after 16 the goal
is mostly reached."""
