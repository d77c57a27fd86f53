// runtime/cuda/flash.h: attention whose scores never leave the multiprocessor, on tensor cores, for
// operands of 16 bits (docs/cuda.md, "Attention").
//
// A kernel is what one block of threads does, over any `Block` that has
//
//   kLanes, lane(s)           how many of a warp's 32 lanes one call stands for: 1 on a GPU, whose
//                             threads are lanes, 32 on the host, where a warp's lanes go together
//   kept(f), warps(state, f)  a state for each warp; f(warp, its state) for each
//   threads(n, f)             f(i) for every i below n
//   shared()                  the block's memory, in 16-bit words
//   copy(to, from, bytes, size), commit(), wait(n), sync()
//                             to shared memory, in the background: `bytes` of `size`, then zeros;
//                             wait(n) for all groups but the last n
//   load, load_turned, multiply, quad_max, quad_sum
//                             PTX's ldmatrix.x4, the same .trans, mma.m16n8k16, and over the four
//                             lanes of a row
//
// so indices, masks, swizzles, fragments and the order of copies are tested where there is no GPU.
//
// Sources: Dao, "FlashAttention-2", arXiv:2307.08691, algorithms 1 and 2; fragments: PTX ISA 9.0,
// "Matrix fragments for mma.m16n8k16 with floating point type" and "ldmatrix".
#pragma once

#include "runtime/cuda/machine.h"

namespace partita::cuda {

struct Heads {
  std::int64_t samples, queries, keys, heads, group, width, v_width, q_row, k_row, v_row, y_row;
  float scale;
  bool causal;
  std::int64_t window, tile;  ///< queries whose scores are in memory at once
  IndexList query_at, key_at;
  /// Does query i (of the whole piece) see key j?
  PARTITA_BOTH bool sees(std::int64_t i, std::int64_t j) const {
    const std::int64_t here = query_at.at(i), there = key_at.at(j);
    return !(causal && there > here) && !(window > 0 && there <= here - window);
  }
};

/// Keys or queries [first, end), ascending.
struct Span {
  std::int64_t first, end;
};
/// Keys that some query of [first, end) sees.
PARTITA_BOTH Span keys_of(const Heads& h, std::int64_t first, std::int64_t end) {
  Span s{0, h.keys};
  if (h.causal) s.end = h.key_at.below(h.query_at.at(end - 1) + 1);
  if (h.window > 0) s.first = h.key_at.below(h.query_at.at(first) - h.window + 1);
  return s;
}
/// Of one query; none where there is no such query.
PARTITA_BOTH Span keys_of_one(const Heads& h, std::int64_t query) {
  return query < h.queries ? keys_of(h, query, query + 1) : Span{0, 0};
}
/// Queries that see some key of [first, end).
PARTITA_BOTH Span queries_of(const Heads& h, std::int64_t first, std::int64_t end) {
  Span s{0, h.queries};
  if (h.causal) s.first = h.query_at.below(h.key_at.at(first));
  if (h.window > 0) s.end = h.query_at.below(h.key_at.at(end - 1) + h.window);
  return s;
}
/// Does every query of the one see every key of the other? Both end at most where their list does.
PARTITA_BOTH bool all_seen(const Heads& h, Span queries, Span keys) {
  if (h.causal && h.key_at.at(keys.end - 1) > h.query_at.at(queries.first)) return false;
  return !(h.window > 0 && h.key_at.at(keys.first) <= h.query_at.at(queries.end - 1) - h.window);
}

/// What a flash kernel reads and writes; of the forward q, k, v, y, lse, of the backward all.
struct FlashCall {
  Heads h;
  ElementType type = ElementType::bf16;
  const std::uint16_t *q = nullptr, *k = nullptr, *v = nullptr, *dy = nullptr;
  std::uint16_t *y = nullptr, *dq = nullptr, *dk = nullptr, *dv = nullptr;
  float* lse = nullptr;          ///< [sample, head, query of the group, query]; null: not wanted
  const float* along = nullptr;  ///< dy · y, likewise
  Numbers sinks;
  /// Forward: these keys come to those that y and lse have met. Backward: gradients are added.
  bool part = false;
};
/// `keys`: gradients of keys and values. `backward`: all gradients, without `along`, where a
/// library makes them at once.
enum class FlashPass { forward, backward, queries, keys };

/// One head's rows of a tensor.
struct HeadRows {
  const std::uint16_t* at;
  std::int64_t stride, count, width;
};

namespace flash {

template <ElementType kType>
PARTITA_BOTH std::uint32_t pair(float low, float high) {
#ifdef __CUDA_ARCH__
  // One instruction for both.
  if constexpr (kType == ElementType::bf16) {
    const __nv_bfloat162 p = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&p);
  } else {
    const __half2 p = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&p);
  }
#else
  const auto one = [](float x) { return kType == ElementType::bf16 ? to_bf16(x) : to_fp16(x); };
  return one(low) | static_cast<std::uint32_t>(one(high)) << 16;
#endif
}
template <ElementType kType>
PARTITA_BOTH float number(std::uint16_t bits) {
  return kType == ElementType::bf16 ? from_bf16(bits) : from_fp16(bits);
}

