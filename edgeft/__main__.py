"""`python -m edgeft`: the command line without an installed script."""

from edgeft.cli import main

main()
