"""Single operators with PyTorch beside our results: forward and gradients by autograd, in double beside the
reference's kernels and in fp32 beside the executor's.  usage: operators.py FILE.json   prints a JSON line for each
result: its largest difference in bounds, and that difference and bound.

Both sides round, so a result may differ by twice its bound. Bounds are derived for each value by itself, never
guessed. What is linear in each of its operands, forward and backward, is a sum of products: with the same
computation on absolute values S and on ones K (the number of terms), K - 1 additions and m roundings a term are at
most (K - 1 + m) S roundings. The others are written out below, step by step, and carry their own (rounding.py); their
values must be PyTorch's to 1e-9, or the formula is another operator's."""
import json
import math
import sys

import torch
import torch.nn.functional as F

import network
from rounding import Rounded, constant

UNIT = {"double": 2.0**-53, "single": 2.0**-24}
# Of second order: (1 + u)^n is less than 1 + 1.01 n u for n up to 10^5.
SECOND_ORDER = 1.01


# ----------------------------------------------------------------------------------------------- PyTorch's side


def attention(op, x, params):
    if op["sinks"] or not hasattr(F, "scaled_dot_product_attention"):
        return network.attention(op, *x, params)
    q, k, v = x
    b, s, h, _ = q.shape
    g, d = op["queries_per_head"], op["qk_dim"]
    hidden = network.hidden_keys(op, s, k.shape[1])
    y = F.scaled_dot_product_attention(
        q.reshape(b, s, h * g, d).transpose(1, 2), k.transpose(1, 2).repeat_interleave(g, 1),
        v.transpose(1, 2).repeat_interleave(g, 1), attn_mask=~hidden, scale=op["scale"] or 1 / math.sqrt(d))
    return y.transpose(1, 2).reshape(b, s, h, g * op["v_dim"])


def by_row(case, i):
    """Sample, position and expert of every row of a routed operand."""
    return torch.tensor(case["inputs"][i].get("rows", case["gradient"].get("rows")), dtype=torch.long).reshape(-1, 3).T


def pytorch(case, x, params):
    op = case["op"]
    kind = op["op"]
    if kind == "attention":
        return attention(op, x, params)
    if kind == "dropout":
        return x[0] * torch.tensor(case["mask"]).reshape(x[0].shape) / (1 - op["probability"])
    if kind == "batched_product":
        return torch.matmul(x[0], x[1])
    if kind == "softmax":
        return torch.softmax(x[0], -1)
    if kind == "cross_entropy":
        labels = x[1].long().flatten()
        return F.cross_entropy(x[0].reshape(len(labels), -1), labels, reduction="sum") * case["loss_scale"]
    if kind == "mean_squared_error":
        return F.mse_loss(x[0], x[1], reduction="sum") * case["loss_scale"]
    if kind == "global_average_pool":
        return F.adaptive_avg_pool2d(x[0], 1).flatten(1)
    if kind == "pool" and not op["maximum"] and not op["count_padding"]:
        # PyTorch pads both sides alike and here they differ: sums, by the number of places inside.
        ones = dict(op, count_padding=True)
        return network.pool(ones, x[0]) / network.pool(ones, torch.ones_like(x[0]))
    if kind == "dispatch":
        sample, position, _ = by_row(case, 0)
        return x[0][sample, position]
    if kind == "grouped_product":
        w = params[0][by_row(case, 0)[2]]
        y = torch.bmm(w, x[0][:, :, None])[:, :, 0]
        return y + params[1][by_row(case, 0)[2]] if op["bias"] else y
    if kind == "combine":
        sample, position, expert = by_row(case, 0)
        s = x[1].shape[1]
        rows = x[0] * x[1][sample, position, expert][:, None]
        y = torch.zeros(x[1].shape[0] * s, x[0].shape[-1], dtype=x[0].dtype)
        return y.index_add(0, sample * s + position, rows).reshape(x[1].shape[0], s, -1)
    return network.run(op, x, params)


