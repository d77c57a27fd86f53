// bench/products_between_points.cpp: how far published products are off that are predicted from
// some of them, drawn at random (docs/cost.md, "Measured").
//
//   products_between_points ../shared/reference/gemm.csv
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <string>

#include "simulator/cost/measured.h"
#include "validation/csv.h"

namespace partita {
namespace {

int multiprocessors_of(const std::string& gpu) {
  return gpu[0] == 'H' ? 132 : gpu[0] == 'B' ? 148 : 108;
}

std::map<std::string, std::vector<KernelPoint>> products_of(const char* file) {
  std::ifstream in(file);
  const validation::CsvTable table =
      validation::parse_csv(std::string{std::istreambuf_iterator<char>(in), {}}, file);
  const auto column = [&](const char* name) {
    return static_cast<std::size_t>(std::find(table.header.begin(), table.header.end(), name) -
                                    table.header.begin());
  };
  std::map<std::string, std::vector<KernelPoint>> all;
  for (const auto& record : table.records) {
    const auto text = [&](const char* name) { return record.fields.at(column(name)); };
    const std::string gpu = text("gpu");
    const bool xla = gpu == "H100 (sm_90)";
    if (!xla && gpu != "B200 SXM" && gpu != "A100 PCIe 80GB") continue;
    if (text("m").empty() || text("n").empty() || text("k").empty() || text("time_s").empty() ||
        (!xla && text("layout") != "TN"))
      continue;
    const std::string batch = text("batch_or_groups");
    all[gpu + ", " + text("precision").substr(0, 4)].push_back(
        {1, std::stod(text("m")), std::stod(text("n")), std::stod(text("k")),
         batch.empty() ? 1 : std::stod(batch), 0, Seconds{std::stod(text("time_s"))}, 0});
  }
  return all;
}

void print(const std::string& name, std::vector<KernelPoint> points, std::size_t known) {
  constexpr int kDraws = 8;
  constexpr std::size_t kPredicted = 100;
  for (const int multiprocessors : {0, multiprocessors_of(name)}) {
    double mean = 0, bias = 0, time = 0;
    std::size_t n = 0;
    for (int draw = 0; draw < kDraws; ++draw) {
      std::mt19937 rng(static_cast<unsigned>(draw));
      std::sort(points.begin(), points.end(), [](const KernelPoint& a, const KernelPoint& b) {
        return std::tuple(a.m, a.n, a.k, a.count, a.time.count) <
               std::tuple(b.m, b.n, b.k, b.count, b.time.count);
      });
      std::shuffle(points.begin(), points.end(), rng);
      const auto some = points.begin() + static_cast<std::ptrdiff_t>(known);
      const KernelTable table{{"linear forward bf16", {points.begin(), some}}};
      for (auto p = some; p != points.end() && p - some < static_cast<std::ptrdiff_t>(kPredicted);
           ++p) {
        const KernelShape shape{"linear forward bf16", p->m, p->n, p->k, p->count, 0};
        const double t = measured_time(table, shape, 1, multiprocessors)->count;
        mean += std::abs(t / p->time.count - 1);
        bias += t - p->time.count;
        time += p->time.count;
        ++n;
      }
    }
    fmt::print("{:<24} {:>4} by {:>2} {:<12} {:5.1f} % in the mean, bias of all time {:+5.1f} %\n",
               name, points.size(), known, multiprocessors == 0 ? "as FLOPs" : "with a trend",
               100 * mean / static_cast<double>(n), 100 * bias / time);
  }
}

}  // namespace
}  // namespace partita

int main(int count, char** arguments) {
  if (count != 2) {
    std::fputs("products_between_points GEMM.csv\n", stderr);
    return 2;
  }
  for (const auto& [name, points] : partita::products_of(arguments[1])) {
    for (const std::size_t known : {8u, 15u, 30u, 60u}) {
      if (points.size() > known) partita::print(name, points, known);
    }
  }
  return 0;
}
