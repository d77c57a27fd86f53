"""Trains networks that a test has written down, operator by operator, with PyTorch.
usage: network.py FILE.json   prints losses, gradients, parameters and step times of each as JSON."""
import json
import math
import sys
import tempfile
import time

import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F

torch.set_default_dtype(torch.float64)


def gelu(x):
    """In fp32 with erf of the double, rounded: PyTorch's vectorised one (Abramowitz and Stegun 7.1.26) is near 0 as far
    off as 1 is rounded, not as its result, and would be the comparison's largest error."""
    if x.dtype != torch.float32:
        return F.gelu(x)
    return 0.5 * x * (1 + torch.erf(x.double() / math.sqrt(2)).float())


def activation(kind, x):
    return {
        "relu": F.relu,
        "squared_relu": lambda v: F.relu(v) ** 2,
        "gelu": gelu,
        "gelu_tanh": lambda v: 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
        "silu": F.silu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }[kind](x)


def normalize(op, x, params):
    params = list(params)
    weight = params.pop(0) if op["scale"] else None
    bias = params.pop(0) if op["bias"] else None
    if op["kind"] == "batch":
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=op["epsilon"])
    if op["kind"] == "local":
        return F.local_response_norm(x, op["window"], op["alpha"], op["beta"], op["offset"])
    shape = x.shape
    if op["group"]:
        x = x.reshape(*shape[:-1], shape[-1] // op["group"], op["group"])
    if op["kind"] == "layer":
        y = F.layer_norm(x, x.shape[-1:], weight, bias, op["epsilon"])
    else:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + op["epsilon"])
        y = y * weight if weight is not None else y
        y = y + bias if bias is not None else y
    return y.reshape(shape)


def turns(op, positions):
    """Cosines and sines [position, rotated / 2], in double: angles are no part of the arithmetic compared."""
    position = torch.arange(positions, dtype=torch.float64)
    frequency = op["base"] ** (-torch.arange(0, op["rotated"], 2, dtype=torch.float64) / op["rotated"])
    angle = torch.outer(position, frequency)
    return angle.cos(), angle.sin()


