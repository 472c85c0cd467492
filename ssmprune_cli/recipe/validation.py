"""Faults that pydantic finds, in words of the person who wrote the file."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping

from pydantic import BaseModel, ValidationError

Location = tuple[int | str, ...]  # keys and indices from the top of the file

_SENTENCES = {
    "missing": "is missing",
    "int_type": "must be a whole number, not {input}",
    "int_parsing": "must be a whole number, not {input}",
    "int_from_float": "must be a whole number, not {input}",
    "float_type": "must be a number, not {input}",
    "float_parsing": "must be a number, not {input}",
    "finite_number": "must be a finite number, not {input}",
    "string_type": "must be text, not {input}",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "may have letters, digits, '.', '_' and '-' only, not {input}",
    "tuple_type": "must be a list, not {input}",
    "model_type": "must be a mapping of keys to values, not {input}",
    "dict_type": "must be a mapping of keys to values, not {input}",
    "greater_than_equal": "must be at least {ge}, not {input}",
    "greater_than": "must be above {gt}, not {input}",
    "less_than_equal": "must be at most {le}, not {input}",
    "less_than": "must be below {lt}, not {input}",
    "literal_error": "must be {expected}, not {input}",
    "value_error": "{error}",
}


def explain(error: ValidationError, sections: Mapping[Location, type[BaseModel]]) -> list[tuple[Location, str]]:
    """Every fault of `error` as its location and a sentence. `sections` are the models by their place in the file."""
    found = []
    for fault in error.errors(include_url=False):
        loc, kind = fault["loc"], fault["type"]
        if kind == "extra_forbidden":
            text = f"unknown key; {suggestion(str(loc[-1]), sections[loc[:-1]].model_fields)}"
        elif kind in _SENTENCES:
            text = _SENTENCES[kind].format(input=reprlib.repr(fault["input"]), **fault.get("ctx", {}))
        else:
            text = fault["msg"]
        found.append((loc, text))
    return found


def suggestion(name: str, known: Iterable[str]) -> str:
    """What to write instead of the unknown `name`: the closest of the known names, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
