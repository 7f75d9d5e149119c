"""The base of all settings: checked once, described once, with a one-sentence error for a wrong value."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import annotated_types as limits
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from rubiks.errors import InputError

MOST = 2**32 - 1  # the limit of whole numbers in settings without a smaller one

Count = Annotated[int, Field(ge=1, le=MOST)]
Side = Annotated[int, Field(ge=16, le=MOST)]  # of images, in pixels
Share = Annotated[float, Field(ge=0, le=1)]


class Expected:
    """In an annotation's metadata: the words for what is allowed, if the type does not say it well.

    Args:
        text: what follows "must be".
        advice: what to do about another value, as a sentence without the full stop.
    """

    def __init__(self, text: str, advice: str = "") -> None:
        self.text, self.advice = text, advice


# Lists in the configuration become tuples, so that settings cannot change.
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Name = Annotated[str, Expected("the name of a file or folder", "quote a name that looks like a number: '{key}=\"5\"'")]


class Settings(BaseModel):
    """The settings of one part: a section of the configuration.

    A class gives the name of its section, as in ``class Recipe(Settings, section="recipe")``; `--help` prints the
    descriptions of the fields. Values are not converted: "3" is not a number.

    Raises:
        InputError: on construction, for the first setting that is unknown, missing or wrong.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
    section: ClassVar[str] = ""

    def __init_subclass__(cls, section: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if section is not None:
            cls.section = section

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(_sentence(type(self), values, error)) from None

    @classmethod
    def key(cls, name: str) -> str:
        """A field's key in the configuration, for example recipe.lr."""
        return f"{cls.section}.{name}" if cls.section else name

    def wrong(self, name: str, expected: str) -> InputError:
        """The error for a field that does not fit the others, worded like that for a field wrong in itself."""
        return InputError(f"{self.key(name)} must be {expected}, got {shown(getattr(self, name))}")


def defaults(model: type[Settings]) -> dict[str, Any]:
    """The defaults of a model as a configuration has them, including those of its sections."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        section, default = section_of(field), field.default
        if section is not None and default is not None:
            found[name] = defaults(section)
        elif section is None and not field.is_required():
            found[name] = list(default) if isinstance(default, tuple) else default
    return found


def section_of(field: FieldInfo) -> type[Settings] | None:
    """The model of a field that is a section; None for any other field."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)), None)


def taken(model: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a section that belong to this model, as several models may share the section."""
    return {name: value for name, value in values.items() if name in model.model_fields}


def shown(value: Any) -> str:
    """A value as messages show it: tuples as the lists that they were."""
    return repr(list(value) if isinstance(value, tuple) else value)


def expectation(field: FieldInfo, value: Any = None) -> str:
    """What a field may hold, in words to follow "must be"; MOST is only mentioned if `value` is above it."""
    return _words(field.annotation, field.metadata, value)


def unknown(section: str, name: str, known: Sequence[str]) -> str:
    """The message for an unknown key of a section, with the key that was probably meant and all valid ones."""
    prefix = f"{section}." if section else ""
    hint = did_you_mean(name, known, prefix)
    return f"{prefix}{name} is unknown.{hint} {section or 'The configuration'} has {', '.join(known)}"


def did_you_mean(name: str, known: Sequence[str], prefix: str = "") -> str:
    """A question, after a space, about the known name that is most like a wrong one; empty if none is like it."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {prefix}{near[0]}?" if near else ""


def _sentence(model: type[Settings], values: Mapping[str, Any], error: ValidationError) -> str:
    """The first of the errors as a sentence: the key, what was expected, and what was given."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    key = model.key(name)
    if first["type"] == "extra_forbidden":
        return unknown(model.section, name, list(model.model_fields))
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return f"{key} is not set"
    field = model.model_fields[name]
    advice = next((f"; {part.advice.format(key=key)}" for part in _expected(field) if part.advice), "")
    if (section := section_of(field)) is not None:
        advice = f"; set its keys, for example {key}.{next(iter(section.model_fields))}=VALUE, or leave {key} out"
    words = expectation(field, values[name])
    return f"{key} must be {words}{';' if ', ' in words else ','} got {shown(values[name])}{advice}"


def _expected(field: FieldInfo) -> list[Expected]:
    parts = [field.metadata, *(getattr(part, "__metadata__", ()) for part in get_args(field.annotation))]
    return [part for some in parts for part in some if isinstance(part, Expected)]


def _words(kind: Any, metadata: Any, value: Any) -> str:
    """The words for a type with its limits."""
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        metadata = [*metadata, *more]
    bounds: dict[type, Any] = {}
    for part in metadata:
        if isinstance(part, Expected):
            return part.text
        for limit in part.metadata if isinstance(part, FieldInfo) else [part]:
            bounds[type(limit)] = limit
    if get_origin(kind) in (Union, types.UnionType):
        return _choice([_words(one, (), value) for one in get_args(kind)])
    if get_origin(kind) is Literal:
        choices = [str(one).lower() if isinstance(one, bool) else str(one) for one in get_args(kind)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if get_origin(kind) is tuple:
        return f"a list, each {_words(get_args(kind)[0], (), value)}"
    if kind in (int, float):
        return ("a whole number" if kind is int else "a number") + _range(bounds, value)
    if isinstance(kind, type) and issubclass(kind, Settings):
        return f"a section with {', '.join(kind.model_fields)}"
    return {bool: "true or false", str: "text", type(None): "null"}[kind]


def _choice(words: list[str]) -> str:
    """Alternatives, null last."""
    others = " or ".join(word for word in words if word != "null")
    return f"{others}, or null" if "null" in words else others


def _range(bounds: Mapping[type, Any], value: Any) -> str:
    least = bounds[limits.Ge].ge if limits.Ge in bounds else None
    above = bounds[limits.Gt].gt if limits.Gt in bounds else None
    most = bounds[limits.Le].le if limits.Le in bounds else None
    below = bounds[limits.Lt].lt if limits.Lt in bounds else None
    if most == MOST and not (isinstance(value, int) and value > most):
        most = None
    if least is not None and (most, below) != (None, None):
        return f" from {least:g} to {f'{most:,}' if most is not None else f'below {below:,}'}"
    low = "" if (least, above) == (None, None) else f" of at least {least:g}" if above is None else f" above {above:g}"
    high = "" if most is None else f" at most {most:,}"
    return low + (" and" if low and high else "") + high
