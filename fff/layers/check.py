"""Checks of constructor arguments; each error names the argument and its value."""

from __future__ import annotations

from numbers import Real


def check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer >= 1")


def check_width(**sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name}={value!r} must be an integer >= 0")


def check_non_negative(**values: float) -> None:
    for name, value in values.items():
        if not _is_number(value) or not value >= 0:
            raise ValueError(f"{name}={value!r} must be a number >= 0")


def check_above_zero(**values: float) -> None:
    for name, value in values.items():
        if not _is_number(value) or not value > 0:
            raise ValueError(f"{name}={value!r} must be a number > 0")


def check_probability(**values: float) -> None:
    for name, value in values.items():
        if not _is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"{name}={value!r} must lie in [0, 1]")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_depth(depth: int, most: int) -> None:
    if not isinstance(depth, int) or isinstance(depth, bool) or not 0 <= depth <= most:
        raise ValueError(f"depth={depth!r} must be an integer between 0 and {most}")


def check_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is none of {list(choices)}")