def gradients(case, x, params, above):
    """Output and gradients of inputs and parameters; None where an input has none."""
    x = [v.clone().requires_grad_(v.is_floating_point()) for v in x]
    params = [v.clone().requires_grad_(True) for v in params]
    y = pytorch(case, x, params)
    y.backward(above.reshape(y.shape))
    return y.detach(), [v.grad for v in x], [v.grad for v in params]


# ------------------------------------------------------------------------------------------- bounds, linear ones

# Roundings a term of the forward; of copies and sums of copies none.
LINEAR = {
    "linear": 1, "add_bias": 0, "embedding": 0, "position_embedding": 0, "add": 0, "multiply": 1, "dropout": 3,
    "batched_product": 1, "convolution": 1, "pool": 2, "global_average_pool": 2, "to_sequence": 0,
    "prepend_token": 0, "select_token": 0, "concat": 0, "append_to_heads": 0, "dispatch": 0, "grouped_product": 1,
    "combine": 1, "scale_features": 1,
}


def linear_bounds(case, x, params, above):
    op = case["op"]
    kind = op["op"]
    window = 1
    if kind == "global_average_pool":
        window = x[0].shape[2] * x[0].shape[3]
    if kind == "pool" and not op["maximum"]:
        window = op["height"]["kernel"] * op["width"]["kernel"]
    if kind == "pool" and op["maximum"]:
        # The greatest is one of the inputs; its gradient a sum of the gradients where it was.
        _, (size,), _ = gradients(case, x, params, above.abs())
        _, (terms,), _ = gradients(case, x, params, torch.ones_like(above))
        return torch.zeros_like(above), [(terms - 1).clamp(min=0) * size], []
    magnitude = lambda v: v.abs() if v.is_floating_point() else v
    # Of Combine, gates that are zero have no rows: ones there change nothing.
    one = lambda v: torch.ones_like(v) if v.is_floating_point() else v
    sizes = gradients(case, [magnitude(v) for v in x], [v.abs() for v in params], above.abs())
    terms = gradients(case, [one(v) for v in x], [one(v) for v in params], torch.ones_like(above))
    if kind == "dropout":
        terms = (terms[0].sign(), [t.sign() for t in terms[1]], [])
    m = LINEAR[kind]
    bound = lambda k, s: None if s is None else ((k * window - 1).clamp(min=0) + m) * s
    return (bound(terms[0], sizes[0]), [bound(k, s) for k, s in zip(terms[1], sizes[1])],
            [bound(k, s) for k, s in zip(terms[2], sizes[2])])


# ------------------------------------------------------------------------------------------ bounds, the other ones


def curve(kind, x):
    """Value and slope of an activation."""
    c = lambda v: constant(v, x.value)
    if kind in ("relu", "squared_relu"):
        r = Rounded(x.value.clamp(min=0), x.error)
        return (r, Rounded((x.value > 0).double())) if kind == "relu" else (r * r, 2 * r)
    if kind == "gelu":
        phi = 0.5 * (1 + (x / c(math.sqrt(2))).erf())
        return x * phi, phi + x * (-0.5 * (x * x)).exp() * c(1 / math.sqrt(2 * math.pi))
    if kind == "gelu_tanh":
        t = (c(math.sqrt(2 / math.pi)) * (x + c(0.044715) * (x * x * x))).tanh()
        inner = c(math.sqrt(2 / math.pi)) * (1 + c(3 * 0.044715) * (x * x))
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner
    if kind == "tanh":
        t = x.tanh()
        return t, 1 - t * t
    s = 1 / (1 + (-x).exp())
    if kind == "sigmoid":
        return s, s * (1 - s)
    return x * s, s * (1 + x * (1 - s))


