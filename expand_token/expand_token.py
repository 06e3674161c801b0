"""The same as expand_token.py one folder up: Chinese pieces for the vocabulary."""

import os
import sys

if sys.version_info < (3, 10):  # noqa: UP036  # Python 3.6 reads this file far enough to say so
    sys.exit("chatfine 需要 Python 3.10 或更新的版本 / chatfine needs Python 3.10 or newer")

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from chatfine.tutorial import expand_token

if __name__ == "__main__":
    sys.exit(expand_token())
