"""Statistics on tensors: no model, no files; every other floor may use it."""