/// Where 16 bytes, eight numbers from `column` on, of a tile's row lie: turned by the row, so that
/// eight rows' lie in different banks.
template <int kD>
PARTITA_BOTH int place(int row, int column) {
  return row * kD + ((column / 8) ^ (row % 8)) * 8;
}

/// A 16 x 8 block of fp32, as mma leaves it: lane l has rows l / 4 and l / 4 + 8, columns
/// 2 (l % 4) and the next.
template <class B>
struct Sums {
  float v[B::kLanes][4];
};
/// A 16 x 16 block of numbers to multiply with, or two of 8 x 16 side by side.
template <class B>
struct Factors {
  std::uint32_t v[B::kLanes][4];
};
template <class B, int kRows, int kColumns>
struct Block {
  Sums<B> at[kRows / 16][kColumns / 8];
  PARTITA_INLINE void clear() {
    PARTITA_UNROLL
    for (int i = 0; i < kRows / 16; ++i) {
      PARTITA_UNROLL
      for (int j = 0; j < kColumns / 8; ++j) {
        PARTITA_UNROLL
        for (int s = 0; s < B::kLanes; ++s) {
          PARTITA_UNROLL
          for (int e = 0; e < 4; ++e) at[i][j].v[s][e] = 0;
        }
      }
    }
  }
};
/// The block's row and column of a lane's element e in block (i, j).
PARTITA_BOTH int row_of(int i, int lane, int e) { return 16 * i + lane / 4 + e / 2 * 8; }
PARTITA_BOTH int column_of(int j, int lane, int e) { return 8 * j + lane % 4 * 2 + e % 2; }

/// Rows [first, first + kRows) of a head to shared memory; what there is none of is 0.
template <int kD, int kRows, class B>
PARTITA_INLINE void bring(B& block, std::uint16_t* to, const HeadRows& from, std::int64_t first) {
  block.threads(kRows * (kD / 8), [&](int n) {
    const int row = n / (kD / 8), column = n % (kD / 8) * 8;
    const bool there = first + row < from.count && column < from.width;
    block.copy(to + place<kD>(row, column),
               there ? from.at + (first + row) * from.stride + column : from.at, there ? 16 : 0,
               16);
  });
}

