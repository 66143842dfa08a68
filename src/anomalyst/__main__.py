"""`python -m anomalyst`."""

from anomalyst.cli import main

main()
