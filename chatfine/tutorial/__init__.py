"""The tutorial's four commands, flag for flag, over the same core as `chatfine`.

The doors are finetuning.py, chat_completion.py, merge.py and expand_token.py at the repository's
root; fields.py is the table of all flags.
"""

from chatfine.tutorial.doors import chat_completion, expand_token, finetuning, merge

__all__ = ["chat_completion", "expand_token", "finetuning", "merge"]
