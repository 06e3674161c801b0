"""The tutorial's chat_completion.py: ask a model. All flags: `python chat_completion.py --help`."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  # Python 3.6 reads this file far enough to say so
    sys.exit("chatfine 需要 Python 3.10 或更新的版本 / chatfine needs Python 3.10 or newer")

from chatfine.tutorial import chat_completion

if __name__ == "__main__":
    sys.exit(chat_completion())
