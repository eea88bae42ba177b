"""Find objects in images and videos.

python detect.py --weights runs/train/exp/best.pt --source images/
"""

from engine.infer import main

if __name__ == "__main__":
    raise SystemExit(main())
