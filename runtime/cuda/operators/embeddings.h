// runtime/cuda/operators/embeddings.h: tables of tokens and positions (../operators.h).
#pragma once

#include <cstdint>
#include <utility>

#include "runtime/cuda/operands.h"

namespace partita::cuda {

template <class M>
bool forward(M& m, const Embedding&, const Context&, const Arguments& a) {
  const Tensor &ids = a.inputs[0], &table = a.parameters[0];
  if (ids.ids == nullptr) return false;
  const std::int64_t n = extent(table, 1, 2);
  const IndexList held = m.list((*table.index)[0]);
  const std::int64_t* id = ids.ids;
  const Numbers w = numbers(table);
  const Numbers y = numbers(a.results[0]);
  each_of_rows(
      m, ids.size(), n, PARTITA_KERNEL(std::int64_t at, std::int64_t first, std::int64_t count) {
        const std::int64_t row = held.find(id[at]);
        put(y, at * n + first, count, row < 0 ? Octet{} : octet(w, row * n + first, count));
      });
  return true;
}
template <class M>
bool data(M&, const Embedding&, const Context&, const Arguments& a) {
  return !wanted(a, 0);
}
/// Of a table of few rows (segments, say), whose chains would be too long for one block each: every
/// row's sum over all tokens, in two stages so that its order is fixed.
template <class M>
void sum_few_rows(M& m, const std::int64_t* id, std::int64_t tokens, const IndexList& held,
                  Numbers dy, std::int64_t n, Numbers w, bool accumulate) {
  const std::int64_t rows = held.size, chunk = 64, chunks = (tokens + chunk - 1) / chunk;
  float* parts = m.scratch(chunks * rows * n);
  m.each(
      chunks * rows * n, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t f = i % n, row = i / n % rows, first = i / (n * rows) * chunk,
                           end = first + chunk < tokens ? first + chunk : tokens,
                           wanted = held.at(row);
        float sum = 0;
        for (std::int64_t t = first; t < end; ++t) {
          if (id[t] == wanted) sum += dy[t * n + f];
        }
        parts[i] = sum;
      });
  m.each(
      rows * n, PARTITA_KERNEL(std::int64_t i) {
        float sum = 0;
        for (std::int64_t k = 0; k < chunks; ++k) sum += parts[k * rows * n + i];
        w[i] = accumulate ? w[i] + sum : sum;
      });
}
/// Tokens in the order of their rows, of one row in their own.
struct TokensByRow {
  std::int32_t *row, *token;
};
/// A token goes where its rank in its run is, then where it is in so many runs at a time: each
/// looks for its place in the others, of which those before it go first where rows are equal.
template <class M>
TokensByRow sorted_by_row(M& m, const std::int64_t* id, std::int64_t tokens,
                          const IndexList& held) {
  constexpr std::int64_t kRun = 64, kRuns = 8;
  // Rows and tokens below 2^31, as words.
  auto* const words = reinterpret_cast<std::int32_t*>(m.scratch(4 * tokens));
  TokensByRow from{words, words + tokens}, to{words + 2 * tokens, words + 3 * tokens};
  m.each(
      tokens, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t row = held.find(id[i]);
        from.row[i] = static_cast<std::int32_t>(row < 0 ? held.size : row);
      });
  m.each(
      tokens, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t first = i / kRun * kRun,
                           end = first + kRun < tokens ? first + kRun : tokens;
        const std::int32_t row = from.row[i];
        std::int64_t at = first;
        for (std::int64_t j = first; j < end; ++j)
          at += from.row[j] < row || (from.row[j] == row && j < i) ? 1 : 0;
        to.row[at] = row;
        to.token[at] = static_cast<std::int32_t>(i);
      });
  for (std::int64_t run = kRun; run < tokens; run *= kRuns) {
    std::swap(from, to);
    m.each(
        tokens, PARTITA_KERNEL(std::int64_t i) {
          const std::int64_t mine = i / run, all = mine / kRuns * kRuns;
          const std::int32_t row = from.row[i];
          std::int64_t at = all * run + i % run;
          for (std::int64_t r = all; r < all + kRuns && r * run < tokens; ++r) {
            const std::int64_t left = tokens - r * run;
            if (r != mine)
              at +=
                  not_below(from.row + r * run, left < run ? left : run, row + (r < mine ? 1 : 0));
          }
          to.row[at] = row;
          to.token[at] = from.token[i];
        });
  }
  return to;
}
/// Sums of rows' tokens, in two stages so that one row of many tokens keeps many threads busy: by
/// chunks of the tokens in their rows' order, then of what lies in several chunks.
template <class M>
void sum_sorted(M& m, const TokensByRow& by, std::int64_t tokens, std::int64_t rows, Numbers dy,
                std::int64_t n, Numbers w, bool accumulate) {
  constexpr std::int64_t kChunk = 32, kAtOnce = 4;
  const std::int64_t chunks = (tokens + kChunk - 1) / kChunk;
  // Of a chunk's first row, if it begins before it; of its last, if it begins in it and goes on.
  const Numbers heads = m.scratch(chunks * n), tails = m.scratch(chunks * n);
  each_of_rows(
      m, chunks, n, PARTITA_KERNEL(std::int64_t chunk, std::int64_t first, std::int64_t count) {
        const std::int64_t begin = chunk * kChunk,
                           end = begin + kChunk < tokens ? begin + kChunk : tokens;
        std::int32_t row = by.row[begin];
        bool head = begin > 0 && by.row[begin - 1] == row;
        const bool goes_on = end < tokens && by.row[end - 1] == by.row[end];
        Octet sum{};
        const auto give = [&](bool tail) {
          if (row == rows) return;
          if (head || tail) {
            put(head ? heads : tails, chunk * n + first, count, sum);
            return;
          }
          const std::int64_t at = row * n + first;
          if (accumulate) {
            const Octet had = octet(w, at, count);
            for (int e = 0; e < Octet::kSize; ++e) sum.v[e] = had.v[e] + sum.v[e];
          }
          put(w, at, count, sum);
        };
        for (std::int64_t t = begin; t < end; t += kAtOnce) {
          Raw raw[kAtOnce];
          PARTITA_UNROLL
          for (std::int64_t k = 0; k < kAtOnce; ++k) {
            const std::int64_t at = t + k < end ? t + k : end - 1;
            raw[k] = raw_octet(dy, by.token[at] * n + first, count);
          }
          PARTITA_UNROLL
          for (std::int64_t k = 0; k < kAtOnce; ++k) {
            if (t + k >= end) break;
            if (by.row[t + k] != row) {
              give(false);
              head = false, row = by.row[t + k], sum = Octet{};
            }
            const Octet o = octet_of(raw[k], dy.type());
            for (int e = 0; e < Octet::kSize; ++e) sum.v[e] += o.v[e];
          }
        }
        give(goes_on);
      });
  each_of_rows(
      m, chunks, n, PARTITA_KERNEL(std::int64_t chunk, std::int64_t first, std::int64_t count) {
        const std::int64_t begin = chunk * kChunk, end = begin + kChunk;
        if (end >= tokens || by.row[end - 1] != by.row[end]) return;
        const std::int32_t row = by.row[end - 1];
        // It begins in an earlier chunk, or is of no row here.
        if (row == rows || (begin > 0 && by.row[begin - 1] == row)) return;
        const std::int64_t last =
            (end + not_below(by.row + end, tokens - end, row + 1) - 1) / kChunk;
        Octet sum = octet(tails, chunk * n + first, count);
        for (std::int64_t c = chunk + 1; c <= last; c += kAtOnce) {
          Raw raw[kAtOnce];
          PARTITA_UNROLL
          for (std::int64_t k = 0; k < kAtOnce; ++k)
            raw[k] = raw_octet(heads, (c + k < last ? c + k : last) * n + first, count);
          PARTITA_UNROLL
          for (std::int64_t k = 0; k < kAtOnce; ++k) {
            if (c + k > last) break;
            const Octet o = octet_of(raw[k], ElementType::fp32);
            for (int e = 0; e < Octet::kSize; ++e) sum.v[e] += o.v[e];
          }
        }
        const std::int64_t at = row * n + first;
        if (accumulate) {
          const Octet had = octet(w, at, count);
          for (int e = 0; e < Octet::kSize; ++e) sum.v[e] = had.v[e] + sum.v[e];
        }
        put(w, at, count, sum);
      });
}
template <class M>
bool weight(M& m, const Embedding&, const Context&, const Arguments& a) {
  const Tensor &ids = a.inputs[0], &table = a.results[0];
  if (ids.ids == nullptr) return false;
  const std::int64_t n = extent(table, 1, 2), tokens = ids.size();
  const IndexList held = m.list((*table.index)[0]);
  const std::int64_t* id = ids.ids;
  const Numbers dy = numbers(a.output_gradients[0]);
  const Numbers w = numbers(table);
  constexpr std::int64_t kFewRows = 4;
  if (held.size <= kFewRows) {
    sum_few_rows(m, id, tokens, held, dy, n, w, a.accumulate);
    return true;
  }
  if (!a.accumulate) fill_values(m, w, table.size(), 0);
  sum_sorted(m, sorted_by_row(m, id, tokens, held), tokens, held.size, dy, n, w, a.accumulate);
  return true;
}
template <class M>
bool forward(M& m, const PositionEmbedding&, const Context&, const Arguments& a) {
  const Tensor &x = a.inputs[0], &table = a.parameters[0];
  const std::int64_t n = extent(x, 2, 3), tokens = extent(x, 1, 2);
  const IndexList held = m.list((*table.index)[0]), positions = m.list((*x.index)[1]);
  const Numbers from = numbers(x), w = numbers(table);
  const Numbers y = numbers(a.results[0]);
  each_of_rows(
      m, x.size() / n, n, PARTITA_KERNEL(std::int64_t at, std::int64_t first, std::int64_t count) {
        const Octet a_part = octet(from, at * n + first, count),
                    place = octet(w, held.find(positions.at(at % tokens)) * n + first, count);
        Octet to;
        for (int k = 0; k < Octet::kSize; ++k) to.v[k] = a_part.v[k] + place.v[k];
        put(y, at * n + first, count, to);
      });
  return true;
}
template <class M>
bool weight(M& m, const PositionEmbedding&, const Context&, const Arguments& a) {
  const Tensor &dy = a.output_gradients[0], &table = a.results[0];
  const std::int64_t n = extent(dy, 2, 3), tokens = extent(dy, 1, 2), samples = extent(dy, 0, 1);
  const bool accumulate = a.accumulate;
  const IndexList held = m.list((*table.index)[0]), positions = m.list((*dy.index)[1]);
  const Numbers d = numbers(dy);
  const Numbers w = numbers(table);
  m.each(
      table.size(), PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t token = positions.find(held.at(i / n));
        float sum = accumulate ? w[i] : 0.0f;
        for (std::int64_t s = 0; s < samples && token >= 0; ++s)
          sum += d[(s * tokens + token) * n + i % n];
        w[i] = sum;
      });
  return true;
}

}  // namespace partita::cuda
