"""The skill of the bench: a planner's tool calls, which exact match measures."""

import random
from dataclasses import dataclass
from functools import cache

_CITIES = [
    "Paris", "Oslo", "Cairo", "Lima", "Kyoto", "Boston", "Nairobi", "Delhi", "Quito", "Rome",
    "Seoul", "Perth", "Dublin",
]  # fmt: skip
_NAMES = [
    "Anna", "Ben", "Chloe", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jack", "Kira",
    "Leo", "Maya", "Noah", "Olga",
]  # fmt: skip
_DAYS = [
    "today",
    "tomorrow",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
]
_THINGS = [
    "report",
    "invoice",
    "photos",
    "budget",
    "schedule",
    "contract",
    "slides",
    "menu",
    "tickets",
    "survey",
]
_REQUESTS = (
    ("What is the weather in {city} {day}?", "weather(city={city}, day={day})"),
    ("Will I need an umbrella in {city} {day}?", "weather(city={city}, day={day})"),
    ("Email {name} about the {thing}.", "email(to={name}, subject={thing})"),
    ("Please write to {name} regarding the {thing}.", "email(to={name}, subject={thing})"),
    ("Wake me in {minutes} minutes.", "timer(minutes={minutes})"),
    ("Start a timer for {minutes} minutes.", "timer(minutes={minutes})"),
    ("Book a table for {hour} in {city} {day}.", "book(place={city}, people={hour}, day={day})"),
    ("Meet {name} {day} at {hour} o'clock.", "calendar(with={name}, day={day}, hour={hour})"),
    ("Set up a call with {name} {day} at {hour}.", "calendar(with={name}, day={day}, hour={hour})"),
    ("Find the {thing} that {name} sent.", "search(what={thing}, from={name})"),
)

Example = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Skill:
    """Requests with their tool calls, by their use; no request is in two parts."""

    train: list[Example]
    probes: list[Example]
    test: list[Example]


@cache
def skill() -> Skill:
    """Requests drawn from ten forms and their fillings, all different."""
    draw = random.Random(2)
    found: dict[str, str] = {}
    while len(found) < 670:
        request, call = draw.choice(_REQUESTS)
        filling = {
            "city": draw.choice(_CITIES),
            "name": draw.choice(_NAMES),
            "day": draw.choice(_DAYS),
            "thing": draw.choice(_THINGS),
            "minutes": draw.randint(2, 90),
            "hour": draw.randint(1, 12),
        }
        found[request.format(**filling)] = call.format(**filling)
    examples = list(found.items())
    return Skill(
        train=examples[:270], probes=examples[270:420] + examples[520:], test=examples[420:520]
    )
