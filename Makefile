# Two commands on a fresh machine: `make demo` and `make test`. Each first makes the environment that it needs.

VENV    ?= .venv
EXTRAS  ?= dev,fast,export,search
WORKERS ?= 2
PYTHON  ?=

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip
# installed: newer than setup.cfg and constraints.txt when there is nothing to install.
# headless: there when opencv-python cannot be loaded here for want of system libraries.
INSTALLED := $(VENV)/installed
HEADLESS  := $(VENV)/headless

# The demo: small enough for a laptop without a GPU.
DEMO                := runs/demo
DEMO_DATA           := datasets/shapes
DEMO_CFG            := cfg/models/tiny-search.yaml
DEMO_IMGSZ          := 160
DEMO_BUDGET         := macs=250M
DEMO_SEARCH_EPOCHS  := 3
DEMO_RETRAIN_EPOCHS := 18
DEMO_CANDIDATES     := 6
# Without strong augmentation: a run of minutes sees every image a few times only.
DEMO_RECIPE         := --batch-size 4 --optimizer AdamW --lr0 0.004 --imgsz $(DEMO_IMGSZ) --mosaic 0 --scale 0.1 \
                       --hsv-h 0 --hsv-s 0 --hsv-v 0 --cls 2.5 --amp off

# Programs that benches are held against, each in its own place. make bench does without those that are not there.
PEERS := runs/peers
PEERS_PYTHON := $(PEERS)/python/bin/python

.PHONY: help .venv test lint demo bench peers clean
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z.]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

.venv: $(INSTALLED)  ## the environment, in .venv

# What setup.cfg asks for, one requirement a line.
REQUIREMENTS = $(PY) -c 'import configparser; c = configparser.ConfigParser(); c.read("setup.cfg"); \
	print(c["options"]["install_requires"], *(c["options.extras_require"][e] for e in "$(EXTRAS)".split(",")))'

$(INSTALLED): setup.cfg constraints.txt
	@[ -x $(PY) ] || { \
	    for python in $(PYTHON) python3.13 python3.12 python3.11 python3 none; do \
	        "$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	    done; \
	    [ "$$python" != none ] || { echo "No Python >= 3.11 with venv was found; install one," \
	        "or name it: make .venv PYTHON=/path/to/python" >&2; exit 1; }; \
	    "$$python" -m venv $(VENV); }
	@[ -e $(HEADLESS) ] || $(PIP) install -c constraints.txt -e '.[$(EXTRAS)]'
	@[ -e $(HEADLESS) ] || $(PY) -c 'import cv2' 2>/dev/null || { \
	    echo "opencv-python cannot be loaded here: opencv-python-headless takes its place."; \
	    $(PIP) uninstall -y opencv-python && touch $(HEADLESS); }
	@[ ! -e $(HEADLESS) ] || { $(PIP) install --no-deps -e . && \
	    $(PIP) install -c constraints.txt $$($(REQUIREMENTS) | sed 's/opencv-python/&-headless/'); }
	@$(PY) -c 'import cv2, torch'
	@touch $@

test: $(INSTALLED)  ## the tests; one thread a worker, set in tests/conftest.py
	$(PY) -m pytest -q -n $(WORKERS)

lint: $(INSTALLED)  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

demo: $(INSTALLED)  ## draw a data set, search, derive, retrain, detect
	rm -rf $(DEMO)
	$(PY) -m data shapes $(DEMO_DATA)
	$(PY) search.py --cfg $(DEMO_CFG) --data $(DEMO_DATA)/data.yaml --supernet shared \
	    --budget $(DEMO_BUDGET) --candidates $(DEMO_CANDIDATES) --epochs $(DEMO_SEARCH_EPOCHS) $(DEMO_RECIPE) \
	    --project $(DEMO) --name search
	$(PY) train.py --cfg $(DEMO)/search/best.yaml --weights $(DEMO)/search/best.pt --data $(DEMO_DATA)/data.yaml \
	    --epochs $(DEMO_RETRAIN_EPOCHS) $(DEMO_RECIPE) --noval --project $(DEMO) --name train
	$(PY) detect.py --weights $(DEMO)/train/best.pt --source $(DEMO_DATA)/images/val --project $(DEMO) --name images
	$(PY) detect.py --weights $(DEMO)/train/best.pt --source $(DEMO_DATA)/video.mp4 --project $(DEMO) --name video
	$(PY) val.py --weights $(DEMO)/train/best.pt --data $(DEMO_DATA)/data.yaml
	@echo
	@echo "the search, as a page     $(DEMO)/search/report.html"
	@echo "the front of subnets      $(DEMO)/search/front.png"
	@echo "how the training went     $(DEMO)/train/results.png"
	@echo "boxes on images           $(DEMO)/images/"
	@echo "boxes on a video          $(DEMO)/video/video.mp4"
	@echo "the detector              $(DEMO)/train/best.pt, described by $(DEMO)/search/best.yaml"

bench: $(INSTALLED)  ## the claims of speed, sized for an hour; writes bench/RESULTS.md. KEEP=yes keeps what was measured
	$(PY) bench/report.py --measure $(if $(KEEP),--keep)

# Cloning and installing need a network. What could not be had is said in a line, and make bench says so again.
peers: $(INSTALLED)  ## the programs that benches are held against, into runs/peers
	@mkdir -p $(PEERS)
	@[ -x $(PEERS_PYTHON) ] || $(PY) -m venv $(PEERS)/python
	@$(PEERS_PYTHON) -m pip install -q -c constraints.txt -r bench/peers.txt \
	    && $(PEERS_PYTHON) -m pip install -q --no-deps ultralytics==8.4.190 'setuptools<81' \
	    || { rm -rf $(PEERS)/python; echo "peers: packages could not be installed; is there a network?"; }
	@[ -d $(PEERS)/yolov5 ] || git clone -q --depth 1 --branch v7.0 \
	    https://github.com/ultralytics/yolov5 $(PEERS)/yolov5 || echo "peers: yolov5 could not be cloned"
	@[ -d $(PEERS)/ScaledYOLOv4 ] || git clone -q --depth 1 --branch yolov4-large \
	    https://github.com/WongKinYiu/ScaledYOLOv4 $(PEERS)/ScaledYOLOv4 || echo "peers: ScaledYOLOv4 could not be cloned"

clean:  ## remove the environment and caches; runs/ and datasets/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
