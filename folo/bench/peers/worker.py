"""`python worker.py MODULE CHECKPOINT DTYPE THREADS`: serve workloads, one line of JSON each way.

It says {"version": ...} when it is ready, or {"missing": module, "python": ...}. Then, for each line
{"prompts": [[token ids, how many to generate], ...], "cold": whether the workload is for a prefix cache,
which has to be empty}, it answers {"first_token": s, "last_token": s, "total": s}, in seconds from the first
submit.
Runs in the peer's environment: nothing but the standard library is imported here.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any


def main() -> None:
    module, checkpoint, dtype, threads = sys.argv[1:]
    # Engines print what they like: the answers go where the standard output was, all else to the errors.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")

    try:
        peer = importlib.import_module(module).start(checkpoint, dtype, int(threads))
    except ModuleNotFoundError as error:
        answer({"missing": error.name, "python": sys.executable})
        return
    answer({"version": peer.version})
    for line in sys.stdin:
        work = json.loads(line)
        first, last, total = peer.run(work["prompts"], work["cold"])
        answer({"first_token": first, "last_token": last, "total": total})


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
