"""The command line: arguments in, tables or JSON out. The only wing that prints or exits."""

from __future__ import annotations

from ssmprune_cli.cli.main import main

__all__ = [
    "main",
]
