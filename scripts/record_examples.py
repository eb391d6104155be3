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


def main(word: str = "") -> None:
    page = PAGE.read_text(encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for block in re.findall(r"```console\n(.*?)```", page, re.S):
        if word in block:
            steps = [f"cat <<'SHOWN'\n$ {line}\nSHOWN\n{line}" for line in re.findall(r"^\$ (.*)", block, re.M)]
            script = "\n".join(["set -e", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT", *steps])
            done = subprocess.run(
                ["bash", "-c", script], cwd=ROOT, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True
            )
            print(done.stdout, flush=True)
            if done.returncode != 0:
                sys.exit(f"The last of these commands ended with {done.returncode}.")
            page = page.replace(f"```console\n{block}```", f"```console\n{done.stdout}```")
            PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