/// c[kM, kN] += a[kM, kD] · b[kN, kD]ᵀ, both in shared memory; a from row `a_row` on.
template <ElementType kType, int kM, int kN, int kD, class B>
PARTITA_INLINE void add_product(B& block, const std::uint16_t* a, int a_row, const std::uint16_t* b,
                                Block<B, kM, kN>& c) {
  PARTITA_UNROLL
  for (int k = 0; k < kD; k += 16) {
    Factors<B> left[kM / 16];
    PARTITA_UNROLL
    for (int i = 0; i < kM / 16; ++i)
      block.load(left[i], [&](int lane) {
        return a + place<kD>(a_row + 16 * i + lane % 16, k + lane / 16 * 8);
      });
    PARTITA_UNROLL
    for (int j = 0; j < kN / 16; ++j) {
      Factors<B> right;
      block.load(right, [&](int lane) {
        return b + place<kD>(16 * j + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8);
      });
      PARTITA_UNROLL
      for (int i = 0; i < kM / 16; ++i) {
        block.template multiply<kType>(c.at[i][2 * j], left[i], right, 0);
        block.template multiply<kType>(c.at[i][2 * j + 1], left[i], right, 2);
      }
    }
  }
}
/// c[kM, kD] += p[kM, kN] · b[kN, kD], p rounded from sums, b in shared memory.
template <ElementType kType, int kM, int kN, int kD, class B>
PARTITA_INLINE void add_weighted(B& block, const Block<B, kM, kN>& p, const std::uint16_t* b,
                                 Block<B, kM, kD>& c) {
  PARTITA_UNROLL
  for (int k = 0; k < kN / 16; ++k) {
    Factors<B> left[kM / 16];
    PARTITA_UNROLL
    for (int i = 0; i < kM / 16; ++i) {
      PARTITA_UNROLL
      for (int s = 0; s < B::kLanes; ++s) {
        const float *one = p.at[i][2 * k].v[s], *other = p.at[i][2 * k + 1].v[s];
        left[i].v[s][0] = pair<kType>(one[0], one[1]);
        left[i].v[s][1] = pair<kType>(one[2], one[3]);
        left[i].v[s][2] = pair<kType>(other[0], other[1]);
        left[i].v[s][3] = pair<kType>(other[2], other[3]);
      }
    }
    PARTITA_UNROLL
    for (int j = 0; j < kD / 16; ++j) {
      Factors<B> right;
      block.load_turned(right, [&](int lane) {
        return b + place<kD>(16 * k + lane % 16, 16 * j + lane / 16 * 8);
      });
      PARTITA_UNROLL
      for (int i = 0; i < kM / 16; ++i) {
        block.template multiply<kType>(c.at[i][2 * j], left[i], right, 0);
        block.template multiply<kType>(c.at[i][2 * j + 1], left[i], right, 2);
      }
    }
  }
}
/// f(row, column, element of c) for all that this caller has.
template <int kM, int kN, class B, class F>
PARTITA_INLINE void for_each(B& block, Block<B, kM, kN>& c, F f) {
  PARTITA_UNROLL
  for (int i = 0; i < kM / 16; ++i) {
    PARTITA_UNROLL
    for (int j = 0; j < kN / 8; ++j) {
      PARTITA_UNROLL
      for (int s = 0; s < B::kLanes; ++s) {
        PARTITA_UNROLL
        for (int e = 0; e < 4; ++e)
          f(row_of(i, block.lane(s), e), column_of(j, block.lane(s), e), c.at[i][j].v[s][e]);
      }
    }
  }
}
/// Takes away what a row does not see: `seen_by(row)` is a span of the columns' numbers.
template <int kM, int kN, class B, class F>
PARTITA_INLINE void hide(B& block, Block<B, kM, kN>& c, std::int64_t first_column, F seen_by) {
  const auto inside = [&](std::int64_t at) {
    const std::int64_t n = at - first_column;
    return static_cast<int>(n < 0 ? 0 : n > kN ? kN : n);
  };
  PARTITA_UNROLL
  for (int i = 0; i < kM / 16; ++i) {
    PARTITA_UNROLL
    for (int r = 0; r < 2; ++r) {
      PARTITA_UNROLL
      for (int s = 0; s < B::kLanes; ++s) {
        const int lane = block.lane(s);
        const Span seen = seen_by(row_of(i, lane, 2 * r));
        const int first = inside(seen.first), end = inside(seen.end);
        PARTITA_UNROLL
        for (int j = 0; j < kN / 8; ++j) {
          PARTITA_UNROLL
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            const int column = column_of(j, lane, e);
            if (column < first || column >= end) c.at[i][j].v[s][e] = -INFINITY;
          }
        }
      }
    }
  }
}
/// to[row, column] (+)= factor · c for rows below `rows`, columns below `width`, two at a time.
template <ElementType kType, int kM, int kD, class B>
PARTITA_INLINE void store(B& block, const Block<B, kM, kD>& c, float factor, std::uint16_t* to,
                          std::int64_t stride, std::int64_t rows, std::int64_t width, bool adds) {
  PARTITA_UNROLL
  for (int i = 0; i < kM / 16; ++i) {
    PARTITA_UNROLL
    for (int j = 0; j < kD / 8; ++j) {
      PARTITA_UNROLL
      for (int s = 0; s < B::kLanes; ++s) {
        PARTITA_UNROLL
        for (int e = 0; e < 4; e += 2) {
          const int row = row_of(i, block.lane(s), e), column = column_of(j, block.lane(s), e);
          if (row >= rows || column >= width) continue;
          std::uint16_t* at = to + row * stride + column;
          float low = factor * c.at[i][j].v[s][e], high = factor * c.at[i][j].v[s][e + 1];
          if (adds) low += number<kType>(at[0]), high += number<kType>(at[1]);
          *reinterpret_cast<std::uint32_t*>(at) = pair<kType>(low, high);
        }
      }
    }
  }
}

