#!/bin/sh
# All that needs a GPU, in one run: the captured step gives the same tokens; the published shape of the 7B beside
# transformers; how its cost grows; 8 and 4 bits. From the repository's root, with a CUDA build of PyTorch: sh bench/gpu.sh
set -eu
python -m pytest -q tests/test_step.py
python -m bench --dtype float32 --repeats 3 --json bench/gpu-tiny.json
python -m bench --shape 7b --dtype bfloat16 --repeats 3 --json bench/gpu-7b.json
python -m bench --shape 7b --dtype bfloat16 --repeats 1 --curves --json bench/gpu-7b-curves.json
python -m bench --shape 7b --dtype bfloat16 --repeats 3 --quantize int8 int4 --json bench/gpu-7b-small.json
