"""Is our Grad-CAM that of pytorch-grad-cam, and our increase in confidence too? And how long does measuring take?

python -m venv peers && peers/bin/python -m pip install grad-cam     # brings torch and torchvision
python bench/explain.py --peers peers/bin/python                     # under a minute
python bench/explain.py --seconds                                    # how long 420 images take, from 32 of them
python bench/explain.py --show                                       # the table of what was measured

The peer runs in the environment given by --peers and nothing of it is imported here. It makes torchvision's ResNet-18
with random weights and running statistics and explains the likeliest class of random images on layer1 to layer4: its
`GradCAM`, and its `IncreaseInConfidence` of the class's softmax on the images multiplied by these maps. Ours takes the
same weights by the road of `python -m models import` into cfg/models/resnet18.yaml, and the same images. Maps have to
be within 1e-3 of each other (they reach from 0 to 1; the peer adds 1e-7 to what it divides by), and decisions the same
but where the confidence changes by less than 1e-6. Exits with 1 where they are not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
IMGSZ, IMAGES, CLASSES = 96, 12, 21
ALLOWED_DIFFERENCE = 1e-3
UNDECIDED = 1e-6  # a confidence that changes by less may count as risen here and not there
SAMPLE, WHOLE = 32, 420  # images that are timed, and that the answer is given for


# ---- in the peer's environment


def run_peer(out: Path) -> None:
    """Writes weights, images, maps ``[4, N, H, W]``, increases and confidences ``[4, N]`` of the peer to a file."""
    import torch
    from torch import nn

    mend_torchvision()
    import torchvision
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.metrics.cam_mult_image import IncreaseInConfidence
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget, ClassifierOutputTarget

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=CLASSES).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (norm.bias.data, norm.running_mean):
                tensor.normal_(0, 0.1)
    coarse = torch.rand(IMAGES, 3, 8, 8)
    images = nn.functional.interpolate(coarse, size=(IMGSZ, IMGSZ), mode="bicubic").clamp(0, 1)
    with torch.no_grad():
        before = model(images).softmax(dim=1)
    labels = before.argmax(dim=1).tolist()
    maps, rises = [], []
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        with GradCAM(model=model, target_layers=[layer]) as cam:
            heat = cam(input_tensor=images, targets=[ClassifierOutputTarget(label) for label in labels])
        judged = IncreaseInConfidence()
        targets = [ClassifierOutputSoftmaxTarget(label) for label in labels]
        # (N, 1, H, W): it multiplies without broadcasting the channel itself
        rises.append(torch.from_numpy(judged(images, heat[:, None], targets, model)))
        maps.append(torch.from_numpy(heat))
    found = {"images": images, "labels": torch.tensor(labels), "maps": torch.stack(maps), "rises": torch.stack(rises)}
    torch.save(model.state_dict(), out)
    torch.save(found, out.with_suffix(".found"))


def mend_torchvision() -> None:
    """Beside another build of torch its compiled part is not found, and then importing it fails for want of two ops."""
    import torch

    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        KEPT.append(library)


KEPT: list[Any] = []  # what torch forgets with the object


# ---- here


def compared(python: str, folder: Path) -> list[dict[str, Any]]:
    """For each level the largest difference of the maps, and both increases in confidence in per cent."""
    import torch

    from data.structures import Fault
    from engine.explain_metrics import judge, sure
    from engine.heatmaps import answers, class_decisions, grad_cam, run_to_maps, spread
    from models.foreign import import_weights
    from models.levels import levels
    from models.parse import parse

    saved = folder / "resnet18.pth"
    done = subprocess.run([python, __file__, "--peer", saved], capture_output=True, text=True)
    if done.returncode:
        raise Fault(f"{python}: {done.stderr.strip().splitlines()[-1]}")
    theirs = torch.load(saved.with_suffix(".found"), weights_only=True)
    network = import_weights(saved, parse(ROOT / "cfg" / "models" / "resnet18.yaml"), normalization="none")[0]
    network.eval().requires_grad_(False)
    images, size = theirs["images"], (IMGSZ, IMGSZ)
    there = levels(network.graph)
    outputs, _, maps = run_to_maps(network, images, [level.row for level in there])
    boxes, scores = (y.detach() for y in answers(network, outputs, size))
    asked = class_decisions(scores[:, 0], boxes)
    assert torch.equal(asked.labels, theirs["labels"]), "other classes are the likeliest here"
    heat = grad_cam(network, outputs, maps, asked)
    before = sure(network, images, asked, IMAGES)
    rows = []
    for level, their_map, their_rise in zip(there, theirs["maps"], theirs["rises"], strict=True):
        ours = spread(heat[level.row], size)
        found = judge(network, images, asked, ours, before, batch_size=IMAGES)
        again = sure(network, images * ours[:, None], asked, IMAGES)
        clear = (again - before).abs() > UNDECIDED
        differs = int(((found["increase"] > 0) != (their_rise.flatten() > 0))[clear].sum())
        rows.append(
            {
                "level": level.name,
                "largest difference": float((ours - their_map).abs().max()),
                "IIC ours %": float(found["increase"].mean()),
                "IIC theirs %": 100 * float(their_rise.mean()),
                "decided otherwise": differs,
                "right": float((ours - their_map).abs().max()) <= ALLOWED_DIFFERENCE and not differs,
            }
        )
    return rows


def timed() -> dict[str, float]:
    """Seconds that the numbers of `WHOLE` images take on this machine, by what is measured; ResNet-18-FPN at 128 px."""
    import cv2
    import numpy as np
    import torch

    from data.structures import Sample
    from engine.explain import Question, measure
    from models.levels import levels
    from models.network import build
    from models.parse import parse

    torch.manual_seed(0)
    network = build(parse(ROOT / "cfg" / "models" / "resnet18-fpn-cls.yaml")).eval().requires_grad_(False)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        samples = []
        for number in range(SAMPLE):
            file = Path(folder) / f"{number}.png"
            cv2.imwrite(str(file), np.random.default_rng(number).integers(0, 255, (256, 256, 3), np.uint8))
            samples.append(Sample(file, np.array([[0, 0, 256, 256]], np.float32), np.array([0])))
        names = [str(label) for label in range(network.num_classes)]
        for steps in (0, 5):
            start = time.perf_counter()
            measure(network, samples, names, 128, Question(steps=steps), levels(network.graph))
            found[f"steps {steps}"] = (time.perf_counter() - start) * WHOLE / SAMPLE
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="the python of an environment with grad-cam and torchvision")
    parser.add_argument("--seconds", action="store_true", help="how long measuring takes on this machine")
    parser.add_argument("--out", type=Path, default=RESULTS / "explain.json", help="where the result goes")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        run_peer(options.peer)
        return 0
    sys.path.insert(0, str(ROOT))
    from engine.runs import table, write_text

    if options.seconds:
        for name, seconds in timed().items():
            print(f"{name}: {seconds:.0f} s for {WHOLE} images of 128 px")
        return 0
    if not options.show:
        if not options.peers:
            parser.error("--peers, --seconds or --show is needed")
        with tempfile.TemporaryDirectory() as folder:
            rows = compared(options.peers, Path(folder))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(rows, indent=1) + "\n")
    rows = json.loads(options.out.read_text())
    shown = [{**row, "largest difference": f"{row['largest difference']:.1e}"} for row in rows]
    print(table([list(row.values()) for row in shown], list(shown[0])))
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
