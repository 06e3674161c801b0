"""Is it better? Loss, perplexity, bits per character, and answers held against the wanted ones."""
