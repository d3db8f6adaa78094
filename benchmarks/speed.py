"""Speed against what a user would pick instead, measured in one run, as ratios with repeats.

    python benchmarks/speed.py overhead [--repeats 3] [--steps 60]
    python benchmarks/speed.py ofakd | rpg | ppt | deco | gendet | dfkd | ptq | tinysam_train ... [options]

Each subject is a file `speed_<subject>.py` beside this one; `--help` after the subject lists its options.
"""

import importlib
import sys
from pathlib import Path


def main() -> int:
    folder = Path(__file__).parent
    subjects = sorted(path.stem.removeprefix("speed_") for path in folder.glob("speed_*.py"))
    if len(sys.argv) < 2 or sys.argv[1] not in subjects:
        print(f"{__doc__}\nsubjects: {', '.join(subjects)}")
        return 2
    sys.path.insert(0, str(folder))
    subject = sys.argv.pop(1)
    sys.argv[0] = f"speed.py {subject}"
    return int(importlib.import_module(f"speed_{subject}").main() or 0)


if __name__ == "__main__":
    sys.exit(main())
