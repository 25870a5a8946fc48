"""Change manifests at a steady rate: `python -m bench.clients.changes FOLDER RATE SECONDS`, nothing but that.

FOLDER holds pairs of files NAME.a and NAME.b: by turns, one of them becomes NAME.json by a rename. Printed is how
many changes were made, as JSON.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import shutil
import sys
import time


def main(folder: pathlib.Path, rate: float, seconds: float) -> None:
    names = sorted(path.with_suffix("") for path in folder.glob("*.a"))
    variants = itertools.cycle((".b", ".a"))
    turns = ((name, variant) for variant in variants for name in names)
    begin = time.monotonic()
    made = 0
    while (elapsed := time.monotonic() - begin) < seconds:
        due = int(elapsed * rate) + 1
        for name, variant in itertools.islice(turns, due - made):
            new = name.with_suffix(".new")
            shutil.copyfile(name.with_suffix(variant), new)
            new.rename(name.with_suffix(".json"))
        made = due
        time.sleep(max(0.0, begin + due / rate - time.monotonic()))
    print(json.dumps({"changes": made}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
