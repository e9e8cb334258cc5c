"""Many methods under one protocol: a table of every trial, and a leaderboard."""
