"""Options of passes as text: ``{key=value,...}``, where a value is a Python literal, or a word that needs no quotes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

NAMED_VALUES = {"true": True, "false": False, "none": None, "inf": float("inf"), "nan": float("nan")}
UNQUOTED = re.compile(r"[A-Za-z_][\w./ +-]*")


def write_options(values: Mapping[str, Any]) -> str:
    """Return ``{key=value,...}``, or nothing where there are no values; :func:`read_options` reads it back."""
    return "{" + ",".join(f"{k}={_written(v)}" for k, v in values.items()) + "}" if values else ""


def read_options(text: str) -> dict[str, Any]:
    """Return the values of ``key=value,...`` (without the braces). Raises :class:`ValueError` naming the item that is none."""
    values = {}
    for item in _items(text):
        key, equals, raw = item.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ValueError(item)
        values[key.strip()] = _read(raw.strip())
    return values


def _items(text: str) -> Iterator[str]:
    """Yield what stands between commas, but for those within quotes or brackets."""
    item, quote, depth, escaped = "", "", 0, False
    for character in text:
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == "," and not quote and not depth:
            yield item.strip()
            item = ""
        else:
            item += character
    if item.strip():
        yield item.strip()


def _written(value: Any) -> str:
    unquoted = isinstance(value, str) and UNQUOTED.fullmatch(value) and value.strip() == value and _read(value) == value
    return value if unquoted else repr(value)


def _read(raw: str) -> Any:
    """Return the value of a literal; what is none is a word."""
    try:
        return _value(ast.parse(raw, mode="eval").body)
    except (ValueError, SyntaxError):
        return raw


def _value(tree: ast.expr) -> Any:
    if isinstance(tree, ast.Name) and tree.id.lower() in NAMED_VALUES:
        return NAMED_VALUES[tree.id.lower()]
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_value(tree.operand)
    if isinstance(tree, ast.Tuple):
        return tuple(map(_value, tree.elts))
    if isinstance(tree, ast.List):
        return list(map(_value, tree.elts))
    return ast.literal_eval(tree)


def names_in(text: str) -> list[str]:
    """Return the names in ``a+b`` or ``a,b``."""
    return [name.strip() for name in text.replace("+", ",").split(",")]


def has_type_of(default: Any, value: Any) -> bool:
    """Return whether ``value`` may stand for ``default``: an int for a float, a list for a tuple, anything for what is no plain type."""
    if isinstance(default, (bool, str)):
        return isinstance(value, type(default))
    if isinstance(default, (int, float)):
        number = (int, float) if isinstance(default, float) else int
        return isinstance(value, number) and not isinstance(value, bool) and value == value
    if isinstance(default, tuple):
        return isinstance(value, (tuple, list)) and all(has_type_of(default[0], item) for item in value if default)
    return True


def type_name(default: Any) -> str:
    """Return how a message names the type of an option with this default."""
    if isinstance(default, tuple) and default:
        return f"a tuple of {type(default[0]).__name__}"
    return f"{'an' if isinstance(default, int) and not isinstance(default, bool) else 'a'} {type(default).__name__}"
