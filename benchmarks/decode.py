"""How fast the Pillow of this interpreter decodes: `python -m benchmarks.decode FOLDER [--draft]`, a JSON line.

To hold pillow-simd against Pillow, run it by two environments in turns, six times each; images per second of CPU time,
so that other work on the machine counts little. benchmarks/decode.json keeps the lines.
"""

import argparse
import json
import time
from pathlib import Path

import PIL
import torch

from images import load_image


def decode_all(paths, draft):
    """The number of images that can be decoded, each brought to 256 patches at most."""
    good = 0
    for path in paths:
        try:
            load_image(path, max_tokens=256, draft=draft)
            good += 1
        except ValueError:  # smaller than a patch
            pass
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--draft", action="store_true", help="as training data are decoded (JPEG)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    paths = sorted(p for p in Path(args.folder).rglob("*") if p.suffix in (".png", ".jpg"))
    decode_all(paths, args.draft)
    began = time.process_time()
    n = decode_all(paths, args.draft)
    rate = n / (time.process_time() - began)
    print(json.dumps({"pillow": PIL.__version__, "draft": args.draft, "images": n, "images_per_cpu_s": rate}))


if __name__ == "__main__":
    main()
