#!/usr/bin/env python3
"""Is what we execute on a GPU worth predicting? Two checks (docs/cuda.md, "Speed"), each exits 1 where one falls short.

  validation/gpu/speed.py memory DEVICE_YAML [--bound 0.85] [--least BYTES]
  validation/gpu/speed.py products PARTITA [--bound 1.05]

memory: of a profile that calibrate wrote, every kernel that only moves memory: the time of a copy of as many bytes (between two
copies' times where there is none) over that of its largest point. Points below --least bytes (default: 128 MB, more than twice an H200's cache) say nothing; a kernel without one is named, and
one that every calibration has is missed: exit code 2.
products: a replay of layers of hidden size 8192 whose products time as many of cuBLASLt's algorithms as there are; the time of the fastest of those that are
timed unless told otherwise, product by product, over the fastest of all, from the same passes; one that was not timed falls short. Exit code 2 where nothing can be compared.
"""
import argparse
import json
import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "ns": 1e-9}
MOVES = ("activation", "add", "add_bias forward", "cross_entropy", "dropout", "embedding forward", "gated_activation", "normalize data",
         "normalize forward", "optimizer", "rotary", "scale", "square_sum", "unscale", "zero")
# What a calibration, if it came to its end, has at a size that says something.
ALWAYS = ("activation data", "activation forward", "add", "cross_entropy data", "cross_entropy forward", "embedding forward",
          "gated_activation data", "gated_activation forward", "normalize data layer", "normalize data rms", "normalize forward layer",
          "normalize forward rms", "optimizer adam", "rotary data", "rotary forward", "zero")
# Sums over rows by several kernels, and what needs the host.
NOT = ("part", "of rows", "statistic", "batch")


def kernels_of(text):
    """Kernel: (bytes, seconds) of each point of one rank; and the rate of the largest copy, B/s."""
    copy = re.search(r"^memory_bandwidth: \{value: ([\d.]+) (TB|GB)/s, source: '?measured.*copy", text, re.M)
    rate = float(copy[1]) * {"TB": 1e12, "GB": 1e9}[copy[2]] if copy else None
    found, kernel = {}, None
    for line in text.split("\n"):
        if head := re.match(r"  '(.+)':$", line):
            kernel = head[1]
        elif not line.startswith(" "):
            kernel = None
        point = re.match(r"    - \{ranks: 1, bytes: (\d+) B, time: ([\d.e+-]+) (\w+)", line)
        if kernel and point:
            found.setdefault(kernel, []).append((float(point[1]), float(point[2]) * UNITS[point[3]]))
    return found, rate


def is_one(name, kinds):
    """By whole words: "add" is no "add_bias"."""
    return any(name == kind or name.startswith(kind + " ") for kind in kinds)


def copy_time(copies, size):
    """A straight line between two copies; beyond the largest at its rate."""
    below = [c for c in copies if c[0] <= size]
    above = [c for c in copies if c[0] > size]
    if not below or not above:
        bytes_, time = (below or above)[-1 if below else 0]
        return time * max(1, size / bytes_)
    (b0, t0), (b1, t1) = below[-1], above[0]
    return t0 + (t1 - t0) * (size - b0) / (b1 - b0)


def memory(o):
    found, rate = kernels_of(open(o.device).read())
    if not rate or "copy" not in found:
        return {"error": f"{o.device} has no memory_bandwidth that a copy was measured for"}, 2
    copies = sorted(found["copy"])
    result = {"schema": "partita.speed/1", "copy_GBps": rate / 1e9, "bound": o.bound, "kernels": {}, "too small": []}
    for name, points in sorted(found.items()):
        if not is_one(name, MOVES) or any(word in name for word in NOT):
            continue
        size, time = max(points)
        if size < o.least:
            result["too small"].append(name)
            continue
        result["kernels"][name] = {"bytes": size, "share": copy_time(copies, size) / time}
    slow = [n for n, k in result["kernels"].items() if k["share"] < o.bound]
    result["below"] = slow
    result["missing"] = [a for a in ALWAYS if not any(is_one(n, (a,)) for n in result["kernels"])]
    return result, 2 if result["missing"] else 1 if slow else 0


def products(o):
    command = [o.partita, "replay", os.path.join(HERE, "gpt-8192.yaml"), "dgx-h200:1 gpus", "--dp", "1", "--backend", "cuda",
               "--precision", "bf16", "--micro-batch", "1", "--global-batch", "1", "--layers", "1", "--steps", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, PARTITA_CUDA_CANDIDATES="64"))
    if done.returncode != 0:
        return {"error": f"{' '.join(command)}: {done.stderr.strip()[-500:]}"}, 2
    run = json.loads(done.stdout)
    result = {"schema": "partita.speed/1", "bound": o.bound, "conditions": run.get("conditions"), "products": [], "not timed": []}
    for p in run["products"]:
        which = {k: p[k] for k in ("m", "n", "k", "batch", "transposed", "type", "out", "adds")}
        if not p["seconds"] or not p["seconds_of_usual"]:  # no room to time it, or one algorithm alone
            result["not timed"].append(which)
            continue
        result["products"].append(dict(which, best=p["algorithm"], of=p["candidates"], seconds=p["seconds"],
                                       ratio=p["seconds_of_usual"] / p["seconds"]))
    slow = [p for p in result["products"] if p["ratio"] > o.bound]
    # Of those by data, which add where several read one input, and of those by weight (TN) there is one at least: else the check
    # says nothing of a third of the work.
    all_passes = any(p["adds"] for p in result["products"]) and any(p["transposed"] == "TN" for p in result["products"])
    return result, 2 if not all_passes else 1 if slow or result["not timed"] else 0


def main():
    parser = argparse.ArgumentParser()
    kinds = parser.add_subparsers(dest="what", required=True)
    m = kinds.add_parser("memory")
    m.add_argument("device")
    m.add_argument("--bound", type=float, default=0.85)
    m.add_argument("--least", type=float, default=128e6)
    p = kinds.add_parser("products")
    p.add_argument("partita")
    p.add_argument("--bound", type=float, default=1.05)
    o = parser.parse_args()
    result, code = memory(o) if o.what == "memory" else products(o)
    print(json.dumps(result, indent=2))
    sys.exit(code)


main()
