"""Write a trained detector as a file that runs without this program, and check that it finds the same.

python export.py --weights runs/train/exp/best.pt --format onnx --nms
"""

from engine.export import main

if __name__ == "__main__":
    raise SystemExit(main())
