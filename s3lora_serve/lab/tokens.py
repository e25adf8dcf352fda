"""How many tokens are generated, where several parts of the lab agree."""

JUDGED_TOKENS = 8
"""Tokens generated for a judgement of refusal: enough for every phrase."""

ODDS_TOKENS = 3
"""First tokens of a refusal whose log-odds count: there it is decided. Ours."""

ANSWER_TOKENS = 24
"""Tokens of an answer of the model's own that stand for what it does."""