/// A query head of a call.
struct Head {
  std::int64_t sample, query_head, head;
  PARTITA_BOTH HeadRows queries(const FlashCall& c) const {
    return {c.q + sample * c.h.queries * c.h.q_row + query_head * c.h.width, c.h.q_row, c.h.queries,
            c.h.width};
  }
  PARTITA_BOTH HeadRows keys(const FlashCall& c) const {
    return {c.k + sample * c.h.keys * c.h.k_row + head * c.h.width, c.h.k_row, c.h.keys, c.h.width};
  }
  PARTITA_BOTH HeadRows values(const FlashCall& c) const {
    return {c.v + sample * c.h.keys * c.h.v_row + head * c.h.v_width, c.h.v_row, c.h.keys,
            c.h.v_width};
  }
  PARTITA_BOTH std::int64_t output(const FlashCall& c) const {
    return sample * c.h.queries * c.h.y_row + query_head * c.h.v_width;
  }
  PARTITA_BOTH HeadRows slopes(const FlashCall& c) const {
    return {c.dy + output(c), c.h.y_row, c.h.queries, c.h.v_width};
  }
  PARTITA_BOTH std::int64_t line(const FlashCall& c) const {
    return (sample * c.h.heads * c.h.group + query_head) * c.h.queries;
  }
};

}  // namespace flash

/// A block: 128 queries of one head, 32 for each of four warps, past all keys in tiles of 64.
template <ElementType kType, int kD>
struct FlashForward {
  static constexpr int kWarps = 4, kM = 32, kQueries = kWarps * kM, kKeys = 64;
  static constexpr int kWords = (kQueries + 4 * kKeys) * kD;  ///< of shared memory
  FlashCall c;

  PARTITA_BOTH std::int64_t tiles() const { return (c.h.queries + kQueries - 1) / kQueries; }
  std::int64_t blocks() const { return tiles() * c.h.samples * c.h.heads * c.h.group; }

  template <class B>
  struct State {
    flash::Block<B, kM, kD> y;
    /// Of each row: the largest score so far, and this lane's part of the sum.
    float top[kM / 16][2][B::kLanes], sum[kM / 16][2][B::kLanes];
  };
  template <class B>
  PARTITA_INLINE void operator()(B& block, std::int64_t number) const {
    const Heads& h = c.h;
    // The longest first: of causal tiles the last.
    const std::int64_t first = (tiles() - 1 - number % tiles()) * kQueries,
                       end = first + kQueries < h.queries ? first + kQueries : h.queries,
                       all = number / tiles(), query_heads = h.heads * h.group;
    const flash::Head head{all / query_heads, all % query_heads, all % query_heads / h.group};
    const HeadRows keys = head.keys(c), values = head.values(c);
    const Span seen = keys_of(h, first, end);
    std::uint16_t* const q = block.shared();
    const auto tile_of = [&](std::int64_t n) { return q + (kQueries + n % 2 * 2 * kKeys) * kD; };
    const auto bring_keys = [&](std::int64_t n) {
      flash::bring<kD, kKeys>(block, tile_of(n), keys, seen.first + n * kKeys);
      flash::bring<kD, kKeys>(block, tile_of(n) + kKeys * kD, values, seen.first + n * kKeys);
    };
    auto state = block.template kept<State<B>>([](State<B>& s) {
      s.y.clear();
      PARTITA_UNROLL
      for (int i = 0; i < kM / 16; ++i) {
        PARTITA_UNROLL
        for (int r = 0; r < 2; ++r) {
          PARTITA_UNROLL
          for (int l = 0; l < B::kLanes; ++l) s.top[i][r][l] = -INFINITY, s.sum[i][r][l] = 0;
        }
      }
    });
    const std::int64_t steps =
        seen.end > seen.first ? (seen.end - seen.first + kKeys - 1) / kKeys : 0;
    flash::bring<kD, kQueries>(block, q, head.queries(c), first);
    if (steps > 0) bring_keys(0);
    block.commit();
    for (std::int64_t n = 0; n < steps; ++n) {
      if (n + 1 < steps) bring_keys(n + 1);
      block.commit();
      block.template wait<1>();
      block.sync();
      const std::int64_t key = seen.first + n * kKeys;
      const bool whole = key + kKeys <= seen.end && all_seen(h, {first, end}, {key, key + kKeys});
      block.warps(state, [&](int warp, State<B>& s) {
        meet(block, s, q, warp * kM, tile_of(n), first + warp * kM, key, whole);
      });
      block.sync();
    }
    block.template wait<0>();
    block.warps(state, [&](int warp, State<B>& s) { finish(block, s, head, first + warp * kM); });
  }

