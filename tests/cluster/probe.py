"""What the tests run in place of a job: `python probe.py LINES PAUSE_S EXIT_CODE [VARIABLE…]`."""

import os
import sys
import time
from pathlib import Path


def main(lines: int, pause_s: float, exit_code: int, *variables: str) -> int:
    print("folder", *sorted(path.name for path in Path.cwd().iterdir()))
    for name in variables:
        print(name, "is", os.environ.get(name, "absent"))
    try:
        for number in range(lines):
            print("line", number)
            time.sleep(pause_s)
    except KeyboardInterrupt:
        print("stopped gently")
        print("probe: interrupted; repeat the command to resume from what is finished")
        return 130
    return exit_code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]))
