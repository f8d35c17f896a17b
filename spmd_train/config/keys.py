"""The schema as a table of keys: what each allows, in code and in words."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
import numbers
import reprlib
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_BOOLS = {"true": True, "1": True, "false": False, "0": False}
_INT_MAX = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a section.

    Attributes:
      name: its name in the section.
      type: bool, int, float, str, or the dataclass of a section. Of a mapping: of its values.
      is_mapping: whether it holds names of the user's own choosing.
      doc: its meaning.
      default: its value where the config is silent.
      limits: the limits of `schema.key`.
    """

    name: str
    type: Any
    is_mapping: bool
    doc: str
    default: Any
    limits: Mapping[str, Any]

    @property
    def is_section(self) -> bool:
        """Whether it is a section of fixed keys."""
        return dataclasses.is_dataclass(self.type) and not self.is_mapping

    @property
    def allowed(self) -> str:
        """What it allows, in words."""
        if self.is_mapping:
            return f"names of your own, set as {self.name}.NAME=VALUE"
        if self.is_section:
            return "a section of keys"
        if "choices" in self.limits:
            return "one of " + ", ".join(self.limits["choices"])
        words = [_WORDS[self.type]]
        if "above" in self.limits:
            words.append(f"above {self.limits['above']}")
        if "at_least" in self.limits:
            words.append(f"at least {self.limits['at_least']}")
        if "at_most" in self.limits:
            words.append(f"at most {self.limits['at_most']}")
        if "or_equal" in self.limits:
            words.append(f"or {self.limits['or_equal']}")
        return ", ".join(words)

    def accept(self, value: Any) -> Any:
        """Returns `value` in the key's own type; raises a ValueError saying what is allowed."""
        if not self._has_type(value):
            is_large = self.type is int and isinstance(value, int) and "at_most" not in self.limits
            limit = f", at most {_INT_MAX}" if is_large and value > _INT_MAX else ""
            raise ValueError(f"must be {self.allowed}{limit}")
        value = self.type(value)
        if isinstance(value, str) and ("\0" in value or not _is_unicode(value)):
            raise ValueError("must be text without NUL or half surrogate pairs")
        choices = self.limits.get("choices", (value,))
        if value not in choices:
            raise ValueError(f"must be {self.allowed}{_suggestion(value, choices)}")
        if not self._is_within(value):
            raise ValueError(f"must be {self.allowed}")
        return value

    def _has_type(self, value: Any) -> bool:
        # Numbers may be NumPy's; a bool is an int to Python, but not to a config.
        if isinstance(value, bool) or self.type in (bool, str):
            return type(value) is self.type
        if self.type is int:
            return isinstance(value, numbers.Integral) and -_INT_MAX <= int(value) <= _INT_MAX
        return isinstance(value, numbers.Real) and _is_finite(value)

    def _is_within(self, value: Any) -> bool:
        limits = self.limits
        return value == limits.get("or_equal") or not (
            ("above" in limits and value <= limits["above"])
            or ("at_least" in limits and value < limits["at_least"])
            or ("at_most" in limits and value > limits["at_most"])
        )

    def from_text(self, text: str) -> Any:
        """Converts a flag's text to the key's type; what does not convert stays text.

        `accept` then refuses that text, so that an override is judged where everything is.
        """
        if self.type is bool:
            return _BOOLS.get(text.strip().lower(), text)
        if self.type is int:
            number = _convert(int, text)
            if isinstance(number, str):  # Perhaps 1e3: a float's form of a whole number.
                number = _convert(float, text)
                if isinstance(number, float):
                    return int(number) if number.is_integer() else text
            return number
        return _convert(float, text) if self.type is float else text


def _convert(to: type, text: str) -> Any:
    try:
        return to(text)
    except ValueError:
        return text


def _is_finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # A whole number that no float can hold.
        return False


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


@functools.cache
def keys_of(section: type) -> Mapping[str, Key]:
    """The keys of a section's dataclass, by name, in the schema's order."""
    hints = typing.get_type_hints(section)
    keys = {}
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        is_mapping = typing.get_origin(hint) is Mapping
        if field.default is not dataclasses.MISSING:
            default = field.default
        else:
            assert field.default_factory is not dataclasses.MISSING, field.name
            default = field.default_factory()
        keys[field.name] = Key(
            name=field.name,
            type=typing.get_args(hint)[1] if is_mapping else hint,
            is_mapping=is_mapping,
            doc=field.metadata["doc"],
            default=default,
            limits={name: v for name, v in field.metadata.items() if name != "doc"},
        )
    return keys


def paths_of(section: type, prefix: str = "") -> Iterator[str]:
    """The whole path of every key below a section, sections themselves too."""
    for key in keys_of(section).values():
        yield prefix + key.name
        if key.is_section:
            yield from paths_of(key.type, f"{prefix}{key.name}.")


def nearest(name: str, known: Collection[str]) -> str:
    """The known name or path most like a misspelt one.

    The same last word in another section counts most, then its initials (`optimizer.lr` for
    `optimizer.learning_rate`), then the likeness of the letters.
    """
    word = name.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == word]
    initials = [k for k in known if "".join(w[0] for w in k.rpartition(".")[2].split("_")) == word]
    return max(sorted(same or initials or known), key=lambda k: _likeness(name, k))


def _likeness(name: str, known: str) -> tuple[float, int]:
    """How like two names are, from 0 to 1; among those that are as like, the same start counts."""
    name, known = name.lower(), known.lower()
    alike = difflib.SequenceMatcher(None, known, name).ratio()
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(name, known, strict=False))
    return alike, len(list(same))


def _suggestion(value: str, choices: Collection[str]) -> str:
    """What to say of the choice most like a value; nothing where none is like it."""
    best = nearest(value, choices)
    alike, shared = _likeness(value, best)
    return f"; the nearest is {best}" if alike >= 0.5 or shared in (len(value), len(best)) else ""


def join(path: str, name: Any) -> str:
    """The path of a key in a section; a name that would garble a terminal is escaped."""
    text = name if isinstance(name, str) and name.isprintable() else show(name)
    return f"{path}.{text}" if path else text


_repr = reprlib.Repr()
_repr.maxlevel = 2
_repr.maxstring = _repr.maxother = 100


def show(value: Any) -> str:
    """A value for an error message, cut to a readable length."""
    if isinstance(value, Mapping | ConfigDict):
        names = [show(name) for name in value]
        return "{" + ", ".join(names[:3] + ["..."] * (len(names) > 3)) + "}"
    try:
        return _repr.repr(value)
    except ValueError:  # Python prints no whole number of more than 4300 digits.
        return f"a {type(value).__name__} too long to print"


def divisors(number: int) -> list[int]:
    """What divides a positive number, ascending; of numbers beyond 10^12 perhaps not all."""
    small = [n for n in range(1, min(math.isqrt(number), 10**6) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of a number that is next to one that is none."""
    return min(divisors(number), key=lambda n: abs(n - wanted))
