#!/usr/bin/env python3
"""Checkpoints from and to Hugging Face folders: `megatron-jq convert`, for those who look for it where Megatron has it.

python tools/convert_checkpoint.py hf-to-megatron --hf DIR --save DIR
python tools/convert_checkpoint.py megatron-to-hf --load DIR --hf DIR
python tools/convert_checkpoint.py reshard --load DIR --save DIR --tensor-model-parallel-size 2
python tools/convert_checkpoint.py inspect --load DIR
"""

import sys

from megatron_jq import streams
from megatron_jq.cli.main import main

if __name__ == "__main__":
    streams.protect()
    sys.exit(main(["convert", *sys.argv[1:]]))
