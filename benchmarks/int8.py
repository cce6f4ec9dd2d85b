"""Does the toy's student end as good on int8 features as on bfloat16: `python -m benchmarks.int8 FOLDER`.

One world, two caches, a run of train.py for each and every seed; FOLDER keeps what is done, so the command can be
repeated (`--runs 1` does one more run and stops). Writes int8.json beside this file once all runs are there.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import amoe
import data
import evaluate
import toy
import train

HERE = Path(__file__).parent


def caches(folder):
    """({dtype: Cache}, world), written where they are not there yet."""
    world = toy.World(folder / "toy", 5000)
    oracles = [toy.TextOracle(world), toy.DenseOracle(world)]
    images = world.write()
    return {t: data.cache(images, oracles, folder / t, max_tokens=64, dtype=t) for t in ("int8", "bf16")}, world


def scores(cache, world, out, seed):
    """The student's scores at the end of a run, and its last losses."""
    model = train.build(train.Flags(seed=seed), cache.spaces, torch.device("cpu"))
    amoe.load_exactly(model, torch.load(train.checkpoints(out)[-1], weights_only=True)["model"], out)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines[-5:]]
    return evaluate.toy_scores(world, cache, {"student": evaluate.of_student(model)})["student"] | {
        "loss": statistics.mean(losses)
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1000, help="runs to do before stopping")
    flags = parser.parse_args()
    stored, world = caches(flags.folder)
    done, left = {}, flags.runs
    for seed in range(flags.seeds):
        for dtype, cache in stored.items():
            out = flags.folder / f"{dtype}-{seed}"
            if not (out / "scores.json").exists():
                if left == 0:
                    return
                left -= 1
                words = ["--cache", cache.path, "--seed", seed, "--out", out, "--no-evaluate", "--overwrite"]
                subprocess.run([sys.executable, HERE.parent / "train.py", *map(str, words)], check=True)
                (out / "scores.json").write_text(json.dumps(scores(cache, world, out, seed)))
            done.setdefault(dtype, []).append(json.loads((out / "scores.json").read_text()))
    text = {"n": flags.seeds, "torch": torch.__version__, "snr_db": data.signal_to_noise(stored["int8"])}
    for dtype, runs in done.items():
        text[dtype] = {
            key: {"mean": statistics.mean(r[key] for r in runs), "std": statistics.stdev(r[key] for r in runs)}
            for key in runs[0]
        }
    text["difference"] = {
        key: {
            "mean": statistics.mean(a[key] - b[key] for a, b in zip(done["int8"], done["bf16"], strict=True)),
            "std": statistics.stdev(a[key] - b[key] for a, b in zip(done["int8"], done["bf16"], strict=True)),
        }
        for key in done["int8"][0]
    }
    (HERE / "int8.json").write_text(json.dumps(text, indent=1) + "\n")
    print(json.dumps(text, indent=1))


if __name__ == "__main__":
    main()
