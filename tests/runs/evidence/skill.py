"""The skills of the bench, which exact match measures: a planner's tool calls, and exact
transformations of short texts."""

import random
from dataclasses import dataclass
from functools import cache
from typing import Literal

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

_SURNAMES = [
    "Rossi", "Meyer", "Garcia", "Novak", "Silva", "Larsen", "Dubois", "Kowalski", "Haddad",
    "Okafor", "Tanaka", "Murphy", "Lindgren", "Petrov", "Costa",
]  # fmt: skip
_WORDS = [
    "red", "stone", "river", "cloud", "lamp", "green", "paper", "north", "silver", "window",
    "apple", "garden", "blue", "winter", "bread", "table", "yellow", "forest", "music", "bridge",
]  # fmt: skip
_MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
]  # fmt: skip
_TRANSFORMATIONS = (
    ("Initials: {name} {surname}", "[{name[0]}.{surname[0]}.]"),
    ("Give the initials of {name} {surname}.", "[{name[0]}.{surname[0]}.]"),
    ("Surname first: {name} {surname}", "[{surname}, {name}]"),
    ("Swap the two words: {one} {two}", "[{two} {one}]"),
    ("Join with dashes: {one} {two} {three}", "[{one}-{two}-{three}]"),
    ("Only the last word: {one} {two} {three}", "[{three}]"),
    ("Only the first word: {two} {three} {one}", "[{two}]"),
    ("Say it twice: {one} {two}", "[{one} {two} {one} {two}]"),
    ("As a date: day {day} of {month}, {year}", "[{day}/{number}/{year}]"),
    ("Which year is in this line? {name} {surname}, {month} {year}", "[{year}]"),
)

Example = tuple[str, str]
SkillName = Literal["tool calls", "text"]


@dataclass(frozen=True, slots=True)
class Skill:
    """Requests with their tool calls, by their use; no request is in two parts."""

    train: list[Example]
    probes: list[Example]
    test: list[Example]


@cache
def skill(name: SkillName) -> Skill:
    """Requests drawn from ten forms and their fillings, all different."""
    draw = random.Random(2)
    example = {"tool calls": _tool_call, "text": _transformation}[name]
    found: dict[str, str] = {}
    while len(found) < 670:
        found.update([example(draw)])
    examples = list(found.items())
    return Skill(
        train=examples[:270], probes=examples[270:420] + examples[520:], test=examples[420:520]
    )


def _tool_call(draw: random.Random) -> Example:
    request, call = draw.choice(_REQUESTS)
    filling = {
        "city": draw.choice(_CITIES),
        "name": draw.choice(_NAMES),
        "day": draw.choice(_DAYS),
        "thing": draw.choice(_THINGS),
        "minutes": draw.randint(2, 90),
        "hour": draw.randint(1, 12),
    }
    return request.format(**filling), call.format(**filling)


def _transformation(draw: random.Random) -> Example:
    request, answer = draw.choice(_TRANSFORMATIONS)
    one, two, three = draw.sample(_WORDS, 3)
    number = draw.randint(1, 12)
    filling = {
        "name": draw.choice(_NAMES),
        "surname": draw.choice(_SURNAMES),
        "one": one,
        "two": two,
        "three": three,
        "day": draw.randint(1, 28),
        "number": number,
        "month": _MONTHS[number - 1],
        "year": draw.randint(1950, 2030),
    }
    return request.format(**filling), answer.format(**filling)
