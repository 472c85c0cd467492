"""`python -m ssmprune_cli`."""

from ssmprune_cli.cli import main

main()
