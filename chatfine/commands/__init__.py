"""One file a verb that joins several rooms; each function takes its config and returns plain
data."""
