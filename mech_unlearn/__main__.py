"""`python -m mech_unlearn`: the command line."""

from mech_unlearn.commands.cli import main

main()
