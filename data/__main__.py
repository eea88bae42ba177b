"""python -m data check DATA.yaml [--html sheet.html]                what a data set holds, and every fault in it
python -m data convert DATA.yaml --to coco -o FOLDER               the same boxes as YOLO, VOC or COCO
python -m data split DATA.yaml train=0.8 val=0.2 -o FOLDER         divides it anew, class by class
python -m data split PHOTOS/ train=0.8 val=0.2 -o FOLDER           divides labelled photos that have no data YAML yet
python -m data shapes datasets/shapes                              draws the data set that the project ships
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from data.check import check, report_text
from data.config import BOXES, SPLITS, read_data_spec
from data.contact_sheet import write_contact_sheet
from data.convert import IMAGES, convert
from data.readers.labels import some
from data.shapes import draw_shapes
from data.split import split_data
from data.structures import PROGRAM, Fault, version


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 when something is wrong with what the user gave, 130 for Ctrl-C.

    ``check`` gives 1 where boxes or images are lost, or an image stands in several splits; 2 where a split is no use.
    """
    options = _parser().parse_args(argv)
    try:
        return COMMANDS[options.command](options)
    except (Fault, OSError) as problem:
        print(problem, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def from_zero(text: str) -> int:
    """A whole number that is not negative, for `argparse`."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: a whole number from 0 is right")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data", description="Draws, checks, converts, divides data sets.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version()}")
    commands = parser.add_subparsers(dest="command", required=True)
    data = "the data YAML, as cfg/data/shapes.yaml, or a folder of photos with VOC or COCO labels"

    checks = commands.add_parser("check", help="print what a data set holds, and every fault in it")
    checks.add_argument("data", help=data)
    checks.add_argument("--html", metavar="FILE", help="also write a page with pictures and boxes")
    checks.add_argument("--pictures", type=from_zero, default=60, help="on that page, at most")
    checks.add_argument("--seed", type=from_zero, default=0, help="of the choice of pictures")
    checks.add_argument("--decode", action="store_true", help="decode every image, which takes its time")

    converts = commands.add_parser("convert", help="write a data set in another format")
    converts.add_argument("data", help=data)
    converts.add_argument("--to", required=True, choices=BOXES)
    converts.add_argument("-o", "--out", required=True, metavar="FOLDER", help="a new folder")
    converts.add_argument("--images", choices=IMAGES, default="link", help="images are links (default) or copies")

    splits = commands.add_parser("split", help="divide a data set anew: lists of images and a data YAML")
    splits.add_argument("data", help=data)
    splits.add_argument("parts", nargs="+", metavar="PART=SHARE", help="as train=0.8 val=0.1 test=0.1")
    splits.add_argument("-o", "--out", required=True, metavar="FOLDER", help="for the lists and data.yaml")
    splits.add_argument("--of", nargs="+", choices=SPLITS, default=(), help="the splits to divide (default: all)")
    splits.add_argument("--seed", type=from_zero, default=0)

    shapes = commands.add_parser("shapes", help="draw the data set of shapes, unless it is there")
    shapes.add_argument("folder", help="where to, as datasets/shapes")
    shapes.add_argument("--seed", type=from_zero, default=0)
    return parser


def _check(options: argparse.Namespace) -> int:
    report = check(options.data, options.decode)
    print(report_text(report))
    if options.html:
        write_contact_sheet(options.html, report, options.pictures, options.seed)
        print(f"pictures: {options.html}")
    return report.code


def _convert(options: argparse.Namespace) -> int:
    done = convert(options.data, options.to, options.out, options.images)
    for note in done.notes:
        print(f"note: {note}")
    print(f"ready: {done.yaml}")
    return 0


def _split(options: argparse.Namespace) -> int:
    shares: dict[str, float] = {}
    for part in options.parts:
        name, _, share = part.partition("=")
        try:
            value = float(share)
        except ValueError:
            raise Fault(f"{part!r} is no share; as train=0.8 is right") from None
        if name in shares:
            raise Fault(f"{name} is given twice; one share a part is right")
        shares[name] = value
    made = split_data(options.data, options.out, shares, options.seed, options.of)
    if os.path.isdir(options.data):
        names = read_data_spec(made).names
        print(f"found {len(names)} {'class' if len(names) == 1 else 'classes'}: {some(names)}")
    print(f"ready: {made}")
    return 0


def _shapes(options: argparse.Namespace) -> int:
    print(f"ready: {draw_shapes(options.folder, options.seed)}")
    return 0


COMMANDS = {"check": _check, "convert": _convert, "split": _split, "shapes": _shapes}


if __name__ == "__main__":
    sys.exit(main())
