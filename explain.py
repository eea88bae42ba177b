"""Show what a network looks at, level by level, and measure how well that explains its decisions.

python explain.py --weights runs/train/exp/best.pt --source images/
"""

from engine.explain import main

if __name__ == "__main__":
    raise SystemExit(main())
