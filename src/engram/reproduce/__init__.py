"""Each paper's own claims as a small experiment, one file a paper."""
