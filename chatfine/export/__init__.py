"""Out of the house: merged models with proof, and their cards."""
