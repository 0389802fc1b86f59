#!/usr/bin/env bash
# Train an expert on one machine, a process a GPU. Run it again after whatever stopped it: it goes on from its last
# checkpoint, and of a finished run it gives the result.
set -euo pipefail

ANCHOR=./anchor            # fill in: the anchor, a directory or hf://OWNER/NAME
DATA=./corpus              # fill in: your text
NAME=law                   # fill in: what the expert is called
PROCESSES=4                # fill in: GPUs of this machine; 1 needs no torchrun

# What it will take, and whether it fits: flexctl train-expert --anchor "$ANCHOR" --data "$DATA" --plan
# An anchor in several processes likewise, with these arguments:
#   -m flexctl init-anchor ./OLMo-2-1B --data ./public --anneal-tokens 100000000 --output ./anchor --resume
exec torchrun --standalone --nproc-per-node "$PROCESSES" -m flexctl train-expert \
  --anchor "$ANCHOR" \
  --data "$DATA" \
  --name "$NAME" \
  --output "$NAME.st" \
  --micro-batch "$PROCESSES" \
  --dtype bfloat16 \
  --resume
