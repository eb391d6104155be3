"""Runs the commands that examples/README.md shows, and puts what they print in the place of what is there.

python scripts/record_examples.py [WORD]   every block of commands, or those that hold WORD

The lines of a block that begin with "$ " run one after the other in one shell, in the root of the checkout; a command
that goes on in the background ends with its block.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "examples" / "README.md"
_BLOCK = re.compile(r"```console\n(.*?)```", re.S)
_MARK = "-- end of the output of a command --"


def record(block: str) -> str:
    """The commands of a block, each followed by what it printed; raises RuntimeError for one that fails."""
    commands = [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
    steps = [f"{command}\necho '{_MARK}'" for command in commands]
    script = "\n".join(["set -e", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT", *steps])
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    printed = done.stdout.split(f"{_MARK}\n")[:-1]
    if done.returncode != 0 or len(printed) != len(commands):
        raise RuntimeError(f"a command of the block ended with {done.returncode}:\n{block}\n{done.stderr}")
    return "".join(f"$ {command}\n{output}" for command, output in zip(commands, printed, strict=True))


def main() -> None:
    """Records every block, or those that hold the word given, and writes the page after each."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    for block in _BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if word in block:
            recorded = record(block)
            print(recorded, flush=True)
            page = PAGE.read_text(encoding="utf-8")
            PAGE.write_text(page.replace(f"```console\n{block}```", f"```console\n{recorded}```"), encoding="utf-8")


if __name__ == "__main__":
    main()
