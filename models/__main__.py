"""Look at model files, compare them, draw them, convert them, and take weights of other programs.

python -m models show cfg/models/tiny.yaml
python -m models check cfg/models/*.yaml
python -m models draw cfg/models/yolov4-p5.yaml -o p5.html
python -m models diff cfg/models/yolov5n.yaml cfg/models/yolov5s.yaml
python -m models convert yolov5s.yaml --named -o mine.yaml
python -m models import yolov5n.pth --cfg cfg/models/yolov5n.yaml --names cfg/data/coco256.yaml -o yolov5n.pt
python -m models import yolox_nano.onnx --cfg cfg/models/yolox-nano.yaml -o yolox-nano.pt --imgsz 416
python -m models import tf_efficientnet_b0.pth --cfg cfg/models/tf-efficientnet-b0.yaml -o b0.pt --imgsz 224
python -m models import resnet50-11ad3fa6.pth --cfg cfg/models/resnet50.yaml -o resnet50.pt --imgsz 224
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from data.files import LARGEST_YAML, compose_yaml, read_bytes, write_text
from data.structures import PROGRAM, Fault, nearest, version
from models import convert, diff, draw, show
from models.cost import RowCost, network_costs
from models.efficientnet import NORMALIZATIONS
from models.graph import Graph, load_graph
from models.network import SUPERNETS
from models.parse import parse
from models.user_ops import load_ops

DRAWINGS = {".svg": draw.svg, ".html": draw.html}


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 where `diff` found a difference; 2 for what the user did wrong, told on stderr; 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    try:
        for path in options.ops:
            load_ops(Path(path))
        return int(COMMANDS[options.command](options))
    except Fault as fault:
        print(fault, file=sys.stderr)
    except BrokenPipeError:  # as in `... | head`: nobody is there to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as problem:
        named = problem.filename is not None and problem.strerror
        print(f"{problem.filename}: {problem.strerror}" if named else problem, file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version()}")
    reading = argparse.ArgumentParser(add_help=False)
    reading.add_argument("--dialect", metavar="NAME", help="read the file as this dialect; default: recognised")
    reading.add_argument("--scale", metavar="NAME", help="which of the sizes that a file lists under `scales:`")
    reading.add_argument(
        "--ops", metavar="FILE.py", action="append", default=[], help="your own ops; may be given several times"
    )
    reading.add_argument("--trust-ops", action="store_true", help="run the Python file that a model's `ops:` names")
    size = argparse.ArgumentParser(add_help=False)
    size.add_argument("--imgsz", type=int, default=640, help="input size in pixels (default: 640)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, parents=[*parents, reading], allow_abbrev=False)

    one = command("show", "the table of rows: parameters, MACs, shapes", size)
    one.add_argument("file")
    one.add_argument("--supernet", choices=SUPERNETS, help="show a search file as this supernet")
    one = command("check", "one line for every fault of every file")
    one.add_argument("files", nargs="+", metavar="file")
    one = command("draw", "a picture: an SVG, or a page to zoom that tells what each row reads, gives and costs", size)
    one.add_argument("file")
    one.add_argument("-o", "--output", metavar="OUT.svg|OUT.html", help="default: the file's name with .html, here")
    one = command("diff", "which rows of two files differ, and what that costs; exit code 1 where any does", size)
    one.add_argument("before")
    one.add_argument("after")
    one = command("convert", "a file of any dialect in our normal form")
    one.add_argument("file")
    one.add_argument("-o", "--output", metavar="OUT.yaml", help="default: print it")
    one.add_argument("--named", action="store_true", help="name every row that others read by its index")
    one = command("import", "a checkpoint of ours from a state dict of another program, or a YOLOX in ONNX", size)
    one.add_argument("state", metavar="STATE.pth|NET.onnx")
    one.add_argument("--cfg", required=True, metavar="FILE", help="the model file that the weights belong to")
    one.add_argument("-o", "--output", required=True, metavar="OUT.pt")
    one.add_argument("--names", metavar="FILE", help="the classes: a data set's YAML, or a text file, one a line")
    one.add_argument(
        "--normalization",
        choices=NORMALIZATIONS,
        help="what was done to images in [0, 1] before the weights saw them (default: usual for weights of their kind)",
    )
    return parser


# ---- the commands


def shown(options: argparse.Namespace) -> int:
    graph = _graph(options.file, options)
    supernet = options.supernet or ("shared" if graph.spec.choices else None)
    costs = _costs(graph, options.imgsz, supernet)
    print(show.table(graph, costs, options.imgsz, supernet))
    return 0


def checked(options: argparse.Namespace) -> int:
    worst = 0
    for file in options.files:
        try:
            graph = _graph(file, options)
        except Fault as fault:
            print(fault, file=sys.stderr)
            worst = 2
        else:
            print(f"{file}: good, {len(graph.nodes)} rows, {len(graph.spec.choices)} open choices")
    return worst


def drawn(options: argparse.Namespace) -> int:
    output = Path(options.output or Path(options.file).with_suffix(".html").name)
    if output.suffix not in DRAWINGS:
        raise Fault(f"-o {output}: a picture is {' or '.join(DRAWINGS)}{nearest(output.suffix, DRAWINGS)}")
    graph = _graph(options.file, options)
    _write(output, DRAWINGS[output.suffix](graph, _costs(graph, options.imgsz), options.imgsz), options.file)
    return 0


def differing(options: argparse.Namespace) -> int:
    one, two = _graph(options.before, options), _graph(options.after, options)
    found = diff.diff(one, two, _costs(one, options.imgsz), _costs(two, options.imgsz))
    print(diff.table(found))
    return 0 if found.same else 1


def converted(options: argparse.Namespace) -> int:
    graph = _graph(options.file, options)  # tells all that is wrong with it
    for op in {node.op.name: node.op for node in graph.nodes if node.op.file}.values():
        file = str(op.file).rpartition(":")[0]
        _note(f"{op.name} is an op of {file}, which the converted file does not name; read it with --ops {file}")
    spec = parse(options.file, options.dialect, options.trust_ops, options.scale)
    comment = convert.heading(Path(options.file).read_text(encoding="utf-8"))
    text = convert.convert(spec, options.named, comment)
    if options.output is None:
        print(text, end="")
    else:
        _write(Path(options.output), text, options.file)
    return 0


def imported(options: argparse.Namespace) -> int:
    from models.checkpoint import save_checkpoint
    from models.foreign import import_weights
    from models.onnx_weights import import_onnx

    _keep_input(Path(options.output), options.state, options.cfg)
    names = _names(Path(options.names)) if options.names else None
    spec = parse(options.cfg, options.dialect, options.trust_ops, options.scale)
    state = Path(options.state)
    if state.suffix == ".onnx":
        if options.normalization:
            raise Fault(f"--normalization {options.normalization}: {state} is an ONNX file, whose input is known")
        network, notes = import_onnx(state, spec, names)
    else:
        network, notes = import_weights(state, spec, names, options.normalization)
    for note in (*network.graph.notes, *notes):
        _note(note)
    if names is None:
        names = tuple(map(str, range(network.num_classes)))
        _note(f"classes are called 0 to {len(names) - 1}; --names FILE names them")
    _check_size(network.graph, options.imgsz)
    save_checkpoint(options.output, network, names, imgsz=options.imgsz)
    print(f"{options.output}: written")
    return 0


COMMANDS = {
    "show": shown,
    "check": checked,
    "draw": drawn,
    "diff": differing,
    "convert": converted,
    "import": imported,
}


# ---- what they share


def _graph(file: str, options: argparse.Namespace) -> Graph:
    graph = load_graph(file, options.dialect, options.trust_ops, options.scale)
    for note in graph.notes:
        _note(note)
    return graph


def _costs(graph: Graph, imgsz: int, supernet: str | None = None) -> list[RowCost]:
    _check_size(graph, imgsz)
    return network_costs(graph, imgsz, supernet or ("shared" if graph.spec.choices else None))


def _check_size(graph: Graph, imgsz: int) -> None:
    from models.checkpoint import LARGEST_IMGSZ

    if imgsz > LARGEST_IMGSZ:
        raise Fault(f"--imgsz {imgsz}: {LARGEST_IMGSZ:,} pixels at most are right")
    if imgsz < 1 or imgsz % graph.max_stride:
        raise Fault(f"--imgsz {imgsz}: {graph.spec.path} needs a multiple of its largest stride {graph.max_stride}")


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _names(path: Path) -> tuple[str, ...]:
    """The classes that a data set's YAML lists, or the lines of a text file."""
    try:
        text = read_bytes(path, LARGEST_YAML).decode("utf-8")
        if path.suffix not in (".yaml", ".yml"):
            return tuple(line.strip() for line in text.splitlines() if line.strip())
        root = compose_yaml(text)
    except UnicodeDecodeError:
        raise Fault(f"{path}: not a text file in UTF-8") from None
    except yaml.YAMLError as problem:
        raise Fault(f"{path}: not valid YAML: {str(problem).splitlines()[0]}") from None
    given = {str(key.value): value for key, value in root.value} if isinstance(root, yaml.MappingNode) else {}
    nodes = given["names"].value if isinstance(given.get("names"), yaml.CollectionNode) else []
    if isinstance(given.get("names"), yaml.MappingNode):
        labels = {str(key.value): value for key, value in nodes}
        nodes = [labels.get(str(label)) for label in range(len(nodes))]
    if not nodes or not all(isinstance(node, yaml.ScalarNode) and node.value.strip() for node in nodes):
        raise Fault(f"{path}: has no list of classes under the key 'names'")
    return tuple(node.value for node in nodes)  # as it is written: `no` and `1` are names, too


def _keep_input(output: Path, *inputs: str) -> None:
    for file in inputs:
        if output.exists() and Path(file).exists() and output.samefile(file):
            raise Fault(f"-o {output}: is the file that is read; give another name")


def _write(output: Path, text: str, source: str) -> None:
    """The whole file or none of it, and never over the file that it was made from."""
    _keep_input(output, source)
    write_text(output, text)
    print(f"{output}: written")


if __name__ == "__main__":
    sys.exit(main())
