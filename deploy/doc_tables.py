"""Tables of the documents that are made from what they are about: `make generate` writes them."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from inspect import Parameter, signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
import yaml
from fastapi import FastAPI
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.models import ArgumentInfo, ParameterInfo

from s3lora_serve.admission.verdict import Verdict
from s3lora_serve.cli import app as commands
from s3lora_serve.errors import LoadPostponed, S3LoRAError, rejections
from s3lora_serve.lab.planner.planner_metrics import PlannerMetrics
from s3lora_serve.policy.schema import Policy
from s3lora_serve.policy.section import Section
from s3lora_serve.telemetry.metrics import Metrics
from s3lora_serve.vllm_plugin.api.routes import GateRoutes

DOCS = Path(__file__).parents[1] / "docs"
MODEL = {"layer", "projection"}
"""Labels whose values come from the base model."""


def written() -> dict[Path, str]:
    """Path and content of each document with such tables."""
    tables = {
        "reference.md": {"policy": policy(), "refusals": refusals(), "metrics": metrics()},
        "options.md": {"options": options()},
        "fleet.md": {"planner": planner_metrics()},
        "operating.md": {"routes": routes()},
    }
    found = {}
    for name, own in tables.items():
        text = (DOCS / name).read_text()
        for table, content in own.items():
            text = between(text, table, content)
        found[DOCS / name] = text
    return found


def between(text: str, table: str, content: str) -> str:
    """The text with a table between its two marks, which are comments."""
    begin, end = f"<!-- make generate: {table} -->\n", f"<!-- end of {table} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"a document lacks the marks of its table {table}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    lines = [names, ["---"] * len(names), *(list(row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", r"\|")


def refusals() -> str:
    """The catalogue of errors."""
    others = (*S3LoRAError.__subclasses__(), *LoadPostponed.__subclasses__())
    known = {one.code: one for one in (*rejections(), *others) if hasattr(one, "code")}
    rows = ((code, _cell(known[code].__doc__), known[code].remedy) for code in sorted(known))
    return _table(("code", "meaning", "what to do"), rows)


def metrics() -> str:
    """All metrics, with the values of the labels that are closed from the start."""
    registry = CollectorRegistry()
    own = Metrics(registry)
    own.set_model_modules([("0", "q_proj")])
    own.activate("sha256:0", "enforce", "0")
    own.set_waiting_loads(0)
    own.set_preloads(0)
    own.serve(SimpleNamespace(name="acme", mode="enforce", stripped=()))  # type: ignore[arg-type]
    return _families(registry)


def planner_metrics() -> str:
    """The metrics of `s3lora planner`."""
    registry = CollectorRegistry()
    PlannerMetrics(registry)
    return _families(registry)


def _families(registry: CollectorRegistry) -> str:
    rows = []
    for family in registry.collect():
        samples = [one for one in family.samples if "le" not in one.labels]
        name = f"{family.name}_total" if family.type == "counter" else family.name
        text = f"histogram: {family.documentation}" if family.type == "histogram" else None
        labels = ", ".join(_labels([one.labels for one in samples]))
        rows.append((f"`{name}`", labels or "–", _cell(text or family.documentation)))
    return _table(("metric", "labels", "meaning"), rows)


def _labels(samples: list[dict[str, str]]) -> Iterator[str]:
    for label in samples[0] if samples else ():
        values = list(dict.fromkeys(one[label] for one in samples))
        if label in MODEL or len(values) == 1:
            yield f"`{label}`"
        elif values[0].startswith("S3LORA-"):
            yield f"`{label}` (code)"
        else:
            yield f"`{label}` ({', '.join(f'`{value}`' for value in values)})"


def policy() -> str:
    """Every key of the policy."""
    rows = ((f"`{key}`", default, text) for key, default, text in _keys(Policy, ""))
    return _table(("key", "default", "meaning"), rows)


def _keys(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        repeated = "[]" if inner and get_origin(field.annotation) in (tuple, frozenset) else ""
        text = field.description or (inner.__doc__ if inner else None)
        one_of = "" if inner else _choices(field.annotation)
        yield prefix + name, _default(field), _cell(f"{one_of}{text or ''}")
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}{repeated}.")


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The part of the policy that a field holds, or holds several of; None: it holds values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (
            annotation if not issubclass(annotation, Section) or annotation.model_fields else None
        )
    found = (_section_in(each) for each in get_args(annotation) if each is not type(None))
    return next((each for each in found if each is not None), None)


def _choices(annotation: Any) -> str:
    """The values of a field that has few."""
    values = _values(annotation)
    return f"{', '.join(f'`{value}`' for value in values)}. " if len(values) > 1 else ""


def _values(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [value for each in get_args(annotation) for value in _values(each)]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be set"
    value = field.default
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_unset=True)
        if not value:
            return "below"
    plain = list(value) if isinstance(value, tuple | frozenset) else value
    text = yaml.safe_dump(plain, default_flow_style=True)
    return f"`{text.strip().removesuffix('...').strip()}`"


def options() -> str:
    """The arguments and options of every command."""
    return "\n".join(_command(name, body) for name, body in sorted(_walk(commands, "s3lora")))


def _walk(app: typer.Typer, name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    for command in app.registered_commands:
        if command.callback is not None:
            yield f"{name} {command.name or command.callback.__name__}", command.callback
    for group in app.registered_groups:
        if group.typer_instance is not None:
            yield from _walk(group.typer_instance, f"{name} {group.name}")


def _command(name: str, body: Callable[..., Any]) -> str:
    text = _cell((body.__doc__ or "").split("\n\n")[0])
    hints = get_type_hints(body, include_extras=True)
    rows = [_parameter(each, hints[each.name]) for each in signature(body).parameters.values()]
    rows = [row for row in rows if row is not None]
    table = "\n" + _table(("argument or option", "default", "meaning"), rows) if rows else ""
    return f"## {name}\n\n{text}\n{table}"


def _parameter(parameter: Parameter, hint: Any) -> tuple[str, str, str] | None:
    told = next((each for each in get_args(hint) if isinstance(each, ParameterInfo)), None)
    if told is None:  # typer's own context
        return None
    # Within Annotated typer takes the first name for what is a default elsewhere.
    names = [each for each in (told.default, *(told.param_decls or ())) if isinstance(each, str)]
    names = names or [f"--{parameter.name.replace('_', '-')}"]
    if isinstance(told, ArgumentInfo):
        names = [told.metavar or parameter.name.upper()]
    is_needed = parameter.default is Parameter.empty
    value = getattr(parameter.default, "value", parameter.default)
    is_unset = value is None or value is False or value in ("", ())
    default = "needed" if is_needed else "–" if is_unset else f"`{value}`"
    text = _cell(told.help) + _choice(get_args(hint)[0])
    if told.envvar:
        text += f" Also `{told.envvar}`."
    return ", ".join(f"`{name}`" for name in names), default, text


def _choice(annotation: Any) -> str:
    """The values of an option that has few."""
    inner = next(each for each in (annotation, *get_args(annotation)) if isinstance(each, type))
    if not issubclass(inner, Enum):
        return ""
    return f" One of {', '.join(f'`{each.value}`' for each in inner)}."


def routes() -> str:
    """The gate's HTTP routes: what they do, and the keys of what they answer."""
    always = {_route(each) for each in _api("0")}
    rows = []
    for each in _api("1"):
        text = _cell((each.endpoint.__doc__ or "").split("\n\n")[0])
        rarely = "" if _route(each) in always else " Only if run-time loading is enabled."
        rows.append((f"`{_route(each)}`", f"{text}{rarely}", _taken(each), _answer(each)))
    return _table(("route", "does", "takes", "answers"), rows)


