"""What the parts of a CA-block detector cost: one model file for each neck and head that is compared.

python bench/necks.py                                                  # the table of all of them
python bench/necks.py --cfg cfg/models/effb0-ca-ssd.yaml --nc 3 --out runs/necks       # and their YAMLs, to train

All are derived from one file, by what a row of it could say as well: `NECKS` names the changes. They answer
- whether the gates pay: both, one, or none of them (`full`, `channel`, `spatial`, `none`);
- whether the block pays: against depth-wise separable convolutions of its width, and of the width that needs as many
  multiply-adds (`separable`, `wide-separable`);
- whether fusing levels pays: not at all, from coarse to fine, and back as well (`fusion-off`, `fusion-up`, `full`);
- what the head is worth on this neck: SSD's priors, priors fitted to the training boxes (`kmeans`), and `Detect`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from engine.runs import table, write_text  # noqa: E402
from models.cost import network_costs, totals  # noqa: E402
from models.graph import normalize, resolve  # noqa: E402
from models.parse import dump, parse  # noqa: E402
from models.registry import OPS  # noqa: E402
from models.spec import LayerSpec, ModelSpec  # noqa: E402

CFG = ROOT / "cfg" / "models" / "effl0-ca-ssd.yaml"
BLOCKS = ("CABlock", "UpFusion", "DownFusion")
NECKS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "channel": {"attention": "channel"},
    "spatial": {"attention": "spatial"},
    "none": {"attention": "none"},
    "separable": {"attention": "none", "expand": 1},
    "wide-separable": {"attention": "none", "expand": 1, "width": 256},  # within 1 % of full's at 384 px
    "fusion-up": {"leave_out": ("DownFusion",)},
    "fusion-off": {"leave_out": ("DownFusion", "UpFusion")},
    "kmeans": {"head": "SSDHead", "anchors": 5},
    "detect": {"head": "Detect", "anchors": 3},
}


def neck(spec: ModelSpec, name: str) -> ModelSpec:
    """The model of a name of `NECKS`, from one whose rows are those of effb0-ca-ssd.yaml."""
    changes = dict(NECKS[name])
    spec = without(spec, changes.pop("leave_out", ()))
    head, anchors, width = (changes.pop(key, None) for key in ("head", "anchors", "width"))

    def changed(row: LayerSpec) -> LayerSpec:
        given = dict(OPS[row.op].signature.bind(*row.args, **row.kwargs).arguments)
        if row.op in BLOCKS:
            given |= changes
        if width and row.section == "head" and "c_out" in given:
            given["c_out"] = width
        if head and OPS[row.op].is_head:
            given = {"num_classes": "nc", "anchors": "anchors"}
        return replace(row, op=head if head and OPS[row.op].is_head else row.op, args=(), kwargs=given)

    rows = tuple(changed(row) for row in spec)
    return normalize(replace(spec, name=f"{spec.name}-{name}", layers=rows, anchors=anchors or spec.anchors))


def without(spec: ModelSpec, ops: tuple[str, ...]) -> ModelSpec:
    """`spec` without the rows of some ops. Who read such a row reads its second source: the level that it refined."""
    nodes = resolve(spec).nodes

    def behind(source: int) -> int:
        return behind(nodes[source].sources[1]) if source >= 0 and nodes[source].op.name in ops else source

    kept = [node for node in nodes if node.op.name not in ops]
    place = {-1: -1} | {node.index: at for at, node in enumerate(kept)}
    rows = [replace(node.layer, sources=tuple(place[behind(source)] for source in node.sources)) for node in kept]
    return replace(normalize(spec), layers=tuple(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", type=Path, default=CFG)
    parser.add_argument("--imgsz", type=int, default=384)
    parser.add_argument("--nc", type=int, help="classes; default: those of the file")
    parser.add_argument("--out", type=Path, help="folder for the YAMLs")
    options = parser.parse_args()
    spec = parse(options.cfg)
    spec = replace(spec, num_classes=options.nc or spec.num_classes)
    rows = []
    for name in tqdm(NECKS, leave=False):
        derived = neck(spec, name)
        params, macs = totals(network_costs(resolve(derived), options.imgsz))
        rows.append([name, f"{params:,}", macs / 1e9])
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            write_text(options.out / f"{derived.name}.yaml", dump(derived))
    print(table(rows, ["neck", "parameters", f"GMACs at {options.imgsz} px"]))


if __name__ == "__main__":
    main()
