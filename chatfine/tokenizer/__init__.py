"""Text ↔ ids: tokenizers, chat templates, streaming and tokenizer files."""
