"""Helpers that write configuration errors the same way everywhere: who, what must hold, what came, the cure."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

EXAMPLES: MappingProxyType[type, str] = MappingProxyType(
    {int: "a whole number such as 4", float: "a number such as 0.1"}
)


class NotBuiltYetError(ValueError):
    """A configuration is meaningful, but the part of moetrain that would serve it does not exist yet."""

    def __init__(self, field: str, value: object, cure: str) -> None:
        super().__init__(f"{field} = {value!r} is not built yet in moetrain; {cure}")


def require(holds: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``holds``."""
    if not holds:
        raise ValueError(message)


def require_at_least(field: str, value: float, least: float, cure: str = "") -> None:
    """Raise unless ``value >= least``, naming the field, the bound, the value and the cure."""
    cure = cure or f"set it to {least} or more"
    require(value >= least, f"{field} must be at least {least}, got {value}{_with(cure)}")


def require_in(field: str, value: float, low: float, high: float, cure: str = "") -> None:
    """Raise unless ``low <= value <= high``."""
    require(
        low <= value <= high,
        f"{field} must be between {low} and {high}, got {value}{_with(cure or 'choose a value inside that range')}",
    )


def require_divides(field: str, divisor: int, whole: str, size: int) -> None:
    """Raise unless ``divisor`` divides ``size``; the nearest divisors are listed."""
    legal = [number for number in range(1, size + 1) if size % number == 0]
    near = sorted(sorted(legal, key=lambda number: abs(number - divisor))[:3])
    require(
        size % divisor == 0,
        f"{field} ({divisor}) must divide {whole} ({size}); set {field} to one of {', '.join(map(str, near))}",
    )


def require_one_of(field: str, value: object, allowed: Iterable[object], about: str = "") -> None:
    """Raise unless ``value`` is among ``allowed``; the nearest is suggested, and ``about`` ends the message."""
    choices = list(allowed)
    if value in choices:
        return
    near = nearest(str(value), map(str, choices))
    hint = f"did you mean {near!r}?" if near else "choose one of these"
    raise ValueError(f"{field} must be one of {', '.join(map(repr, choices))}, got {value!r}; {hint}{about}")


def require_type(field: str, value: Any, kind: type) -> None:
    """Raise ``TypeError`` unless ``value`` is of ``kind``; an int passes for a float, a bool never for an int."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return
    cure = _cure_of_type(field, value, kind)
    raise TypeError(f"{field} must be {kind.__name__}, got {value!r} ({type(value).__name__}); {cure}")


def require_storable(field: str, text: str) -> None:
    """Raise unless ``text`` is one that files in UTF-8 can hold and a path may have: what the shell gave was decodable.

    Python keeps the bytes of a name that is not UTF-8 as lone surrogates, which only the file system takes back.
    """
    try:
        text.encode()
        holds = "\0" not in text
    except UnicodeEncodeError:
        holds = False
    require(holds, f"{field} must be text in UTF-8 without NUL, got {text!r}; rename it, or choose another")


@contextmanager
def naming(field: str, cure: str) -> Iterator[None]:
    """Turn an error of the file system into one that names the field whose path it is about."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ValueError(f"{field} cannot be used: {error.strerror or error}{where}; {cure}") from error


def nearest(word: str, choices: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """The choice spelled most like ``word``, if one is as alike as ``cutoff``; 1 is the same."""
    found = get_close_matches(word, list(choices), n=1, cutoff=cutoff)
    return found[0] if found else None


def _cure_of_type(field: str, value: Any, kind: type) -> str:
    """How to write a value of ``kind`` where ``value`` came, which is of another type."""
    if kind is str:
        return "write one text in quotes" if isinstance(value, dict | list) else "write it in quotes"
    if kind is dict:
        return f"write it as the table [{field}]"
    if isinstance(value, str) and _reads_as(value, kind):
        return "write it without quotes"
    if kind is bool:
        return "write true or false"
    if kind is int and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    return f"write {EXAMPLES[kind]}"


def _reads_as(text: str, kind: type) -> bool:
    if kind is bool:
        return text in ("true", "false")
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _with(cure: str) -> str:
    return f"; {cure}" if cure else ""
