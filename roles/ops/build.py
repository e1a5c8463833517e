"""Compiles DeepSpeed's operators into a folder, as a training would at its start, and stamps it.

Sent to the nodes as text and run by the environment's interpreter. The stamp is written last: a folder
without one does not count.

    python build.py STAMP WANTED    STAMP: its file, in the folder to fill
                                    WANTED: JSON of ops and for, what they are compiled for
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

RECIPE = "1"
"""Counts changes of this module that change what is compiled."""
BUILDERS = {
    "cpu_adam": "CPUAdamBuilder",
    "fused_adam": "FusedAdamBuilder",
    "shm_comm": "ShareMemCommBuilder",
}


def cause(error: BaseException) -> str:
    """One line of an exception that may hold the whole output of a compiler."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\berror\b|not found|No such file", line)]
    telling = [line for line in telling if not line.startswith("Error building")] or lines
    return (telling[0] if telling else type(error).__name__)[:400]


def compile_all(folder: Path, ops: list[str]) -> dict[str, str]:
    """Compile each; path below the folder to the SHA-256 of each library."""
    from deepspeed.accelerator import get_accelerator

    for name in ops:
        builder = get_accelerator().create_op_builder(BUILDERS[name])
        if builder is None:
            raise RuntimeError(f"DeepSpeed has no {name} for this node's accelerator")
        builder.jit_load(verbose=False)
    strip(folder)
    libraries = sorted(folder.glob("*/*.so"))
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in libraries
    }


def strip(folder: Path) -> None:
    """Take the debug information out, nine tenths of the size. ninja goes by times, which stay."""
    files = [*folder.glob("*/*.o"), *folder.glob("*/*.so")]
    if shutil.which("strip"):
        subprocess.run(["strip", "-p", "-g", *map(str, files)], check=False)


if __name__ == "__main__":
    stamp, wanted = Path(sys.argv[1]), json.loads(sys.argv[2])
    os.environ["TORCH_EXTENSIONS_DIR"] = str(stamp.parent)
    try:
        found = compile_all(stamp.parent, wanted["ops"])
    except BaseException as error:  # whatever a compiler, torch or DeepSpeed may raise
        sys.stdout.flush()
        sys.stderr.write(f"compiling {', '.join(wanted['ops'])} failed: {cause(error)}\n")
        sys.stderr.flush()
        os._exit(1)
    stamp.write_text(json.dumps({"for": wanted["for"], "ops": found}, sort_keys=True) + "\n")
    sys.stdout.flush()
    os._exit(0)  # libraries that were imported may hang at a normal exit
