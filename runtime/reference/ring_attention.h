// runtime/reference/ring_attention.h: attention over the keys one part at a time.
//
//   s = scale · q kᵀ, masked;   output = Σ exp(s - lse) v,   lse = log Σ exp(s)
//
// Parts are merged by their log-sum-exps: output' = (e^{lse - L} output + e^{lse' - L} output_part)
// with L = log(e^lse + e^lse'). Backward with the final lse: p = exp(s - lse), dv = pᵀ dy, ds = p
// (dy vᵀ - Σ dy·y), dq = scale · ds k, dk = scale · dsᵀ q. Liu et al.,
// https://arxiv.org/abs/2310.01889; Dao, https://arxiv.org/abs/2307.08691, section 3.1.
#pragma once

#include "models/operators.h"
#include "runtime/reference/kernels.h"

namespace partita::reference {

/// Adds one part of keys and values to `output` and `lse` (−∞ where nothing was seen yet).
/// q, output [sample, sequence, head, queries · d]; k, v [sample, key_sequence, head, d];
/// lse [sample, head, queries, sequence].
void attend_part(const Attention& a, const Piece& q, const Piece& k, const Piece& v, Piece& output,
                 Piece& lse);

/// Adds one part's gradients to dq, dk, dv; `output` and `lse` are the final ones.
void attend_part_backward(const Attention& a, const Piece& q, const Piece& k, const Piece& v,
                          const Piece& output, const Piece& lse, const Piece& d_output, Piece& dq,
                          Piece& dk, Piece& dv);

}  // namespace partita::reference
