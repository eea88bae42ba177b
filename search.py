"""Search the best subnets of a YAML with open choices.

python search.py --cfg cfg/models/tiny-search.yaml --data cfg/data/shapes.yaml --imgsz 320 --budget macs=900M
"""

import sys

from search.run import main

if __name__ == "__main__":
    sys.exit(main())
