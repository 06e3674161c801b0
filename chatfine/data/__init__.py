"""Room 3: rows of files become dialogues, dialogues become examples, examples become batches."""
