"""Settings of a job: one typed declaration makes its flags, its YAML keys, its README table and its run record.

The only room that knows pydantic and YAML.
"""

import argparse
import difflib
import inspect
import json
import re
import reprlib
import shlex
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = [
    "Field",
    "FolderPath",
    "InputPath",
    "JobSettings",
    "Metavar",
    "Option",
    "Positional",
    "check_settings",
    "command_line",
    "options",
    "read_yaml",
    "without_secrets",
]

_MOST_VALUES = 100_000
_QUESTIONS = frozenset({"query", "where"})  # may be about anything
_USER = re.compile(r"://[^/\s@'\"]+@")
_SIGNED = re.compile(r"(\w://[^\s?'\"]*)\?[^\s'\"]*=[^\s'\"]*")
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200

check_settings = model_validator(mode="after")
"""Decorates a method of a settings class that looks at several settings together and raises ``ValueError``."""


@dataclass(frozen=True)
class Metavar:
    """What stands for a value in ``--help`` and in the option tables, where the type alone says too little."""

    text: str


class Positional(Metavar):
    """A value that is given without a flag."""


FolderPath = Annotated[str, Metavar("FOLDER")]
InputPath = Annotated[str, Metavar("PATH")]


class JobSettings(BaseModel):
    """Base of every job's settings: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())

    @classmethod
    def from_values(cls, values: dict[str, Any], place: str) -> Self:
        """Returns the settings that a mapping (of a YAML section, say) gives; ``place`` names it in errors.

        Raises:
            ValueError: A key is unknown (the nearest right one is named), missing, or has an unusable value.
        """
        for key, value in values.items():
            if key not in cls.model_fields:
                raise ValueError(f"{place}: no key '{without_secrets(str(key))}'.{_nearest(str(key), cls.model_fields)}")
            if key not in _QUESTIONS and _holds_secret(value):
                raise ValueError(f"{place}: '{key}' holds a key, a password or a signed address. Use the environment.")
        try:
            return cls(**values)
        except ValidationError as error:
            raise ValueError(f"{place}: {_explain(error, cls)}") from None

    @classmethod
    def from_command_line(cls, arguments: Sequence[str], program: str) -> Self:
        """Returns the settings that a command line gives; ``--config FILE`` supplies what no flag gives.

        Raises:
            ValueError: A flag or key is unknown, missing or has an unusable value, or the YAML file cannot be read.
            SystemExit: ``--help`` was asked for, or a flag has no value.
        """
        parsed, rest = _parser(cls, program).parse_known_args(arguments)
        if rest:
            flags = [option.flag for option in options(cls)]
            raise ValueError(f"{program}: no option '{without_secrets(rest[0])}'.{_nearest(rest[0], flags)} --help lists all.")
        values = vars(parsed)
        config = values.pop("config", None)
        if config:
            values = _merge(read_yaml(config), values)
        return cls.from_values(values, f"{program} ({config})" if config else program)


@dataclass(frozen=True, slots=True)
class Option:
    """One setting as its user sees it: its flag, what stands for a value, the default in words, and what it does."""

    name: str
    flag: str
    metavar: str
    default: str
    description: str
    kind: Any


def options(settings: type[JobSettings]) -> list[Option]:
    """Returns the options of a job in the order of their declaration."""
    return [_option(name, field) for name, field in settings.model_fields.items()]


def _option(name: str, field: Any) -> Option:
    kind = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    markers = [*field.metadata, *getattr(kind, "__metadata__", ())]
    marker = next((marker for marker in markers if isinstance(marker, Metavar)), Metavar(_metavar(kind)))
    flag = name if isinstance(marker, Positional) else f"--{name.replace('_', '-')}"
    default = "required" if field.is_required() else _in_words(field.default)
    description = field.description or ""
    return Option(name, flag, marker.text, default, description, get_origin(kind) or kind)


def command_line(program: str, settings: JobSettings) -> str:
    """Returns the command that gives these settings; what has its default is left out.

    An empty value in place of a default stands in no flag, but in a comment.
    """
    words, unsaid = [program], []
    for option in options(type(settings)):
        value = getattr(settings, option.name)
        if value == type(settings).model_fields[option.name].default:
            continue
        if value is None:
            unsaid.append(f"{option.name}: null")
        elif isinstance(value, bool):
            words.append(option.flag if value else f"--no-{option.flag.removeprefix('--')}")
        else:
            words += [*([option.flag] if option.flag.startswith("-") else []), shlex.quote(_as_argument(value))]
    return " ".join(words) + (f"  # and in a --config file: {', '.join(unsaid)}" if unsaid else "")


def _as_argument(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"{_metavar(get_args(kind)[0])},..."
    return {int: "N", float: "X", bool: "", dict: "MAPPING"}.get(get_origin(kind) or kind, "TEXT")


def _in_words(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value) or "none"
    return "none" if value in ("", {}) else str(value)


def _parser(settings: type[JobSettings], program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description=inspect.cleandoc(settings.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; flags win over it.")
    for option in options(settings):
        text = f"{option.description} [{option.default}]".replace("%", "%%")
        if option.kind is bool:
            parser.add_argument(option.flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = _READERS.get(option.kind, str)
            nargs = None if option.flag.startswith("-") else "?"
            parser.add_argument(option.flag, metavar=option.metavar, type=kind, help=text, nargs=nargs)
    return parser


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _read_mapping(text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
        _count(value, {})
    except (yaml.YAMLError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"'{text}' is not a mapping; write '{{max_steps: 10, batch_size: 32}}'")
    return value


_READERS = {tuple: _split, dict: _read_mapping}


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Returns both mappings in one; where both hold a mapping under a key, these are merged as well."""
    both = {
        key: _merge(under[key], over[key]) for key in over if isinstance(under.get(key), dict) and isinstance(over[key], dict)
    }
    return {**under, **over, **both}


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name.partition("=")[0], list(known), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def _explain(error: ValidationError, settings: type[JobSettings]) -> str:
    flags = {option.name: option.flag if option.flag.startswith("-") else option.metavar for option in options(settings)}
    lines = []
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"])
        flag = flags.get(name.split(".")[0], name)
        if fault["type"] == "missing":
            lines.append(f"'{name}' is missing. Pass {flag}.")
        elif fault["type"] == "value_error":
            lines.append(fault["msg"].removeprefix("Value error, "))
        else:
            lines.append(
                f"'{name}': {fault['msg'][:1].lower()}{fault['msg'][1:]} (found {_SHORT.repr(fault['input'])}). Change {flag}."
            )
    return " ".join(lines)


