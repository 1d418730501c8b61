"""`python -m mnistlab`."""

from .cli import main

main()