 private:
  template <class B>
  PARTITA_INLINE void meet(B& block, State<B>& s, const std::uint16_t* q, int q_row,
                           const std::uint16_t* tile, std::int64_t query, std::int64_t key,
                           bool whole) const {
    flash::Block<B, kM, kKeys> p;
    p.clear();
    flash::add_product<kType, kM, kKeys, kD>(block, q, q_row, tile, p);
    if (!whole) {
      flash::hide(block, p, key, [&](int row) { return keys_of_one(c.h, query + row); });
    }
    const float scale = c.h.scale * kLog2E;
    PARTITA_UNROLL
    for (int i = 0; i < kM / 16; ++i) {
      PARTITA_UNROLL
      for (int r = 0; r < 2; ++r) {
        float top[B::kLanes], away[B::kLanes], shrink[B::kLanes];
        PARTITA_UNROLL
        for (int l = 0; l < B::kLanes; ++l) {
          top[l] = s.top[i][r][l];
          PARTITA_UNROLL
          for (int j = 0; j < kKeys / 8; ++j)
            top[l] = fmaxf(top[l], fmaxf(p.at[i][j].v[l][2 * r], p.at[i][j].v[l][2 * r + 1]));
        }
        block.quad_max(top);
        PARTITA_UNROLL
        for (int l = 0; l < B::kLanes; ++l) {
          // Nothing seen so far: nothing is added, whatever is taken away.
          away[l] = top[l] == -INFINITY ? 0.0f : top[l] * scale;
          shrink[l] = power_of_2(fmaf(s.top[i][r][l], scale, -away[l]));
          s.top[i][r][l] = top[l];
          float sum = s.sum[i][r][l] * shrink[l];
          PARTITA_UNROLL
          for (int j = 0; j < kKeys / 8; ++j) {
            PARTITA_UNROLL
            for (int e = 2 * r; e < 2 * r + 2; ++e) {
              float& x = p.at[i][j].v[l][e];
              x = power_of_2(fmaf(x, scale, -away[l]));
              sum += x;
            }
          }
          s.sum[i][r][l] = sum;
          PARTITA_UNROLL
          for (int j = 0; j < kD / 8; ++j) {
            s.y.at[i][j].v[l][2 * r] *= shrink[l];
            s.y.at[i][j].v[l][2 * r + 1] *= shrink[l];
          }
        }
      }
    }
    flash::add_weighted<kType, kM, kKeys, kD>(block, p, tile + kKeys * kD, s.y);
  }
  /// y and its log-sum-exps. A sink joins the sum with no value, what was met before with y.
  template <class B>
  PARTITA_INLINE void finish(B& block, State<B>& s, const flash::Head& head,
                             std::int64_t query) const {
    const Heads& h = c.h;
    const float scale = h.scale * kLog2E;
    PARTITA_UNROLL
    for (int i = 0; i < kM / 16; ++i) {
      PARTITA_UNROLL
      for (int r = 0; r < 2; ++r) {
        block.quad_sum(s.sum[i][r]);
        PARTITA_UNROLL
        for (int l = 0; l < B::kLanes; ++l) {
          const int lane = block.lane(l);
          const std::int64_t at = query + flash::row_of(i, lane, 2 * r);
          if (at >= h.queries) continue;
          float other = -INFINITY;
          if (c.part) {
            other = c.lse[head.line(c) + at] * kLog2E;
          } else if (!(c.sinks == nullptr)) {
            other = c.sinks[head.query_head] * kLog2E;
          }
          const float mine = s.top[i][r][l] == -INFINITY ? -INFINITY : s.top[i][r][l] * scale,
                      high = fmaxf(mine, other);
          const bool any = high != -INFINITY;
          const float by_mine = any ? power_of_2(mine - high) : 0.0f,
                      by_other = any ? power_of_2(other - high) : 0.0f;
          const float total = s.sum[i][r][l] * by_mine + by_other,
                      factor = any ? by_mine / total : 0.0f, rest = any ? by_other / total : 0.0f;
          std::uint16_t* y = c.y + head.output(c) + at * h.y_row;
          PARTITA_UNROLL
          for (int j = 0; j < kD / 8; ++j) {
            const int column = flash::column_of(j, lane, 0);
            if (column >= h.v_width) continue;
            float low = s.y.at[i][j].v[l][2 * r] * factor,
                  second = s.y.at[i][j].v[l][2 * r + 1] * factor;
            if (c.part) {
              low += flash::number<kType>(y[column]) * rest;
              second += flash::number<kType>(y[column + 1]) * rest;
            }
            *reinterpret_cast<std::uint32_t*>(y + column) = flash::pair<kType>(low, second);
          }
          // The four lanes of a row have read it: they are of one warp, and only here is it
          // written.
          s.sum[i][r][l] = any ? (high + log2f(total)) * kLn2 : -INFINITY;
        }
      }
    }
    block.warp_sync();
    if (c.lse == nullptr) return;
    PARTITA_UNROLL
    for (int i = 0; i < kM / 16; ++i) {
      PARTITA_UNROLL
      for (int r = 0; r < 2; ++r) {
        PARTITA_UNROLL
        for (int l = 0; l < B::kLanes; ++l) {
          const std::int64_t at = query + flash::row_of(i, block.lane(l), 2 * r);
          if (at < h.queries && block.lane(l) % 4 == 0) c.lse[head.line(c) + at] = s.sum[i][r][l];
        }
      }
    }
  }
};

