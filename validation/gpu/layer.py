#!/usr/bin/env python3
"""A GPT layer's forward and backward, h = 8192, s = 4096, bf16: ours beside PyTorch's on one GPU.

  validation/gpu/layer.py PARTITA [--bound 1.10]

Ours: a whole step of `partita replay` of 3 layers less one of 1, halved, so that embedding, head
and loss are out of it, less the optimizer's kernels, so halved; gradients are bf16, as PyTorch's are. PyTorch's: the same layer
(layer norms, biases, GELU by erf, causal attention), eager, fused attention where it has one for
this GPU, else its mathematics; each kind that runs is timed and the fastest counts. Prints JSON;
exit code 1 where ours takes more than `bound` times PyTorch's, 2 where one of them cannot be timed.
"""
import argparse
import json
import os
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
HIDDEN, HEADS, SEQUENCE = 8192, 64, 4096


def ours(partita, layers):
    command = [partita, "replay", os.path.join(HERE, "gpt-8192.yaml"), "dgx-h200:1 gpus", "--dp", "1",
               "--backend", "cuda", "--set", "precision={base: bf16, gradients: bf16}", "--micro-batch", "1", "--global-batch", "1",
               "--layers", str(layers), "--steps", "10", "--warm-up", "5", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
    result = json.loads(done.stdout)
    kinds = {k["kind"]: k["measured_s"] for k in result["kinds"]}
    # What explains a figure afterwards.
    about = {k: result.get(k) for k in ("device", "host_kernels", "conditions", "no_kernel_times", "steps_s", "products")}
    return kinds, result["steps_s"]["plain"], dict(about, said=done.stderr.strip()[-500:])


def of_layer(kind):
    return any(word in kind for word in (" forward", " backward", " data", " weight", " statistic")) or kind in ("add", "zero")


def layer_of_ours(partita):
    one, of_one, _ = ours(partita, 1)
    three, of_three, about = ours(partita, 3)
    kinds = {k: (t - one.get(k, 0)) / 2 for k, t in three.items()}
    others = sum(t for k, t in kinds.items() if not of_layer(k))
    return dict(about, seconds=(of_three - of_one) / 2 - others, not_counted=others, kinds=dict(sorted(kinds.items(), key=lambda x: -x[1])))


def clocks():
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=10)
        return done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as e:
        return str(e)


def pytorch():
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(HIDDEN) for _ in range(2)])
            self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
            self.out = nn.Linear(HIDDEN, HIDDEN)
            self.up = nn.Linear(HIDDEN, 4 * HIDDEN)
            self.down = nn.Linear(4 * HIDDEN, HIDDEN)

        def forward(self, x):
            b, s, h = x.shape
            q, k, v = (t.view(b, s, HEADS, h // HEADS).transpose(1, 2) for t in self.qkv(self.norms[0](x)).split(h, 2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(b, s, h))
            return x + self.down(F.gelu(self.up(self.norms[1](x))))

    torch.manual_seed(1)
    with torch.device("cuda"):  # drawing 805 million numbers takes a host seconds
        layer = Layer().to(torch.bfloat16)
    x = torch.randn(1, SEQUENCE, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)

    def step():
        layer(x).backward(dy)
        for p in layer.parameters():
            p.grad = None
        x.grad = None

    def timed():
        # To the clock that it has under load, as ours before it is timed.
        start = time.monotonic()
        while time.monotonic() - start < 1:
            step()
            torch.cuda.synchronize()
        times = []
        for _ in range(20):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            step()
            b.record()
            b.synchronize()
            times.append(a.elapsed_time(b) * 1e-3)
        after.append(clocks())
        return sorted(times)[len(times) // 2]

    found, after = {}, []
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        kinds = {n: getattr(SDPBackend, n) for n in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
                 if hasattr(SDPBackend, n)}
    except ImportError:  # before 2.3
        kinds = {}
        found["default"] = timed()
    for kind, backend in kinds.items():
        try:
            with sdpa_kernel(backend):
                found[kind.lower()] = timed()
        except Exception as e:  # noqa: BLE001: a kind that this GPU or build has not
            found[kind.lower()] = None
            print(f"{kind}: {str(e).splitlines()[0][:200]}", file=sys.stderr)
    fused = {k: t for k, t in found.items() if t is not None and k != "math"}
    best = min((fused or {k: t for k, t in found.items() if t is not None}).items(), key=lambda x: x[1])
    return {"seconds": best[1], "attention": best[0], "all": found, "version": torch.__version__,
            "clock, power, temperature": after}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("partita")
    parser.add_argument("--bound", type=float, default=1.10)
    parser.add_argument("--only-ours", action="store_true", help="for a look at our kernels: exit code 0 if they ran")
    o = parser.parse_args()
    result = {"schema": "partita.layer/1", "hidden": HIDDEN, "sequence": SEQUENCE, "bound": o.bound}
    runs = [("partita", lambda: layer_of_ours(o.partita))] + ([] if o.only_ours else [("pytorch", pytorch)])
    for name, run in runs:
        try:
            result[name] = run()
        except Exception as e:  # noqa: BLE001: the other is timed all the same
            result[name] = {"error": f"{type(e).__name__}: {e}"}
        # Whatever ends this, what was measured is there.
        print(json.dumps({name: result[name]}), file=sys.stderr, flush=True)
    code = 0 if o.only_ours and "seconds" in result["partita"] else 2
    if not o.only_ours and all("seconds" in result[n] for n in ("partita", "pytorch")):
        result["ratio"] = result["partita"]["seconds"] / result["pytorch"]["seconds"]
        code = 0 if result["ratio"] <= o.bound else 1
    print(json.dumps(result, indent=2))
    sys.exit(code)


main()
