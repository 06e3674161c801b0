"""The tutorial's expand_token.py: Chinese pieces. All flags: `python expand_token.py --help`."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  # Python 3.6 reads this file far enough to say so
    sys.exit("chatfine 需要 Python 3.10 或更新的版本 / chatfine needs Python 3.10 or newer")

from chatfine.tutorial import expand_token

if __name__ == "__main__":
    sys.exit(expand_token())
