"""What sections of the study file are made of: types of their values, and words for what was given."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern="^[a-z0-9][a-z0-9_-]*$")]
Value = bool | int | float | str | None
A_LIST = Field(strict=False)  # YAML has lists only; strict pydantic refuses them for tuples
WIDTH = 60


def got(value: Any) -> str:
    """A value as the user wrote it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"text {value!r}" if len(value) <= WIDTH else f"text {value[:WIDTH]!r}..."
    if isinstance(value, dict):
        return "a section"
    return "a list" if isinstance(value, list | tuple) else repr(value)


class Section(BaseModel):
    """A section of the study file: unknown keys, text for numbers, NaN and infinity are refused.

    ``VERSION``: to be raised when a default or the meaning of a key changes, because it is part of what names runs,
    models and votes. A new key with a default needs nothing.
    """

    VERSION: ClassVar[int] = 1

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def identified(self, **chosen: Any) -> dict[str, Any]:
        """Give what names this section: its settings that are not the default, and versions that were raised.

        So a key that is added later changes no name. ``chosen``: ``include`` or ``exclude`` of pydantic's dump.
        """
        settings = self.model_dump(mode="json", exclude_defaults=True, **chosen)
        raised = {name: version for name, version in sorted(_versions(self)) if version != Section.VERSION}
        return settings | ({"versions": raised} if raised else {})


def _versions(value: Any) -> Iterator[tuple[str, int]]:
    """The version of every section in a value, its own among them, by class."""
    if isinstance(value, Section):
        yield type(value).__name__, value.VERSION
        for _, part in value:
            yield from _versions(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _versions(part)


def without_password(address: str | None, instead: str) -> str | None:
    """The address; ValueError where it is a URL with a password in it, which ``instead`` says how to give."""
    if "://" in (address or "") and urlsplit(address).password is not None:
        raise ValueError(f"holds a password; give it {instead}")
    return address