def rotary(op, x):
    shape = x.shape
    d, r = op["head_dim"], op["rotated"]
    x = x.reshape(shape[0], shape[1], -1, d)
    cosine, sine = (torch.cat([t, t], -1)[None, :, None, :].to(x.dtype) for t in turns(op, shape[1]))
    still, turned = x[..., : d - r], x[..., d - r :]
    half = torch.cat([-turned[..., r // 2 :], turned[..., : r // 2]], -1)
    return torch.cat([still, turned * cosine + half * sine], -1).reshape(shape)


def hidden_keys(op, queries, keys):
    """[query, key]: what a query does not see."""
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    hidden = torch.zeros(queries, keys, dtype=torch.bool)
    if op["causal"]:
        hidden |= j > i
    if op["window"]:
        hidden |= j <= i - op["window"]
    return hidden


def attention(op, q, k, v, params):
    b, s, h, _ = q.shape
    g, d = op["queries_per_head"], op["qk_dim"]
    q = q.reshape(b, s, h * g, d).transpose(1, 2)
    k = k.transpose(1, 2).repeat_interleave(g, 1)
    v = v.transpose(1, 2).repeat_interleave(g, 1)
    scores = q @ k.transpose(-1, -2) * (op["scale"] or 1 / math.sqrt(d))
    scores = scores.masked_fill(hidden_keys(op, s, k.shape[2]), -math.inf)
    if op["sinks"]:
        sinks = params[0].reshape(1, h * g, 1, 1).expand(b, -1, s, 1)
        p = torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
    else:
        p = torch.softmax(scores, -1)
    return (p @ v).transpose(1, 2).reshape(b, s, h, g * op["v_dim"])


def pad(x, op, value):
    h, w = op["height"], op["width"]
    return F.pad(x, (w["before"], w["after"], h["before"], h["after"]), value=value)


def convolution(op, x, params):
    h, w = op["height"], op["width"]
    return F.conv2d(pad(x, op, 0.0), params[0], params[1] if op["bias"] else None, (h["stride"], w["stride"]), 0,
                    (h["dilation"], w["dilation"]), op["groups"])


def pool(op, x):
    h, w = op["height"], op["width"]
    kernel, stride = (h["kernel"], w["kernel"]), (h["stride"], w["stride"])
    if op["maximum"]:
        return F.max_pool2d(pad(x, op, -math.inf), kernel, stride, 0, (h["dilation"], w["dilation"]))
    assert op["count_padding"] or h["before"] + h["after"] + w["before"] + w["after"] == 0
    if h["dilation"] * w["dilation"] > 1:
        # avg_pool2d knows no dilation.
        mean = torch.full((x.shape[1], 1, *kernel), 1 / (kernel[0] * kernel[1]), dtype=x.dtype)
        return F.conv2d(pad(x, op, 0.0), mean, None, stride, 0, (h["dilation"], w["dilation"]), x.shape[1])
    return F.avg_pool2d(pad(x, op, 0.0), kernel, stride)


def open_logits(op, logits, score):
    """Logits, of experts whose groups are not chosen minus infinity."""
    if op["groups"] == 1:
        return logits
    grouped = score.unflatten(-1, (op["groups"], -1))
    best = grouped.topk(op["group_best"], -1).values.sum(-1)
    mask = torch.zeros_like(best).scatter(-1, best.topk(op["top_groups"], -1).indices, 1.0)
    return logits.masked_fill(mask.repeat_interleave(grouped.shape[-1], -1) == 0, -torch.inf)


def router(op, logits):
    score = torch.sigmoid(logits) if op["sigmoid"] else torch.softmax(logits, -1)
    best = open_logits(op, logits, score).topk(op["top_k"], -1).indices
    chosen = torch.zeros_like(logits).scatter(-1, best, 1.0)
    gates = score * chosen
    if op["normalise"]:
        gates = gates / gates.sum(-1, keepdim=True)
    return gates * op["scale"]


def causal_convolution(op, x, params):
    b, s, h, f = x.shape
    channels = x.permute(0, 2, 3, 1).reshape(b, h * f, s)
    weight = params[0].reshape(h * f, 1, op["kernel"])
    bias = params[1].flatten() if op["bias"] else None
    y = F.silu(F.conv1d(F.pad(channels, (op["kernel"] - 1, 0)), weight, bias, groups=h * f))
    return y.reshape(b, h, f, s).permute(0, 3, 1, 2)


def state_space(op, x, step, decay, skip, bias):
    b, s, g, _ = x.shape
    r, p, n = op["heads_per_group"], op["head_dim"], op["state"]
    u = x[..., : r * p].reshape(b, s, g, r, p)
    B, C = x[..., None, None, r * p : r * p + n], x[..., None, None, r * p + n :]
    length = F.softplus(step + bias)[..., None, None]
    kept = torch.exp(-length * decay.exp()[..., None, None])
    state = torch.zeros(b, g, r, p, n, dtype=x.dtype)
    y = []
    for t in range(s):
        state = kept[:, t] * state + length[:, t] * u[:, t, ..., None] * B[:, t]
        y.append((state * C[:, t]).sum(-1) + skip[..., None] * u[:, t])
    return torch.stack(y, 1).reshape(b, s, g, r * p)


def gated_norm(op, x, gate, weight):
    v = x * F.silu(gate)
    return v * torch.rsqrt((v * v).mean(-1, keepdim=True) + op["epsilon"]) * weight


def run(op, x, params):
    kind = op["op"]
    if kind == "linear":
        w = params[0]
        n = op["contracted"]
        out = w.shape[: w.dim() - n]
        y = x[0].flatten(x[0].dim() - n) @ w.reshape(math.prod(out), -1).T
        y = y.reshape(*x[0].shape[: x[0].dim() - n], *out)
        return y + params[1] if op["bias"] else y
    if kind == "add_bias":
        return x[0] + params[0]
    if kind == "embedding":
        return params[0][x[0].long()]
    if kind == "position_embedding":
        return x[0] + params[0][: x[0].shape[1]]
    if kind == "normalize":
        return normalize(op, x[0], params)
    if kind == "activation":
        return activation(op["kind"], x[0])
    if kind == "gated_activation":
        return activation(op["kind"], x[0]) * x[1]
    if kind == "add":
        return x[0] + x[1]
    if kind == "multiply":
        return x[0] * x[1]
    if kind == "rotary":
        return rotary(op, x[0])
    if kind == "attention":
        return attention(op, *x, params)
    if kind == "cross_entropy":
        return F.cross_entropy(x[0].flatten(0, -2), x[1].long().flatten())
    if kind == "mean_squared_error":
        return F.mse_loss(x[0], x[1])
    if kind == "convolution":
        return convolution(op, x[0], params)
    if kind == "pool":
        return pool(op, x[0])
    if kind == "global_average_pool":
        return x[0].mean((2, 3))
    if kind == "scale_features":
        return x[0] * x[1][:, :, None, None]
    if kind == "to_sequence":
        return x[0].flatten(2).transpose(1, 2)
    if kind == "prepend_token":
        return torch.cat([params[0].reshape(1, 1, -1).expand(x[0].shape[0], -1, -1), x[0]], 1)
    if kind == "select_token":
        return x[0][:, op["index"]]
    if kind == "concat":
        return torch.cat(x, -1 if op["last"] else 1)
    if kind == "append_to_heads":
        return torch.cat([x[0], x[1][:, :, None, :].expand(-1, -1, x[0].shape[2], -1)], -1)
    if kind == "router":
        return router(op, x[0])
    # Rows of experts are kept for all experts: those that were not chosen meet a gate of zero.
    if kind == "dispatch":
        return x[0][:, :, None, :].expand(-1, -1, op["experts"], -1)
    if kind == "grouped_product":
        y = torch.einsum("bsei,eoi->bseo", x[0], params[0])
        return y + params[1] if op["bias"] else y
    if kind == "combine":
        return (x[0] * x[1][..., None]).sum(2)
    if kind == "causal_convolution":
        return causal_convolution(op, x[0], params)
    if kind == "state_space":
        return state_space(op, *x, *params)
    if kind == "gated_norm":
        return gated_norm(op, *x, *params)
    raise SystemExit(f"operator {kind} is unknown to this script")


class Network(torch.nn.Module):
    """The network as a module: what DistributedDataParallel wraps."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.tensor(p["values"]).reshape(p["shape"])) for p in network["parameters"]
        )

    def forward(self, *inputs):
        tensors = {t["tensor"]: x for t, x in zip(self.network["inputs"], inputs)}
        for op in self.network["operators"]:
            y = run(op, [tensors[i] for i in op["inputs"]], [self.weights[q] for q in op["parameters"]])
            tensors[op["output"]] = y
        return tensors[self.network["loss_tensor"]]


def build_optimizer(o, parameters):
    if o["kind"] == "sgd":
        return torch.optim.SGD(parameters, o["learning_rate"], o["momentum"])
    return torch.optim.AdamW(parameters, o["learning_rate"], (o["beta1"], o["beta2"]), o["epsilon"], o["weight_decay"])


def build_optimizer(o, parameters):
    if o["kind"] == "sgd":
        return torch.optim.SGD(parameters, o["learning_rate"], o["momentum"])
    return torch.optim.AdamW(parameters, o["learning_rate"], (o["beta1"], o["beta2"]), o["epsilon"], o["weight_decay"])


def train(rank, world, network):
    """Steps on this rank's share of each batch: losses, the last step's gradients (as the optimizer got them), the
    parameters after it and the times of more, timed steps. On one rank the plain module trains; on several PyTorch's
    own data parallelism over gloo, with whole or with sharded parameters."""
    torch.set_default_dtype(torch.float32 if network["precision"] == "single" else torch.float64)
    wrapper, o = network["wrapper"], network["optimizer"]
    model = Network(network)
    if wrapper == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    if wrapper == "fsdp":
        from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"),
                                         sharding_strategy=ShardingStrategy.FULL_SHARD)
    optimizer = build_optimizer(o, model.parameters())
    losses, inputs = [], []

    def meet():
        if world > 1:
            torch.distributed.barrier()

    def step():
        meet()
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model(*inputs)
        loss.backward()
        if o["clip"] > 0:
            if wrapper == "fsdp":
                model.clip_grad_norm_(o["clip"])
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), o["clip"])
        optimizer.step()
        meet()
        return time.perf_counter() - start, loss.detach()

    for k in range(len(network["inputs"][0]["steps"])):
        inputs = [torch.tensor(t["steps"][k]).reshape(t["shape"]).chunk(world)[rank] for t in network["inputs"]]
        _, loss = step()
        if world > 1:
            torch.distributed.all_reduce(loss)
        losses.append(loss.item() / world)

    def values():
        flat = lambda v: [] if v is None else v.flatten().tolist()
        return [flat(p.grad) for p in model.parameters()], [flat(p.detach()) for p in model.parameters()]

    if wrapper == "fsdp":
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            gradients, parameters = values()
    else:
        gradients, parameters = values()
    # On the last batch again and again: the first steps made their buffers.
    times = [step()[0] for _ in range(network["timed"])]
    return {"losses": losses, "gradients": gradients, "parameters": parameters, "step_s": times}


def worker(rank, request, folder):
    torch.set_num_threads(1)
    world = request["world"]
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results = [train(rank, world, network) for network in request["networks"]]
    if rank == 0:
        json.dump(results, open(folder + "/results", "w"))
    if world > 1:
        torch.distributed.destroy_process_group()


def main():
    request = json.load(open(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        if request["world"] == 1:
            worker(0, request, folder)
        else:
            torch.multiprocessing.spawn(worker, (request, folder), nprocs=request["world"])
        print(open(folder + "/results").read())


if __name__ == "__main__":
    main()
