"""`python -m lexigraft`, and so `accelerate launch -m lexigraft train ...`."""

from lexigraft.cli import main

main()
