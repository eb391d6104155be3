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


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for block in re.findall(r"```console\n(.*?)```", page, re.S):
        if sys.argv[1:] == [] or sys.argv[1] in block:
            printed = recorded(re.findall(r"^\$ (.*)", block, re.M))
            print(printed, flush=True)
            page = page.replace(f"```console\n{block}```", f"```console\n{printed}```")
            PAGE.write_text(page, encoding="utf-8")


def recorded(commands: list[str]) -> str:
    """The commands, each followed by what it printed; the script ends where one of them fails."""
    script = ["set -e", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for command in commands:
        script += [f"cat <<'COMMAND'\n$ {command}\nCOMMAND", command]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=ROOT, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        sys.exit(f"a command ended with {done.returncode}, after:\n{done.stdout}")
    return done.stdout


if __name__ == "__main__":
    main()
