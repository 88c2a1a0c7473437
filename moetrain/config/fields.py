"""What a configuration field means and may be, said once, beside its default, for help, documentation and errors."""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin

from moetrain.config.errors import require_at_least, require_in, require_one_of

T = TypeVar("T")
_KEY = "about"


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """One field: a sentence, the unit of its numbers, their bounds, and what is usually wanted instead of a bad value.

    ``least`` and ``most`` are legal themselves, ``above`` and ``below`` are not. In a dictionary they bound its values.
    """

    text: str
    unit: str = ""
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    cure: str = ""

    @property
    def bounds(self) -> str:
        """In words; empty where any number will do.

        >>> About(text="", least=0, below=1).bounds, About(text="", least=1, most=9).bounds
        ('at least 0 and below 1', '1 to 9')
        """
        if self.least is not None and self.most is not None:
            return f"{_plainly(self.least)} to {_plainly(self.most)}"
        said = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{words} {_plainly(bound)}" for words, bound in said.items() if bound is not None)

    def check(self, name: str, value: float) -> None:
        """Raise unless ``value`` is within the bounds, naming the field, the bounds, the value and the cure."""
        if self.least is not None and self.most is not None:
            require_in(name, value, self.least, self.most, self.cure)
        elif self.below is None and self.most is None and self.least is not None:
            require_at_least(name, value, self.least, self.cure)
        elif not self._allows(value):
            legal = "positive" if self.bounds == "above 0" else self.bounds
            raise ValueError(f"{name} must be {legal}, got {value}; {self.cure}")

    def _allows(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def about(text: str, **details: Any) -> Mapping[str, About]:
    """Metadata of a dataclass field; see ``About``."""
    return {_KEY: About(text=text, **details)}


def setting(default: T, text: str, **details: Any) -> T:
    """A dataclass field with its default, its sentence and the rest of ``About``."""
    return field(default=default, metadata=about(text, **details))


def about_of(item: "Field[Any]") -> About:
    """What ``setting`` said of a field."""
    found: About = item.metadata[_KEY]
    return found


def choices_of(kind: Any) -> tuple[str, ...]:
    """The values that a field of type ``kind`` can have, where they are listed."""
    return get_args(kind) if get_origin(kind) is Literal else ()


def check_fields(table: Any, name: str = "") -> None:
    """Raise unless every field of the dataclass ``table``, called ``name``, is among its choices and in its bounds."""
    for field_name, facts, choices in _described(table.__class__):
        value = getattr(table, field_name)
        full_name = f"{name}.{field_name}" if name else field_name
        if choices:
            require_one_of(full_name, value, choices, f" ({full_name}: {facts.text})")
        elif isinstance(value, Mapping):
            for key, part in value.items():
                facts.check(f"{full_name}[{key!r}]", part)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            facts.check(full_name, value)


@cache
def _described(table: type) -> tuple[tuple[str, About, tuple[str, ...]], ...]:
    """Name, facts and choices of each field that ``setting`` made."""
    return tuple((item.name, about_of(item), choices_of(item.type)) for item in fields(table) if _KEY in item.metadata)


def _plainly(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"
