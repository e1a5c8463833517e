"""``python -m trainer CONFIG.yaml [dotted.key=value ...]``: one rank of one training.

Exit codes: 0 complete, 2 a config that cannot be, 143 stopped by SIGTERM, 1 anything else. They
are for people; a launcher judges by ``complete.json`` and by the error records.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Sequence

from trainer import evidence
from trainer.errors import TrainerError
from trainer.reader import load
from trainer.stop import StopRequest

USAGE = "usage: python -m trainer CONFIG.yaml [dotted.key=value ...]"
LOCAL_RANK = re.compile(r"--local[-_]rank=\d+")
"""DeepSpeed's launcher adds it to every command; the variable LOCAL_RANK says the same."""


def main(arguments: Sequence[str]) -> int:
    """Run this rank to its end; returns the exit code."""
    words = [word for word in arguments if not LOCAL_RANK.fullmatch(word)]
    if not words or words[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    # Before torch is imported: what it and its libraries print belongs into the log too.
    record = evidence.from_environment(os.environ)
    try:
        record.begin()
        stop = StopRequest()
        stop.listen()
        config = load(words[0], words[1:])
        from trainer.train import main as train

        train(config, stop, os.environ)
    except TrainerError as error:
        record.record(error)
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        record.record(error)
        return 130
    except BaseException as error:
        record.record(error)
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Python's own shutdown now and then aborts in a thread of torch after all work is done.
    os._exit(code)
