"""`python -m edgeft`: the command line without an installed script."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the current folder: a user's random.py must not be taken for the standard library's

from edgeft.cli import main

main()
