"""The network: load it, choose what learns, run it fast, generate with it."""
