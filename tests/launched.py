"""What each process of a launch runs: commands of `python -m workbench`, one after another.

    accelerate launch ... tests/launched.py COMMANDS.json

A process is slow to start: so that commands can share a launch, COMMANDS is a list of arguments.
Each command's status is printed by every process; `{rank}` stands for the process's number.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from workbench.__main__ import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        status = main([part.replace("{rank}", os.environ["RANK"]) for part in arguments])
        print(f"status {status}", flush=True)