/// Gradients of queries: a block has 128 of one head, and passes all keys in tiles of 32.
template <ElementType kType, int kD>
struct FlashQueries {
  static constexpr int kWarps = 4, kM = 32, kQueries = kWarps * kM, kKeys = 32;
  static constexpr int kWords = (2 * kQueries + 4 * kKeys) * kD;
  FlashCall c;

  PARTITA_BOTH std::int64_t tiles() const { return (c.h.queries + kQueries - 1) / kQueries; }
  std::int64_t blocks() const { return tiles() * c.h.samples * c.h.heads * c.h.group; }

  template <class B>
  struct State {
    flash::Block<B, kM, kD> dq;
    float lse[kM / 16][2][B::kLanes], along[kM / 16][2][B::kLanes];  ///< lse in powers of 2
  };
  template <class B>
  PARTITA_INLINE void operator()(B& block, std::int64_t number) const {
    const Heads& h = c.h;
    const std::int64_t first = (tiles() - 1 - number % tiles()) * kQueries,
                       end = first + kQueries < h.queries ? first + kQueries : h.queries,
                       all = number / tiles(), query_heads = h.heads * h.group;
    const flash::Head head{all / query_heads, all % query_heads, all % query_heads / h.group};
    const HeadRows keys = head.keys(c), values = head.values(c);
    const Span seen = keys_of(h, first, end);
    std::uint16_t *const q = block.shared(), *const dy = q + kQueries * kD;
    const auto tile_of = [&](std::int64_t n) {
      return q + (2 * kQueries + n % 2 * 2 * kKeys) * kD;
    };
    const auto bring_keys = [&](std::int64_t n) {
      flash::bring<kD, kKeys>(block, tile_of(n), keys, seen.first + n * kKeys);
      flash::bring<kD, kKeys>(block, tile_of(n) + kKeys * kD, values, seen.first + n * kKeys);
    };
    auto state = block.template kept<State<B>>([](State<B>& s) { s.dq.clear(); });
    block.warps(state, [&](int warp, State<B>& s) {
      PARTITA_UNROLL
      for (int i = 0; i < kM / 16; ++i) {
        PARTITA_UNROLL
        for (int r = 0; r < 2; ++r) {
          PARTITA_UNROLL
          for (int l = 0; l < B::kLanes; ++l) {
            const std::int64_t at = first + warp * kM + flash::row_of(i, block.lane(l), 2 * r);
            s.lse[i][r][l] = at < h.queries ? c.lse[head.line(c) + at] * kLog2E : 0.0f;
            s.along[i][r][l] = at < h.queries ? c.along[head.line(c) + at] : 0.0f;
          }
        }
      }
    });
    const std::int64_t steps =
        seen.end > seen.first ? (seen.end - seen.first + kKeys - 1) / kKeys : 0;
    flash::bring<kD, kQueries>(block, q, head.queries(c), first);
    flash::bring<kD, kQueries>(block, dy, head.slopes(c), first);
    if (steps > 0) bring_keys(0);
    block.commit();
    for (std::int64_t n = 0; n < steps; ++n) {
      if (n + 1 < steps) bring_keys(n + 1);
      block.commit();
      block.template wait<1>();
      block.sync();
      const std::int64_t key = seen.first + n * kKeys;
      const bool whole = key + kKeys <= seen.end && all_seen(h, {first, end}, {key, key + kKeys});
      const std::uint16_t* tile = tile_of(n);
      block.warps(state, [&](int warp, State<B>& s) {
        const std::int64_t query = first + warp * kM;
        flash::Block<B, kM, kKeys> p, dp;
        p.clear();
        flash::add_product<kType, kM, kKeys, kD>(block, q, warp * kM, tile, p);
        dp.clear();
        flash::add_product<kType, kM, kKeys, kD>(block, dy, warp * kM, tile + kKeys * kD, dp);
        if (!whole) {
          flash::hide(block, p, key, [&](int row) { return keys_of_one(h, query + row); });
        }
        const float scale = h.scale * kLog2E;
        PARTITA_UNROLL
        for (int i = 0; i < kM / 16; ++i) {
          PARTITA_UNROLL
          for (int j = 0; j < kKeys / 8; ++j) {
            PARTITA_UNROLL
            for (int l = 0; l < B::kLanes; ++l) {
              PARTITA_UNROLL
              for (int e = 0; e < 4; ++e) {
                const float x = p.at[i][j].v[l][e];
                const float share =
                    x == -INFINITY ? 0.0f : power_of_2(fmaf(x, scale, -s.lse[i][e / 2][l]));
                p.at[i][j].v[l][e] = share * (dp.at[i][j].v[l][e] - s.along[i][e / 2][l]);
              }
            }
          }
        }
        flash::add_weighted<kType, kM, kKeys, kD>(block, p, tile, s.dq);
      });
      block.sync();
    }
    block.template wait<0>();
    block.warps(state, [&](int warp, State<B>& s) {
      const std::int64_t query = first + warp * kM;
      flash::store<kType>(
          block, s.dq, h.scale,
          c.dq + (head.sample * h.queries + query) * h.q_row + head.query_head * h.width, h.q_row,
          h.queries - query, h.width, c.part);
    });
  }
};