def _api(runtime_loading: str) -> list[APIRoute]:
    """A server's routes, with run-time loading or without."""
    name = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
    before = os.environ.get(name)
    os.environ[name] = runtime_loading
    try:
        api = FastAPI()
        api.state.args = SimpleNamespace(api_key=None)
        GateRoutes(lambda: None).attach_router(api)
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
    return [route for route in api.routes if isinstance(route, APIRoute)]


def _route(route: APIRoute) -> str:
    return f"{', '.join(route.methods)} {re.sub(r'{name(:path)?}', 'NAME', route.path)}"


def _taken(route: APIRoute) -> str:
    """The names of a route's query parameters, or the keys of its body."""
    query = [each.alias for each in route.dependant.query_params]
    if query:
        return f"`?{'&'.join(query)}`"
    body = route.dependant.body_params
    keys = [each.alias for each in body]
    if len(body) == 1:  # a model of vLLM's, whose keys its versions differ in
        return "as vLLM's"
    return f"`{{{', '.join(keys)}}}`" if keys else "–"


def _answer(route: APIRoute) -> str:
    """The keys of what a route answers if all is well."""
    answer = route.responses.get(200, {})
    model = answer.get("model")
    if model is Verdict:
        return "a verdict"
    if model is not None and issubclass(model, BaseModel):
        return f"`{{{', '.join(model.model_fields)}}}`"
    return next(iter(answer.get("content", {"a page": None})))
