"""How fast the Pillow of this interpreter decodes: `python -m benchmarks.decode FOLDER [--draft]`, a JSON line.

To hold pillow-simd against Pillow, run it by two environments in turns, six times each; images per second of CPU time,
so that other work on the machine counts little. benchmarks/decode.json keeps the lines.
"""

import argparse
import contextlib
import json
import time
from pathlib import Path

import PIL
import torch

from images import load_image

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--draft", action="store_true", help="as training data are decoded (JPEG)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    paths = sorted(path for path in Path(args.folder).rglob("*") if path.suffix in (".png", ".jpg"))
    for _ in range(2):  # the first time finds the files' pages
        began, n = time.process_time(), 0
        for path in paths:
            with contextlib.suppress(ValueError):  # smaller than a patch
                load_image(path, max_tokens=256, draft=args.draft)
                n += 1
    rate = n / (time.process_time() - began)
    print(json.dumps({"pillow": PIL.__version__, "draft": args.draft, "images": n, "images_per_cpu_s": rate}))