/// Gradients of keys and values: a block has keys of one head, 16 for each of four warps (32 where
/// heads are narrow), and passes the queries of all heads of its group.
template <ElementType kType, int kD>
struct FlashKeys {
  static constexpr int kWarps = 4, kM = kD <= 64 ? 32 : 16, kKeys = kWarps * kM,
                       kQueries = kD <= 64 ? 32 : 64;
  /// A tile: queries, their output's gradients, their log-sum-exps, dy · y (in words of 4 bytes).
  static constexpr int kTile = 2 * kQueries * kD + 4 * kQueries,
                       kWords = 2 * kKeys * kD + 2 * kTile;
  FlashCall c;

  PARTITA_BOTH std::int64_t tiles() const { return (c.h.keys + kKeys - 1) / kKeys; }
  std::int64_t blocks() const { return tiles() * c.h.samples * c.h.heads; }

  template <class B>
  struct State {
    flash::Block<B, kM, kD> dk, dv;
  };
  template <class B>
  PARTITA_INLINE void operator()(B& block, std::int64_t number) const {
    const Heads& h = c.h;
    const std::int64_t first = number % tiles() * kKeys,
                       end = first + kKeys < h.keys ? first + kKeys : h.keys,
                       all = number / tiles(), sample = all / h.heads, head = all % h.heads;
    const Span seen = queries_of(h, first, end);
    std::uint16_t *const k = block.shared(), *const v = k + kKeys * kD;
    const auto tile_of = [&](std::int64_t n) { return k + 2 * kKeys * kD + n % 2 * kTile; };
    const std::int64_t each =
        seen.end > seen.first ? (seen.end - seen.first + kQueries - 1) / kQueries : 0;
    const auto query_of = [&](std::int64_t n) { return seen.first + n % each * kQueries; };
    const auto bring_queries = [&](std::int64_t n) {
      const flash::Head from{sample, head * h.group + n / each, head};
      const std::int64_t query = query_of(n);
      std::uint16_t* tile = tile_of(n);
      flash::bring<kD, kQueries>(block, tile, from.queries(c), query);
      flash::bring<kD, kQueries>(block, tile + kQueries * kD, from.slopes(c), query);
      auto* numbers = reinterpret_cast<float*>(tile + 2 * kQueries * kD);
      block.threads(2 * kQueries, [&](int i) {
        const float* list = i < kQueries ? c.lse : c.along;
        const std::int64_t at = query + i % kQueries;
        const bool there = at < h.queries;
        block.copy(numbers + i, list + from.line(c) + (there ? at : 0), there ? 4 : 0, 4);
      });
    };
    auto state = block.template kept<State<B>>([](State<B>& s) { s.dk.clear(), s.dv.clear(); });
    const std::int64_t steps = each * h.group;
    const flash::Head of_keys{sample, head * h.group, head};
    flash::bring<kD, kKeys>(block, k, of_keys.keys(c), first);
    flash::bring<kD, kKeys>(block, v, of_keys.values(c), first);
    if (steps > 0) bring_queries(0);
    block.commit();
    for (std::int64_t n = 0; n < steps; ++n) {
      if (n + 1 < steps) bring_queries(n + 1);
      block.commit();
      block.template wait<1>();
      block.sync();
      const std::int64_t query = query_of(n),
                         last = query + kQueries < seen.end ? query + kQueries : seen.end;
      // Queries beyond the last have zeros for all they are multiplied with.
      const bool whole = all_seen(h, {query, last}, {first, end}) && last == query + kQueries;
      const std::uint16_t* tile = tile_of(n);
      const auto* numbers = reinterpret_cast<const float*>(tile + 2 * kQueries * kD);
      block.warps(state, [&](int warp, State<B>& s) {
        const std::int64_t key = first + warp * kM;
        // Of keys by queries: the scores' transpose.
        flash::Block<B, kM, kQueries> p, dp;
        p.clear();
        flash::add_product<kType, kM, kQueries, kD>(block, k, warp * kM, tile, p);
        if (!whole) {
          flash::hide(block, p, query, [&](int row) {
            return key + row < h.keys ? queries_of(h, key + row, key + row + 1) : Span{0, 0};
          });
        }
        const float scale = h.scale * kLog2E;
        flash::for_each(block, p, [&](int, int column, float& x) {
          x = x == -INFINITY ? 0.0f : power_of_2(fmaf(x, scale, -numbers[column] * kLog2E));
        });
        flash::add_weighted<kType, kM, kQueries, kD>(block, p, tile + kQueries * kD, s.dv);
        dp.clear();
        flash::add_product<kType, kM, kQueries, kD>(block, v, warp * kM, tile + kQueries * kD, dp);
        PARTITA_UNROLL
        for (int i = 0; i < kM / 16; ++i) {
          PARTITA_UNROLL
          for (int j = 0; j < kQueries / 8; ++j) {
            PARTITA_UNROLL
            for (int l = 0; l < B::kLanes; ++l) {
              PARTITA_UNROLL
              for (int e = 0; e < 4; ++e) {
                const float along = numbers[kQueries + flash::column_of(j, block.lane(l), e)];
                p.at[i][j].v[l][e] *= dp.at[i][j].v[l][e] - along;
              }
            }
          }
        }
        flash::add_weighted<kType, kM, kQueries, kD>(block, p, tile, s.dk);
      });
      block.sync();
    }
    block.template wait<0>();
    block.warps(state, [&](int warp, State<B>& s) {
      const std::int64_t key = first + warp * kM;
      flash::store<kType>(block, s.dk, h.scale,
                          c.dk + (sample * h.keys + key) * h.k_row + head * h.width, h.k_row,
                          h.keys - key, h.width, c.part);
      flash::store<kType>(block, s.dv, 1.0f,
                          c.dv + (sample * h.keys + key) * h.v_row + head * h.v_width, h.v_row,
                          h.keys - key, h.v_width, c.part);
    });
  }
};

