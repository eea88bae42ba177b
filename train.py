"""Train a detector.

python train.py --cfg cfg/models/tiny.yaml --data cfg/data/shapes.yaml --epochs 50 --imgsz 320
python train.py --resume runs/train/exp
"""

import sys

from engine.train import main

if __name__ == "__main__":
    sys.exit(main())
