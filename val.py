"""Measure a trained detector on a labelled data set.

python val.py --weights runs/train/exp/best.pt --data cfg/data/shapes.yaml
"""

from engine.validate import main

if __name__ == "__main__":
    raise SystemExit(main())
