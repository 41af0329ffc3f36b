"""``python -m starmerge``."""

from starmerge.cli import main

main()
