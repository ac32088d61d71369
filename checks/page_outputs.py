"""Runs the blocks of a page and writes what they print into it, where the page shows something else, or only `…`.

Run as: python checks/page_outputs.py docs/tutorial.md --work FOLDER [--site GYM_SITE_PACKAGES]

Goes on where it stopped: what ran in FOLDER is not run again unless it, or a block before it, has changed. Read the
result before you commit it: long output is cut by hand, to lines of `…`. `make docs-test` compares.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from blocks import blocks, filled


def main() -> int:
    """Runs and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--site", default="", help="for pages that use $SITE")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    kept = arguments.work / ".printed.json"
    earlier = json.loads(kept.read_text()) if kept.exists() else {}
    printed: dict[str, str] = {}
    so_far, failed = "", 0
    for block in blocks(arguments.page):
        so_far = sha256((so_far + block.code).encode()).hexdigest()
        if so_far not in earlier:
            start = time.monotonic()
            done = block.run(arguments.work, {"SITE": arguments.site})
            name = block.code.splitlines()[-1]
            print(f"{time.monotonic() - start:6.0f} s  {name[:100]}", flush=True)
            if done.returncode:
                failed = done.returncode
                print(f"ends with status {failed}\n{done.stdout}{done.stderr}")
                break
            earlier[so_far] = done.stdout
            kept.write_text(json.dumps(earlier))
        printed[block.code] = earlier[so_far]
    arguments.page.write_text(filled(arguments.page.read_text(), printed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
