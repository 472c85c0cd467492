"""YAML text to plain values that know their line, and back. Hostile input is refused: tags, aliases, deep nesting."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_DEPTH = 20


class YamlFault(Exception):
    """One fault at a line and column (both count from 1)."""

    def __init__(self, line: int, column: int, text: str) -> None:
        super().__init__(text)
        self.line = line
        self.column = column
        self.text = text


@dataclass(frozen=True)
class Document:
    """A parsed text. `faults` are those that do not keep it from being read: keys given twice (the last one counts)."""

    value: Any
    node: yaml.Node | None
    faults: list[YamlFault] = field(default_factory=list)

    def position(self, location: Sequence[int | str]) -> tuple[int, int]:
        """Line and column of the value at `location` (keys and indices), or of the nearest thing around it."""
        node, mark = self.node, self.node.start_mark if self.node else None
        for step in location:
            if isinstance(node, yaml.MappingNode):
                found = [pair for pair in node.value if pair[0].value == step]
                if not found:
                    break
                mark, node = found[-1][0].start_mark, found[-1][1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                mark = node.start_mark
            else:
                break
        return (mark.line + 1, mark.column + 1) if mark else (1, 1)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses aliases (a few lines of them expand to gigabytes) and deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise YamlFault(mark.line + 1, mark.column + 1, "aliases (*name) are not supported; write the value out")
        if self.depth >= MAX_DEPTH:
            raise YamlFault(mark.line + 1, mark.column + 1, f"nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


# A date stays text: nothing here takes a date, and JSON has none.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """SafeDumper with lists on one line and no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes these line breaks raw unless the text is double-quoted, and reads them back as spaces.
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


# YAML 1.1 takes 5e-4 for text, because it has no point; everyone who writes it means the number.
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True))


def parse_yaml(text: str) -> Document:
    """The one document in `text` (None if it is empty). Raises YamlFault if the text cannot be read."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            value = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise YamlFault(line, column, error.problem or error.context or "not YAML") from error
    except YamlFault:
        raise
    except Exception as error:  # a tag such as !!bool raises nearly anything for a value that it does not expect
        known = isinstance(error, yaml.YAMLError | ValueError)
        reason = str(error) if known else f"a tag does not fit its value: {error}"
        raise YamlFault(1, 1, " ".join(reason.split())) from error
    return Document(value, node, list(_repeated_keys(node)))


def dump_yaml(value: Any) -> str:
    """YAML text of plain values, keys in their given order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=100)


def _repeated_keys(node: yaml.Node | None) -> list[YamlFault]:
    faults: list[YamlFault] = []
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            faults += _repeated_keys(item)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line, column = key.start_mark.line + 1, key.start_mark.column + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in first:
                    faults.append(
                        YamlFault(line, column, f"{key.value}: given twice, first in line {first[key.value]}")
                    )
                first.setdefault(key.value, line)
            faults += _repeated_keys(value)
    return faults
