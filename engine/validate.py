"""val.py: measures a trained network on a labelled data set, for every task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.config import read_data_spec
from data.readers import read_split
from data.structures import Fault
from engine.doors import (
    check_imgsz,
    check_names,
    check_thresholds,
    door,
    option_parser,
    parse_device,
    parse_options,
    printable,
)
from engine.evaluate import Asked
from engine.exported import file_to_measure, is_exported
from engine.tasks import check_data, check_given, task_of
from models.checkpoint import load_checkpoint, restore


@door
def main(argv: Sequence[str] | None = None) -> int:
    parser = option_parser(
        "Measures a trained network on a labelled data set: COCO's twelve numbers, top-1 and top-5, or mIoU; and each "
        "class."
    )
    parser.add_argument(
        "--weights", required=True, help="a checkpoint (.pt), or what export.py wrote of one (.onnx, .xml)"
    )
    parser.add_argument("--data", required=True, help="the data set's YAML")
    parser.add_argument("--split", "--task", default="val", choices=["train", "val", "test"], help="default: val")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--imgsz", "--img", type=int, help="pixels; default: what the network was trained with")
    parser.add_argument("--rect", action="store_true", help="pad images to rectangles instead of squares")
    parser.add_argument("--conf-thres", type=float, default=0.001, help="scores above this count")
    parser.add_argument("--iou-thres", type=float, default=0.6, help="NMS: boxes that overlap more are one object")
    parser.add_argument("--max-det", type=int, default=300, help="detections an image at most")
    parser.add_argument("--agnostic-nms", action="store_true", help="NMS: boxes of different classes compete too")
    parser.add_argument("--single-cls", action="store_true", help="take all classes for one, of data and detections")
    parser.add_argument(
        "--letterbox", default="centre", choices=["centre", "corner"], help="where in its square an image lies"
    )
    parser.add_argument("--half", action="store_true", help="compute in float16; needs a GPU")
    parser.add_argument("--device", default="", help="cpu, 0, cuda:1, mps; default: the first GPU, or the CPU")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--save-json", action="store_true", help="predictions.json, of a detector in COCO's format")
    parser.add_argument(
        "--save-txt", action="store_true", help="labels/*.txt in YOLO's format; of a segmenter labels/*.png"
    )
    parser.add_argument("--save-conf", action="store_true", help="with --save-txt: each line ends with its score")
    parser.add_argument("--noplots", action="store_true", help="draw no pictures")
    parser.add_argument("--project", default="runs/val", help="default: runs/val")
    parser.add_argument("--name", default="exp", help="folder in it; default: exp, then exp2, ...")
    parser.add_argument("--exist-ok", action="store_true", help="write into the folder if it exists")
    options = parse_options(parser, argv)
    check_thresholds(options.conf_thres, options.iou_thres, options.max_det)
    if options.batch_size < 1:
        raise Fault(f"--batch-size {options.batch_size}: must be at least 1")
    if options.workers < 0:
        raise Fault(f"--workers {options.workers}: must be at least 0")
    if options.save_conf and not options.save_txt:
        raise Fault("--save-conf: says what --save-txt writes; give both")
    device = parse_device(options.device)
    if options.half and device.type == "cpu":
        raise Fault("--half: half precision needs a GPU, and this is a CPU; leave --half out")

    network: Any = None
    if is_exported(options.weights):
        asked = {"imgsz": options.imgsz, "half": options.half, "rect": options.rect}
        checkpoint, network = file_to_measure(Path(options.weights), device, **asked)
    else:
        checkpoint = load_checkpoint(options.weights)
    task = task_of(checkpoint.spec)
    check_given(task, options, parser)
    data = read_data_spec(options.data)
    check_data(checkpoint.spec, data)
    if not options.single_cls:
        check_names(options.weights, checkpoint.names, options.data, data.names)
    network = (network or restore(checkpoint)).to(device)
    network = network.half() if options.half else network
    imgsz = check_imgsz(checkpoint.imgsz if options.imgsz is None else options.imgsz, network.max_stride)
    split = read_split(data, options.split)
    for note in split.notes:
        print(printable(note))
    task.validate(Asked(options, network, data, split, imgsz, device))
    return 0
