"""`python -m swarmx` is `swarmx`."""

from swarmx.cli import main

main()
