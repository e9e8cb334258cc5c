"""The tables of `docs/results/`: each is made by one command, which stands beside it."""
