"""Learning: the loop, the optimizer, the checkpoint store, the plan, and their one assembly."""
