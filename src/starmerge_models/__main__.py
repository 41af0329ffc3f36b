"""``python -m starmerge_models``."""

from starmerge_models.cli import main

main()