def without_secrets(text: str) -> str:
    """Returns a text without what may be a key, a password or the signature of an address.

    >>> without_secrets("https://me:hunter2@host/model?X-Amz-Signature=abc was not found")
    'https://...@host/model?... was not found'
    """
    return _TOKEN.sub("...", _SIGNED.sub(r"\1?...", _USER.sub("://...@", text)))


def _holds_secret(value: Any) -> bool:
    """Returns whether any text in a value is one that must not be repeated."""
    if isinstance(value, dict):
        return any(key not in _QUESTIONS and _holds_secret(own) for key, own in value.items())
    if isinstance(value, (list, tuple)):
        return any(map(_holds_secret, value))
    return isinstance(value, str) and without_secrets(value) != value


def _count(value: Any, known: dict[int, int]) -> int:
    """Returns how many values a YAML value holds, each as often as it stands there.

    Raises:
        ValueError: They are very many, or it holds itself: a few aliases of aliases are enough for that.
    """
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = _MOST_VALUES  # what is met again while it is counted holds itself
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known) for part in parts)
    if known[id(value)] > _MOST_VALUES:
        raise ValueError(f"aliases that make more than {_MOST_VALUES} values of it")
    return known[id(value)]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Returns the mapping that a YAML file holds.

    Raises:
        ValueError: The file is missing, is not YAML in UTF-8, or does not hold a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
        _count(values, {})
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}). Give the path of a YAML file.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date is a plain ValueError
        raise ValueError(f"{path}: not YAML in UTF-8 ({' '.join(str(error).split())}). Mend it and run again.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no settings (found {type(values).__name__}). Write one 'key: value' per line.")
    return values
