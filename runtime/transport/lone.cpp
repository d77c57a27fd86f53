#include "runtime/transport/lone.h"

#include <cstring>

namespace partita {
namespace {

class Lone : public Transport {
 public:
  Lone(int rank, int size) : rank_(rank), size_(size) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string name() const override { return "alone"; }
  void send(int, std::int64_t, const void*, std::size_t) override {}
  void receive(int, std::int64_t, void* data, std::size_t bytes) override {
    if (bytes > 0) std::memset(data, 0, bytes);
  }
  void collective(const CollectiveCall&) override {}
  void barrier() override {}
  void abort(const std::string&, int) override {}
  void doing(const std::string&) override {}
  bool one_clock() const override { return true; }

 private:
  int rank_, size_;
};

}  // namespace

std::unique_ptr<Transport> lone_transport(int rank, int size) {
  return std::make_unique<Lone>(rank, size);
}

}  // namespace partita