def normalized(op, x, params, above, sums_of_squares):
    """The reference takes the variance from sums of squares, the executor from differences to the mean."""
    params = list(params)
    shape = x.value.shape
    scale = params.pop(0) if op["scale"] else None
    bias = params.pop(0) if op["bias"] else None
    if op["kind"] == "local":
        n, f = op["window"], shape[1]
        i, j = torch.arange(f)[:, None], torch.arange(f)[None, :]
        # near[j, i]: feature i is summed for feature j.
        near = Rounded(((i >= j - n // 2) & (i <= j + (n - 1) // 2)).double().T.contiguous())
        flat = lambda v: v.map(lambda t: t.reshape(shape[0], f, -1))
        v, d = flat(x), flat(above)
        base = op["offset"] + constant(op["alpha"] / n, x.value) * near.matmul(v * v)
        y = v * base.power(-op["beta"])
        back = d * v * base.power(-op["beta"]) / base
        far = constant(2 * op["alpha"] * op["beta"] / n, x.value) * v * near.transpose().matmul(back)
        dx = d * base.power(-op["beta"]) - far
        whole = lambda v: v.map(lambda t: t.reshape(shape))
        return whole(y), [whole(dx)], []
    if op["kind"] == "batch":
        form = lambda v: v.map(lambda t: t.transpose(0, 1).reshape(shape[1], -1))
        back = lambda v: v.map(lambda t: t.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1))
        affine = lambda v: v.map(lambda t: t[:, None])
        over = 1
    else:
        form = lambda v: v.map(lambda t: t.reshape(-1, op["group"] or shape[-1]))
        back = lambda v: v.map(lambda t: t.reshape(shape))
        affine = lambda v: v.map(lambda t: t[None, :])
        over = 0
    v, d = form(x), form(above)
    n = v.value.shape[1]
    mean = v.sum(1) / n if op["kind"] != "rms" else Rounded(torch.zeros(v.value.shape[0], 1, dtype=torch.float64))
    c = v - mean if op["kind"] != "rms" else v
    variance = (v * v).sum(1) / n - mean * mean if sums_of_squares else (c * c).sum(1) / n
    inverse = (variance + constant(op["epsilon"], x.value)).rsqrt()
    hat = c * inverse
    y = hat * affine(scale) if scale is not None else hat
    y = y + affine(bias) if bias is not None else y
    g = d * affine(scale) if scale is not None else d
    m2 = (g * hat).sum(1) / n
    dx = inverse * (g - g.sum(1) / n - hat * m2) if op["kind"] != "rms" else inverse * (g - hat * m2)
    weights = []
    if scale is not None:
        weights.append((d * hat).sum(over).map(lambda t: t.flatten()))
    if bias is not None:
        weights.append(d.sum(over).map(lambda t: t.flatten()))
    return back(y), [back(dx)], weights


def shifted_exp(s, top):
    """exp(s - top) where -inf stays 0. The shift itself is the same number everywhere and changes nothing."""
    shown = torch.isfinite(s.value)
    safe = Rounded(torch.where(shown, s.value, torch.zeros_like(s.value)), torch.where(shown, s.error, 0.0 * s.error))
    z = (safe - top).exp()
    return Rounded(torch.where(shown, z.value, 0.0), torch.where(shown, z.error, 0.0))


def softmax(s, d):
    z = shifted_exp(s, s.value.amax(-1, keepdim=True))
    p = z / z.sum(-1)
    return p, p * (d - (p * d).sum(-1))


def attended(op, x, params, above):
    b, s, h, _ = x[0].value.shape
    g, qk, vd = op["queries_per_head"], op["qk_dim"], op["v_dim"]
    # [sample, head, query of the group, position, width]
    grouped = lambda v, w: v.map(lambda t: t.reshape(b, s, h, g, w).permute(0, 2, 3, 1, 4))
    shared = lambda v: v.map(lambda t: t.permute(0, 2, 1, 3)[:, :, None].expand(-1, -1, g, -1, -1))
    q, k, v, d = grouped(x[0], qk), shared(x[1]), shared(x[2]), grouped(above, vd)
    scale = constant(op["scale"] or 1 / math.sqrt(qk), q.value)
    scores = q.matmul(k.transpose()) * scale
    hidden = network.hidden_keys(op, s, k.value.shape[3])
    scores.value = scores.value.masked_fill(hidden, -math.inf)
    top = scores.value.amax(-1, keepdim=True)
    if op["sinks"]:
        sink = params[0].map(lambda t: t.reshape(1, h, g, 1, 1))
        top = torch.maximum(top, sink.value)
    z = shifted_exp(scores, top)
    total = z.sum(-1)
    if op["sinks"]:
        total = total + (sink - top).exp()
    y = (z / total).matmul(v)
    # The backward makes the probabilities again, from scores and their log-sum-exp.
    lse = top + total.log()
    p = shifted_exp(scores, lse)
    dp = d.matmul(v.transpose())
    mean = (p * dp).sum(-1)
    ds = p * (dp - mean) * scale
    together = lambda v: v.sum(2).map(lambda t: t[:, :, 0].permute(0, 2, 1, 3))
    dq, dk, dv = ds.matmul(k), together(ds.transpose().matmul(q)), together(p.transpose().matmul(d))
    flat = lambda v, w: v.map(lambda t: t.permute(0, 3, 1, 2, 4).reshape(b, s, h, g * w))
    weights = []
    if op["sinks"]:
        lost = -((sink - lse).exp() * (d * y).sum(-1))
        weights.append(lost.sum([0, 3]).map(lambda t: t.reshape(h * g)))
    return flat(y, vd), [flat(dq, qk), dk, dv], weights


def routed(op, x, d):
    if op["sigmoid"]:
        score = 1 / (1 + (-x).exp())
    else:
        z = shifted_exp(x, x.value.amax(-1, keepdim=True))
        score = z / z.sum(-1)
    best = network.open_logits(op, x.value, score.value).topk(op["top_k"], -1).indices
    chosen = torch.zeros_like(x.value).scatter(-1, best, 1.0)
    scale = constant(op["scale"], x.value)
    kept = Rounded(score.value * chosen, score.error * chosen)
    total = kept.sum(-1)
    gates = scale * kept / total if op["normalise"] else scale * kept
    mean = (d * kept / total).sum(-1)
    back = scale * ((d - mean) / total if op["normalise"] else d)
    back = Rounded(back.value * chosen, back.error * chosen)
    dx = back * score * (1 - score) if op["sigmoid"] else score * (back - (score * back).sum(-1))
    return gates, dx


def turned(op, x, direction):
    shape = x.value.shape
    d, r = op["head_dim"], op["rotated"]
    v = x.map(lambda t: t.reshape(shape[0], shape[1], -1, d))
    cosine, sine = (t[None, :, None, :] for t in network.turns(op, shape[1]))
    c, s = Rounded(cosine, cosine.abs()), direction * Rounded(sine, sine.abs())
    still, a, b = v[..., : d - r], v[..., d - r : d - r // 2], v[..., d - r // 2 :]
    y = [still, a * c - b * s, b * c + a * s]
    y = Rounded(torch.cat([t.value for t in y], -1), torch.cat([t.error for t in y], -1))
    return y.map(lambda t: t.reshape(shape))


def stacked(parts, dim):
    return Rounded(torch.stack([v.value for v in parts], dim), torch.stack([v.error for v in parts], dim))


def convolved(op, x, params, above):
    k, s = op["kernel"], x.value.shape[1]
    earlier = lambda v, n: v.map(lambda t: F.pad(t, (0, 0, 0, 0, n, 0))[:, :s])
    later = lambda v, n: v.map(lambda t: F.pad(t, (0, 0, 0, 0, 0, n))[:, n:])
    weight = [params[0][..., i] for i in range(k)]
    terms = [earlier(x, k - 1 - i) * weight[i] for i in range(k)]
    if op["bias"]:
        terms.append(params[1].map(lambda t: t.expand(x.value.shape)))
    y, slope = curve("silu", stacked(terms, -1).sum(-1)[..., 0])
    d = above * slope
    dx = stacked([later(d, k - 1 - i) * weight[i] for i in range(k)], -1).sum(-1)[..., 0]
    dw = stacked([(d * earlier(x, k - 1 - i)).sum([0, 1])[0, 0] for i in range(k)], -1)
    return y, [dx], [dw] + ([d.sum([0, 1])[0, 0]] if op["bias"] else [])


def scanned(op, x, params, above):
    b, s, g, _ = x[0].value.shape
    r, p, n = op["heads_per_group"], op["head_dim"], op["state"]
    heads = lambda v: v.map(lambda t: t.reshape(b, s, g, r, p))
    wide = lambda v: v.map(lambda t: t[..., None, None])
    column = lambda v: v.map(lambda t: t[..., None])
    row = lambda v: v.map(lambda t: t[..., None, None, :])
    u, d = heads(x[0][..., : r * p]), heads(above)
    B, C = x[0][..., r * p : r * p + n], x[0][..., r * p + n :]
    decay, skip, bias = params
    raw = x[1] + bias
    above_zero = Rounded(raw.value.clamp(min=0), torch.where(raw.value > 0, raw.error, 0.0))
    length = above_zero + (1 + (-Rounded(raw.value.abs(), raw.error)).exp()).log()
    rate = decay.exp()
    kept = (-(length * rate)).exp()
    states, y = [Rounded(torch.zeros(b, g, r, p, n, dtype=torch.float64))], []
    for t in range(s):
        states.append(wide(kept[:, t]) * states[-1] + wide(length[:, t]) * column(u[:, t]) * row(B[:, t]))
        y.append((states[-1] * row(C[:, t])).sum(-1)[..., 0] + column(skip) * u[:, t])
    later = states[0]
    dx, dstep, ddecay, dskip = [], [], [], []
    for t in reversed(range(s)):
        later = later + column(d[:, t]) * row(C[:, t])
        pushed = wide(length[:, t]) * later
        du = column(skip) * d[:, t] + (pushed * row(B[:, t])).sum(-1)[..., 0]
        dB = (pushed * column(u[:, t])).sum([2, 3])[:, :, 0, 0]
        dC = (column(d[:, t]) * states[t + 1]).sum([2, 3])[:, :, 0, 0]
        of_kept = (later * states[t]).sum([3, 4])[..., 0, 0] * kept[:, t]
        of_length = (later * column(u[:, t]) * row(B[:, t])).sum([3, 4])[..., 0, 0] - of_kept * rate
        flat = du.map(lambda v: v.reshape(b, g, r * p))
        dx.insert(0, Rounded(torch.cat([v.value for v in (flat, dB, dC)], -1),
                             torch.cat([v.error for v in (flat, dB, dC)], -1)))
        dstep.insert(0, of_length / (1 + (-raw[:, t]).exp()))
        ddecay.append(-(of_kept * length[:, t] * rate))
        dskip.append((d[:, t] * u[:, t]).sum(-1)[..., 0])
        later = later * wide(kept[:, t])
    over = lambda parts: stacked(parts, 1).sum([0, 1])[0, 0]
    y = stacked(y, 1).map(lambda t: t.reshape(b, s, g, r * p))
    return y, [stacked(dx, 1), stacked(dstep, 1)], [over(ddecay), over(dskip), over(dstep)]


def gate_normed(op, x, params, above):
    n = x[0].value.shape[-1]
    value, slope = curve("silu", x[1])
    v = x[0] * value
    inverse = ((v * v).sum(-1) / n + constant(op["epsilon"], v.value)).rsqrt()
    hat = v * inverse
    g = above * params[0]
    dv = inverse * (g - hat * ((g * hat).sum(-1) / n))
    return hat * params[0], [dv * value, dv * x[0] * slope], [(above * hat).sum([0, 1])[0, 0]]


def other_bounds(case, x, params, above, sums_of_squares):
    op = case["op"]
    kind = op["op"]
    x, params, above = [Rounded(v.double()) for v in x], [Rounded(v) for v in params], Rounded(above)
    if kind == "activation":
        y, slope = curve(op["kind"], x[0])
        return y, [above * slope], []
    if kind == "gated_activation":
        y, slope = curve(op["kind"], x[0])
        return y * x[1], [above * x[1] * slope, above * y], []
    if kind == "normalize":
        return normalized(op, x[0], params, above, sums_of_squares)
    if kind == "attention":
        return attended(op, x, params, above)
    if kind == "softmax":
        y, dx = softmax(x[0], above)
        return y, [dx], []
    if kind == "router":
        y, dx = routed(op, x[0], above)
        return y, [dx], []
    if kind == "causal_convolution":
        return convolved(op, x[0], params, above)
    if kind == "state_space":
        return scanned(op, x, params, above)
    if kind == "gated_norm":
        return gate_normed(op, x, params, above)
    if kind == "rotary":
        return turned(op, x[0], 1), [turned(op, above, -1)], []
    scale = constant(case["loss_scale"], x[0].value)
    d = above.map(lambda t: t.reshape([])) * scale
    if kind == "mean_squared_error":
        off = x[0] - x[1]
        return (off * off).sum(list(range(off.value.dim()))) * scale, [2 * d * off], []
    assert kind == "cross_entropy", kind
    labels = x[1].value.long().flatten()
    logits = x[0].map(lambda t: t.reshape(len(labels), -1))
    top = logits.value.amax(-1, keepdim=True)
    z = shifted_exp(logits, top)
    hit = F.one_hot(labels, logits.value.shape[1]).double()
    label = (logits.value * hit).sum(-1, keepdim=True)
    # log of the sum and what lies between the label and the top: no term is larger.
    loss = z.sum(-1).log() + (Rounded(top) - label)
    dx = z * (d / z.sum(-1)) - d * Rounded(hit)
    return loss.sum([0, 1]) * scale, [dx.map(lambda t: t.reshape(x[0].value.shape))], []


# ------------------------------------------------------------------------------------------------------ comparison


def tensor(j, dtype):
    return torch.tensor(j["values"], dtype=dtype).reshape(j["shape"])


def compare(number, case):
    kind = case["op"]["op"]
    ids = {"embedding": 0, "cross_entropy": 1}.get(kind, -1)
    operands = lambda dtype: (
        [tensor(v, torch.int64 if i == ids else dtype) for i, v in enumerate(case["inputs"])],
        [tensor(v, dtype) for v in case["parameters"]], tensor(case["gradient"], dtype))
    exact = gradients(case, *operands(torch.float64))
    for precision, ours, dtype in [("double", "reference", torch.float64), ("single", "executor", torch.float32)]:
        if kind in LINEAR:
            bounds = linear_bounds(case, *operands(torch.float64))
        else:
            y, dx, dw = other_bounds(case, *operands(torch.float64), ours == "reference")
            for mine, theirs in zip([y, *dx, *dw], [exact[0], *[g for g in exact[1] if g is not None], *exact[2]]):
                off = (mine.value.reshape(theirs.shape) - theirs).abs().max() / max(1.0, float(theirs.abs().max()))
                assert off < 1e-9, f"the formula for {case['label']} is off by {off}"
            bounds = y.error, [g.error for g in dx], [g.error for g in dw]
        theirs = gradients(case, *operands(dtype)) if precision == "single" else exact
        passes = [("forward", [theirs[0]], [bounds[0]], case[ours]["outputs"]),
                  ("backward by data", theirs[1], bounds[1], case[ours]["inputs"]),
                  ("backward by weight", theirs[2], bounds[2], case[ours]["parameters"])]
        for name, mine, bound, got in passes:
            for k, values in enumerate(got):
                if values is None:
                    continue
                want = mine[k].double().flatten() if mine[k] is not None else torch.zeros(len(values)).double()
                limit = 2 * SECOND_ORDER * UNIT[precision] * bound[k].flatten()
                off = (torch.tensor(values, dtype=torch.float64) - want).abs()
                ratio = torch.where(off == 0, off, off / limit)
                worst = int(ratio.argmax()) if len(values) else 0
                line = {"case": number, "precision": precision, "pass": name, "result": k,
                        "ratio": float(ratio[worst]) if len(values) else 0.0,
                        "difference": float(off[worst]) if len(values) else 0.0,
                        "bound": float(limit[worst]) if len(values) else 0.0}
                print(json.dumps(line, allow_nan=False) if math.isfinite(line["ratio"]) else
                      json.dumps({**line, "ratio": None}))


def main():
    torch.set_num_threads(1)
    for number, case in enumerate(json.load(open(sys.argv[1]))["cases"]):
        try:
            compare(number, case)
        except Exception as e:
            raise RuntimeError(f"{case['label']}: {e}") from e


if __name__ == "__main__":
    main()
