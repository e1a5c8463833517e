"""``python -m trainer.prepare CONFIG.yaml [dotted.key=value ...]``: the token cache alone.

For large text, so that no GPU waits for it: run it on one node before the job, with the same
config. It needs no torch and no launcher, and prints one JSON object about the cache it made.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from trainer.corpus import Corpus, prepare
from trainer.errors import TrainerError
from trainer.place import throttled
from trainer.reader import load


def main(arguments: Sequence[str]) -> int:
    """Build the cache or find it; returns the exit code."""
    if not arguments or arguments[0].startswith("-"):
        print(
            "usage: python -m trainer.prepare CONFIG.yaml [dotted.key=value ...]", file=sys.stderr
        )
        return 2
    say = throttled(lambda news: print(news, file=sys.stderr, flush=True), seconds=5)
    try:
        config = load(arguments[0], arguments[1:])
        directory = prepare(
            config.data,
            config.model.directory,
            config.cache_directory,
            lambda phase, done, total: say(f"{phase}: {done} of {total} bytes"),
        )
    except TrainerError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    found = Corpus(directory)
    facts = {
        "directory": str(directory),
        "tokens": found.tokens,
        "documents": found.documents,
        "vocab_size": found.vocab_size,
        "sequences": found.tokens // config.data.sequence_length,
    }
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
