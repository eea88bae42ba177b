"""python -m data check DATA.yaml          what a data set holds, and every fault in it
python -m data shapes datasets/shapes     draws the data set that the project ships
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data.check import check
from data.shapes import draw_shapes
from data.structures import Fault


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 when something is wrong with what the user gave, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m data", description="Draws and checks data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    checks = commands.add_parser("check", help="print what a data set holds, and every fault in it")
    checks.add_argument("data", help="the data YAML, as cfg/data/shapes.yaml")
    shapes = commands.add_parser("shapes", help="draw the data set of shapes, unless it is there")
    shapes.add_argument("folder", help="where to, as datasets/shapes")
    shapes.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        if options.command == "check":
            report, sound = check(options.data)
            print(report)
            return 0 if sound else 2
        print(f"ready: {draw_shapes(options.folder, options.seed)}")
        return 0
    except (Fault, OSError) as problem:
        print(problem, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
