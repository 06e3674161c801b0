"""Room 1, where models come from: names, downloads, model folders, conversions. No torch here."""
