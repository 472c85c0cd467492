"""`python -m ssmprune_cli`."""

from ssmprune_cli.cli.main import main

main()
