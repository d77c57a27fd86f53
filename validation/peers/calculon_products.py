#!/usr/bin/env python3
"""What Calculon's step table for products would say of the rows of gemm.csv.

Calculon (SC'23): time = FLOP / (peak * efficiency), efficiency a step function of the product's size;
of its A100: 0.95 above 128 GFLOP, 0.9 above 16, 0.6 above 1, else 0.1. The same steps are taken for
every device here, with the peak that the row was measured against: it has no table of them.

    validation/peers/calculon_products.py [FOLDER of published tables]
"""
import collections
import csv
import os
import statistics
import sys

KERNELS = ("GEMM", "matmul", "torch.mm", "torch.matmul")
STEPS = [(128e9, 0.95), (16e9, 0.9), (1e9, 0.6), (0.0, 0.1)]


def time_of(flop, peak):
    return flop / (peak * next(e for least, e in STEPS if flop >= least))


def main():
    default = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../../shared/reference")
    folder = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("PARTITA_REFERENCE", default)
    errors = collections.defaultdict(list)
    with open(os.path.join(folder, "gemm.csv"), newline="") as f:
        for row in csv.DictReader(f):
            if not row["kernel"].startswith(KERNELS) or row["from_memory"] == "yes":
                continue
            try:
                sizes = [float(row[c]) for c in ("m", "n", "k")]
                count = float(row["batch_or_groups"] or 1)
                peak, measured = float(row["peak_tflops_used"]) * 1e12, float(row["time_s"])
            except ValueError:
                continue
            flop = 2 * count * sizes[0] * sizes[1] * sizes[2]
            error = abs(time_of(flop, peak) / measured - 1)
            for key in (row["gpu"], "all"):
                errors[key].append(error)
    print(f"{'device':<16} {'rows':>5} {'median %':>9} {'95th percentile %':>18}")
    for device, e in errors.items():
        print(f"{device:<16} {len(e):>5} {100 * statistics.median(e):>9.1f}"
              f" {100 * sorted(e)[round(0.95 * (len(e) - 1))]:>18.1f}")


if __name__ == "__main__":
    main()