/// f(kernel) with the kernel of that pass, type and width (of 64 numbers a head or 128, the rest
/// zeros).
template <class F>
void with_flash_kernel(const FlashCall& c, FlashPass pass, F f) {
  const auto of = [&](auto type, auto width) {
    constexpr ElementType kType = decltype(type)::value;
    constexpr int kD = decltype(width)::value;
    switch (pass) {
      case FlashPass::forward:
        return f(FlashForward<kType, kD>{c});
      case FlashPass::queries:
        return f(FlashQueries<kType, kD>{c});
      case FlashPass::keys:
        return f(FlashKeys<kType, kD>{c});
      case FlashPass::backward:
        return;
    }
  };
  using Bf16 = std::integral_constant<ElementType, ElementType::bf16>;
  using Fp16 = std::integral_constant<ElementType, ElementType::fp16>;
  const bool narrow = c.h.width <= 64 && c.h.v_width <= 64;
  const auto of_type = [&](auto type) {
    if (narrow) {
      of(type, std::integral_constant<int, 64>{});
    } else {
      of(type, std::integral_constant<int, 128>{});
    }
  };
  if (c.type == ElementType::bf16) {
    of_type(Bf16{});
  } else {
    of_type(Fp16{});
  }
}
/// Heads whose rows are whole pieces of 16 bytes, at most 128 wide; scores that grow with products.
inline bool has_flash(const FlashCall& c) {
  const auto fits = [](std::int64_t width) { return width % 8 == 0 && width > 0 && width <= 128; };
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  return c.type != ElementType::fp32 && fits(c.h.width) && fits(c.h.v_width) && c.h.scale > 0 &&
         c.h.samples * c.h.queries * c.h.keys * c.h.heads * c.h.group > 0 && aligned(c.q) &&
         aligned(c.k) && aligned(c.v) && aligned(c.y) && aligned(c.dy) && aligned(c.dq) &&
         aligned(c.dk) && aligned(c.dv);
}

}  // namespace partita::cuda
