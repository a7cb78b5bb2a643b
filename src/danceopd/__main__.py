"""``python -m danceopd``, which is how launchers of several processes start it."""

from danceopd.cli import main

main()
