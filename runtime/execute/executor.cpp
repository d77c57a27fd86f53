#include "runtime/execute/executor.h"

#include <fmt/format.h>

#include <algorithm>

#include "runtime/execute/rank.h"
#include "runtime/transport/lone.h"
#include "simulator/program/routing.h"

namespace partita::execute {
namespace {

/// What rank 0 makes of what all ranks say; on all ranks.
std::string of_all(Transport& t, const std::string& mine,
                   const std::function<std::string(std::vector<std::string>)>& make) {
  const auto send = [&](int to, const std::string& text) {
    const std::uint64_t size = text.size();
    t.send(to, kLinksTag, &size, sizeof size);
    if (size > 0) t.send(to, kLinksTag, text.data(), size);
  };
  const auto receive = [&](int from) {
    std::uint64_t size = 0;
    t.receive(from, kLinksTag, &size, sizeof size);
    std::string text(size, ' ');
    if (size > 0) t.receive(from, kLinksTag, text.data(), size);
    return text;
  };
  if (t.rank() != 0) {
    send(0, mine);
    return receive(0);
  }
  std::vector<std::string> said{mine};
  for (int r = 1; r < t.size(); ++r) said.push_back(receive(r));
  const std::string made = make(std::move(said));
  for (int r = 1; r < t.size(); ++r) send(r, made);
  return made;
}

/// What the first rank that says anything says; on all ranks.
std::string first_said(Transport& t, const std::string& mine) {
  return of_all(t, mine, [](const std::vector<std::string>& said) {
    const auto it = std::find_if(said.begin(), said.end(), [](auto& s) { return !s.empty(); });
    return it != said.end() ? *it : std::string();
  });
}

}  // namespace

Executor::Executor(const Program& p, Transport& transport, Device& device, const Options& o)
    : p_(p),
      transport_(transport),
      device_(device),
      o_(o),
      rank_(transport.rank()),
      first_timed_(o.warm_up + o.captured_steps),
      memory_(device, false),
      host_memory_(device, true),
      inputs_memory_(device, true),
      order_(device),
      links_(o.alone ? nullptr : device.links()) {
  PARTITA_ASSERT(p.ranks() == transport.size(),
                 fmt::format("{} ranks for {}", transport.size(), p.ranks()));
  device_.make_room = [this] {
    device_.finish();
    if (!device_.not_captured().empty()) mid_step_wait_ = device_.not_captured();
    memory_.release_kept();
  };
  stage_ = p.stage_of(rank_);
  slots_.resize(p.buffers.size());
  boxes_.resize(p.buffers.size());
  offset_.assign(p.buffers.size(), 0);
  prepare();
  if (transport_.size() > 1 && links_ != nullptr) {
    transport_.doing("the meeting of devices");
    result_.no_links = first_said(transport_, links_->open(transport_));
    if (result_.no_links.empty()) {
      links_->meet(transport_, channels_of(p));
      if (o.estimates) result_.estimates = links_->estimates();
    } else {
      links_->leave();
      links_ = nullptr;
    }
  }
}

Executor::~Executor() {
  device_.make_room = nullptr;
  for (std::size_t b = 0; b < slots_.size(); ++b) {
    for (Instance& i : slots_[b]) give_back(BufferId{b}, i);
  }
}

RankResult Executor::run() {
  try {
    return run_steps();
  } catch (const PeerError&) {
    // Links know that a peer is gone, the transport which, where and why.
    if (links_ != nullptr) transport_.barrier();
    throw;
  } catch (const MachineError& e) {
    throw MachineError(at_instruction(e.what()));
  } catch (const std::bad_alloc&) {
    throw MachineError(at_instruction("out of memory; use a smaller network, batch or plan"));
  }
}

std::string Executor::at_instruction(const std::string& why) const {
  const std::string where = step_ == first_timed_ + o_.steps
                                ? std::string("the end of the run")
                                : place(p_, rank_, step_, instruction_);
  return fmt::format("rank {} in {}{}: {}", rank_, where, o_.name.empty() ? "" : " of " + o_.name,
                     why);
}

RankResult Executor::run_steps() {
  losses_.clear();
  const int all = first_timed_ + o_.steps;
  const auto clock = [this] { return now().time_since_epoch().count(); };
  ClockReading clock_before;
  std::vector<std::int64_t> starts;
  constexpr int kMostBefore = 1000;
  if (o_.warm_up_s > 0 && (transport_.size() == 1 || o_.alone) && !o_.collect) {
    auto start = now();
    for (int k = 0; k < kMostBefore; ++k) {
      further_step();
      if (k == 0) {
        // Its time went to what libraries build and load, beside which a device rests.
        start = now();
        continue;
      }
      if (std::chrono::duration<double>(now() - start).count() >= o_.warm_up_s) break;
    }
    take_one_way();  // at the clock that it has from now on
    untimed_ = false;
  }
  for (step_ = 0; step_ < all; ++step_) {
    last_step_ = step_ + 1 == all;
    transport_.doing("the start of a step");
    come_to(-1);
    make_inputs();
    come_to(-1);
    const bool captured = step_ >= o_.warm_up && step_ < first_timed_ && captures();
    if (o_.record && step_ == first_timed_)
      clock_before = read_clocks(transport_, kClockTag, clock);
    transport_.barrier();
    transport_.reset_traffic();
    if (links_ != nullptr) links_->reset_traffic();
    // Steps differ in the rows that experts get: each has its own peak.
    if (step_ >= first_timed_) memory_.forget_peak();
    if (step_ == first_timed_) host_memory_.forget_peak();
    const auto start = now();
    step_start_ = start;
    losses_.push_back(0);
    if (o_.record && step_ >= first_timed_) result_.measured.samples.emplace_back();
    if (captured) {
      launch_captured();
    } else {
      device_.begin_marks();
      one_step();
    }
    finish();
    if (o_.record && step_ >= first_timed_) resolve_marks();
    const std::chrono::duration<double> took = now() - start;
    RankMeasurement& m = result_.measured;
    m.traffic = transport_.traffic();
    if (links_ != nullptr) add_traffic(links_->traffic(), m.traffic);
    if (captured) m.captured_s.push_back(took.count());
    if (step_ >= first_timed_) {
      m.step_s.push_back(took.count());
      starts.push_back(start.time_since_epoch().count());
      m.last_peak = memory_.peak();
      m.last_at_peak = memory_.at_peak();
      if (m.last_peak > m.peak) m.peak = m.last_peak, m.at_peak = m.last_at_peak;
    }
    if (step_ == 0 && (!last_step_ || o_.plain_steps > 0)) take_one_way();
    if (o_.progress) tell_progress(took.count());
    // Making the next inputs is nobody's step: not that of a rank whose core it would take
    // either.
    if (o_.record) transport_.barrier();
  }
  result_.measured.rank = rank_;
  result_.measured.host_peak = host_memory_.peak();
  result_.reserved = memory_.reserved();
  result_.beside = Bytes{std::max<std::int64_t>(
      0, device_.taken() - device_.taken_by_blocks(memory_.reserved().count))};
  result_.measured.reserved = result_.reserved;
  OutsideMemory& outside = result_.measured.outside;
  outside = device_.outside();
  const Bytes named = outside.libraries + outside.workspace + outside.communicators;
  outside.kernels = std::max(Bytes{0}, result_.beside - named);
  result_.fallbacks = device_.fallbacks();
  result_.products = device_.products();
  if (o_.record) {
    transport_.doing("the reading of clocks");
    const ClockReading clock_after = read_clocks(transport_, kClockTag, clock);
    put_on_one_clock(transport_, kClockTag, {clock_before, clock_after}, starts, result_.measured);
  }
  // Values and memory are those of the steps so far.
  if (!o_.alone) collect();
  if (o_.plain_steps > 0) time_plain_steps();
  if (o_.recorded_steps > 0) record_steps();
  if (o_.alone) return std::move(result_);
  collect_measurements();
  if (o_.routing) collect_routing();
  return std::move(result_);
}

void Executor::take_one_way() {
  if (device_.is_host() || std::exchange(one_way_, true)) return;
  transport_.doing("the choice of algorithms");
  const Transport::Uncounted uncounted(transport_);
  // To find them may give kept memory back, which waits once more.
  const std::string waited = device_.not_captured(), mine = device_.found_best();
  const auto make = [this](const auto& of_ranks) { return device_.common(of_ranks); };
  device_.take_common(o_.alone ? make(std::vector<std::string>{mine})
                               : of_all(transport_, mine, make));
  if (mid_step_wait_.empty() && device_.not_captured() != waited) mid_step_wait_ = waited;
}

bool Executor::captures() {
  if (step_ == o_.warm_up) result_.no_graph = why_not_captured();
  if (!result_.no_graph.empty()) return false;
  if (device_.has_capture()) return true;
  std::string why;
  try {
    device_.begin_capture();
    one_step();
    device_.end_capture();
  } catch (const MachineError& e) {
    why = e.what();
  }
  if (transport_.size() > 1 && !o_.alone) why = first_said(transport_, why);
  captured_losses_ = std::move(step_losses_);
  step_losses_.clear();
  come_to(-1);
  if (why.empty()) return true;
  // The next step begins as if that had not.
  device_.drop_capture();
  order_.forget();
  for (std::size_t b = 0; b < slots_.size(); ++b) {
    const Buffer& buffer = p_.buffers[b];
    if (buffer.scope == Scope::step && buffer.category != Category::workspace) continue;
    for (Instance& i : slots_[b]) {
      give_back(BufferId{b}, i);
      i = {};
    }
  }
  result_.no_graph = why;
  return false;
}

std::string Executor::why_not_captured() {
  const bool alone = transport_.size() == 1 || o_.alone;
  std::string why = step_ == 0                    ? "no step went before it"
                    : !alone && links_ == nullptr ? "messages pass through the host"
                                                  : "";
  for (const BlockCall& call : p_.stages[static_cast<std::size_t>(stage_)]) {
    if (!why.empty()) break;
    for (const Instruction& i : p_.blocks[call.block.index()].instructions) {
      if (!alone && (i.kind == Kind::send || i.kind == Kind::receive))
        why =
            "messages of a pipeline wait for each other, and branches of a graph need not go on "
            "beside each other";
      if (i.every > 1) why = fmt::format("parameters are averaged every {} steps", i.every);
      if (i.kind == Kind::compute && i.kernel == Kernel::dequeue)
        why = "gradients wait in a queue, whose place is another one each step";
    }
  }
  if (why.empty()) why = device_.not_captured();
  if (why.empty()) why = mid_step_wait_;
  return alone ? why : first_said(transport_, why);
}

void Executor::launch_captured() {
  std::vector<const void*> brought;
  for (const BlockCall& call : p_.stages[static_cast<std::size_t>(stage_)]) {
    for (const Instruction& i : p_.blocks[call.block.index()].instructions) {
      if (i.kind == Kind::load && box(i.writes[0]).held)
        brought.push_back(inputs_.at({i.writes[0], call.micro_batch}).data());
    }
  }
  device_.launch_captured(step_, brought);
  captured_ = true;
}

double Executor::further_step() {
  untimed_ = true;
  transport_.doing("the start of a step");
  come_to(-1);
  make_inputs();
  device_.finish();
  transport_.barrier();
  const auto start = now();
  step_start_ = start;
  losses_.push_back(0);
  one_step();
  queued_ = std::chrono::duration<double>(now() - start).count();
  finish();
  losses_.pop_back();
  ++step_;
  return std::chrono::duration<double>(now() - start).count();
}

void Executor::time_plain_steps() {
  RankMeasurement& m = result_.measured;
  for (int k = 0; k < o_.plain_steps; ++k) {
    m.plain_s.push_back(further_step());
    if (device_.not_captured().empty()) m.queued_s.push_back(queued_);
  }
}

void Executor::record_steps() {
  PARTITA_ASSERT((transport_.size() == 1 || o_.alone) && o_.record,
                 "recorded steps are one rank's");
  RankMeasurement& m = result_.measured;
  m.no_kernel_ns = device_.record_kernels(true);
  if (!m.no_kernel_ns.empty()) return;
  // At the clock of the steps that are timed: whoever records attaches first, and the device has
  // rested. So under load again, and no step's records are asked for before the last is over.
  const auto start = now();
  while (std::chrono::duration<double>(now() - start).count() < o_.warm_up_s) further_step();
  std::vector<std::int64_t> ends;
  tag_ = 0;
  for (int k = 0; k < o_.recorded_steps; ++k) {
    m.recorded_s.push_back(further_step());
    ends.push_back(tag_);
  }
  const auto recorded = device_.recorded();
  tag_ = -1;
  std::int64_t begin = 0;
  for (const std::int64_t end : ends) {
    m.kernel_ns.emplace_back(static_cast<std::size_t>(end - begin), 0);
    begin = end;
  }
  for (const auto& [tag, ns] : recorded) {
    const auto step = static_cast<std::size_t>(
        std::upper_bound(ends.begin(), ends.end(), static_cast<std::int64_t>(tag)) - ends.begin());
    PARTITA_ASSERT(step < ends.size(), fmt::format("a record of {}", tag));
    const std::int64_t before = step == 0 ? 0 : ends[step - 1];
    m.kernel_ns[step].at(static_cast<std::size_t>(static_cast<std::int64_t>(tag) - before)) = ns;
  }
  static_cast<void>(device_.record_kernels(false));
}

void Executor::add_traffic(const Traffic& from, Traffic& to) {
  for (const auto& [kind, c] : from.collectives) {
    to.collectives[kind].calls += c.calls;
    to.collectives[kind].payload_bytes += c.payload_bytes;
  }
  to.sends += from.sends;
  to.send_bytes += from.send_bytes;
}

void Executor::come_to(std::int64_t instruction) {
  instruction_ = instruction;
  transport_.at(step_, instruction);
}

RankResult run_rank(const Program& program, Transport& transport, const Options& options) {
  const auto device = options.device ? options.device(transport.rank()) : host_device();
  return Executor(program, transport, *device, options).run();
}

RankResult run_alone(const Program& program, int rank, Options options) {
  PARTITA_ASSERT(rank >= 0 && rank < program.ranks(), fmt::format("rank {}", rank));
  options.alone = options.drawn = options.balanced_rows = true;
  options.collect = options.routing = false;
  options.progress = nullptr;
  const auto transport = lone_transport(rank, static_cast<int>(program.ranks()));
  return run_rank(program, *transport, options);
}

}  // namespace partita::execute
