// Ranks over sockets: each rank here is a thread with a transport of its own, which shares nothing
// with the others but loopback.
#include "runtime/transport/tcp.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <thread>

#include "base/error.h"
#include "runtime/transport/socket.h"

namespace partita {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

/// How a rank ended: "", "peer ...", "elsewhere 3 ...", "input ...".
using Ends = std::vector<std::string>;
using Work = std::function<void(Transport&)>;

std::string end_of(const std::function<void()>& work) {
  try {
    work();
    return "";
  } catch (const ToldElsewhere& e) {
    return fmt::format("elsewhere {} {}", e.code, e.what());
  } catch (const PeerError& e) {
    return fmt::format("peer {}", e.what());
  } catch (const InputError& e) {
    return fmt::format("input {}", e.what());
  }
}

TcpOptions options_of(int rank, int size, const Listening& l, double timeout_s = 10) {
  TcpOptions o;
  o.rank = rank;
  o.size = size;
  o.port = l.port;
  if (rank == 0) o.listener = l.socket;
  o.key = "network test; steps 3;";
  o.timeout_s = timeout_s;
  o.rendezvous_s = 10;
  return o;
}

/// `options`: by rank; absent ranks never come.
Ends run_ranks(int size, const std::function<bool(int, TcpOptions&)>& change, const Work& work,
               double timeout_s = 10) {
  const Listening l = listen_on_loopback(size);
  Ends ends(static_cast<std::size_t>(size), "absent");
  std::vector<std::thread> threads;
  for (int r = 0; r < size; ++r) {
    TcpOptions o = options_of(r, size, l, timeout_s);
    if (change && !change(r, o)) continue;
    threads.emplace_back([&, o, r] {
      ends[static_cast<std::size_t>(r)] = end_of([&] {
        const auto t = tcp_transport(o);
        work(*t);
        t->leave();
      });
    });
  }
  for (auto& t : threads) t.join();
  return ends;
}

void expect_good(const Ends& ends) {
  for (const auto& e : ends) EXPECT_EQ(e, "");
}

/// The value that rank `from` sends to `to` as number k with that tag.
std::uint32_t letter(int from, int to, std::int64_t tag, std::size_t k) {
  return static_cast<std::uint32_t>(from * 1000003 + to * 10007 + tag * 101 +
                                    static_cast<std::int64_t>(k));
}

TEST(TcpTransport, MessagesOfAPairAndTagArriveInOrderWhateverTheOthersDo) {
  for (const int size : {1, 2, 3, 5}) {
    std::mt19937 rng(static_cast<std::uint32_t>(size));
    // What is sent from whom to whom: (from, to, tag, words), in the order of sending.
    struct Planned {
      int from, to;
      std::int64_t tag;
      std::size_t words;
    };
    std::vector<Planned> plan;
    for (int k = 0; k < 300 && size > 1; ++k) {
      const int from = static_cast<int>(rng() % static_cast<unsigned>(size));
      const int to = (from + 1 + static_cast<int>(rng() % static_cast<unsigned>(size - 1))) % size;
      // Now and then more than any socket buffer holds.
      const std::size_t words = rng() % 50 == 0 ? 3'000'000 : rng() % 100;
      plan.push_back({from, to, static_cast<std::int64_t>(rng() % 3), words});
    }
    std::vector<std::size_t> order(plan.size());
    for (std::size_t k = 0; k < order.size(); ++k) order[k] = k;
    std::shuffle(order.begin(), order.end(), rng);
    expect_good(run_ranks(size, nullptr, [&](Transport& t) {
      for (std::size_t k = 0; k < plan.size(); ++k) {
        const Planned& p = plan[k];
        if (p.from != t.rank()) continue;
        std::vector<std::uint32_t> words(p.words, letter(p.from, p.to, p.tag, k));
        t.send(p.to, p.tag, words.data(), words.size() * 4);
      }
      // Pairs and tags are received in another order; each of them keeps its own.
      std::map<std::pair<int, std::int64_t>, std::vector<std::size_t>> mine;
      for (std::size_t k = 0; k < plan.size(); ++k) {
        if (plan[k].to == t.rank()) mine[{plan[k].from, plan[k].tag}].push_back(k);
      }
      std::map<std::pair<int, std::int64_t>, std::size_t> next;
      for (const std::size_t k : order) {
        if (plan[k].to != t.rank()) continue;
        const std::pair key{plan[k].from, plan[k].tag};
        const std::size_t n = mine[key][next[key]++];
        std::vector<std::uint32_t> words(plan[n].words);
        t.receive(key.first, key.second, words.data(), words.size() * 4);
        for (const std::uint32_t w : words)
          ASSERT_EQ(w, letter(key.first, t.rank(), key.second, n));
      }
      t.barrier();
    }));
  }
}

/// One collective of every kind: results and bytes on each link are those of threads.
TEST(TcpTransport, CollectivesAreThoseOfThreadsToTheByte) {
  for (const int size : {2, 3, 4}) {
    std::vector<int> group;
    for (int r = 0; r < size; ++r) group.push_back(r);
    const auto n = static_cast<std::size_t>(size);
    std::mt19937 rng(7);
    std::vector<std::int64_t> bounds{0};
    for (std::size_t k = 0; k < n; ++k)
      bounds.push_back(bounds.back() + 1 + static_cast<std::int64_t>(rng() % 20));
    const auto play = [&](Transport& t) {
      std::map<std::string, std::vector<float>> results;
      for (const AlgorithmRow& row : kAlgorithms) {
        if (row.algorithm != default_algorithm(row.kind)) continue;
        CollectiveCall c;
        c.kind = row.kind;
        c.group = &group;
        c.me = t.rank();
        const bool exchange =
            row.kind == CollectiveKind::all_to_all || row.kind == CollectiveKind::halo_exchange;
        const bool whole = row.kind == CollectiveKind::all_reduce ||
                           row.kind == CollectiveKind::broadcast ||
                           row.kind == CollectiveKind::reduce;
        std::vector<float> data(static_cast<std::size_t>(bounds.back())), send;
        for (std::size_t k = 0; k < data.size(); ++k)
          data[k] = static_cast<float>(100 * t.rank()) + static_cast<float>(k);
        c.offsets = whole ? std::vector<std::int64_t>{0, bounds.back()} : bounds;
        if (exchange || row.kind == CollectiveKind::shift) {
          // Chunks of 3 for everyone.
          c.offsets = {0};
          for (std::size_t k = 0; k < (exchange ? n : 1); ++k)
            c.offsets.push_back(c.offsets.back() + 3);
          c.send_offsets = c.offsets;
          send.assign(data.begin(), data.begin());
          for (std::int64_t k = 0; k < c.send_offsets.back(); ++k)
            send.push_back(static_cast<float>(1000 * t.rank() + k));
          data.assign(static_cast<std::size_t>(c.offsets.back()), 0);
          c.send = reinterpret_cast<const std::byte*>(send.data());
        }
        c.data = reinterpret_cast<std::byte*>(data.data());
        t.collective(c);
        results[std::string(name(row.kind))] = data;
      }
      return results;
    };
    std::vector<std::map<std::string, std::vector<float>>> tcp(n), threads(n);
    std::vector<Traffic> tcp_traffic(n), thread_traffic(n);
    expect_good(run_ranks(size, nullptr, [&](Transport& t) {
      tcp[static_cast<std::size_t>(t.rank())] = play(t);
      tcp_traffic[static_cast<std::size_t>(t.rank())] = t.traffic();
      t.barrier();
      EXPECT_EQ(t.traffic().messages, tcp_traffic[static_cast<std::size_t>(t.rank())].messages)
          << "a barrier is no message";
    }));
    auto hub = make_thread_hub(size, 10);
    std::vector<std::thread> all;
    for (int r = 0; r < size; ++r) {
      all.emplace_back([&, r] {
        const auto t = thread_transport(hub, r);
        threads[static_cast<std::size_t>(r)] = play(*t);
        thread_traffic[static_cast<std::size_t>(r)] = t->traffic();
      });
    }
    for (auto& t : all) t.join();
    EXPECT_EQ(tcp, threads);
    for (std::size_t r = 0; r < n; ++r) {
      EXPECT_EQ(tcp_traffic[r].bytes_to, thread_traffic[r].bytes_to);
      EXPECT_EQ(tcp_traffic[r].messages, thread_traffic[r].messages);
    }
  }
}

TEST(Rendezvous, WhoIsMissingIsNamed) {
  for (const int missing : {1, 3}) {
    const Ends ends = run_ranks(
        4,
        [&](int r, TcpOptions& o) {
          o.rendezvous_s = 0.5;
          return r != missing;
        },
        [](Transport&) { FAIL() << "they met"; });
    EXPECT_THAT(ends[0],
                AllOf(HasSubstr(fmt::format("peer rank {} of 4 did not come to the rendezvous at "
                                            "127.0.0.1:",
                                            missing)),
                      HasSubstr("within 0.5 s; start it with the same MASTER_ADDR")));
    for (int r = 1; r < 4; ++r) {
      if (r == missing) continue;
      EXPECT_THAT(ends[static_cast<std::size_t>(r)],
                  HasSubstr(fmt::format("elsewhere 3 rank {} of 4", missing)));
    }
  }
  const Ends ends = run_ranks(
      4, [](int r, TcpOptions& o) { return o.rendezvous_s = 0.3, r == 0; }, [](Transport&) {});
  EXPECT_THAT(ends[0], HasSubstr("ranks 1, 2, 3 of 4 did not come"));
}

TEST(Rendezvous, WithoutRankZeroTheOthersEndToo) {
  const Listening l = listen_on_loopback(1);
  ::close(l.socket);
  TcpOptions o = options_of(1, 2, l);
  o.rendezvous_s = 0.3;
  EXPECT_THAT(end_of([&] { tcp_transport(o); }),
              AllOf(HasSubstr("peer rank 1 of 2 finds no rank 0 at 127.0.0.1:"),
                    HasSubstr("within 0.3 s (Connection refused)")));
}

TEST(Rendezvous, RanksOfDifferentRunsAreRefusedInOneMessage) {
  const Ends ends = run_ranks(
      3,
      [](int r, TcpOptions& o) {
        if (r == 2) o.key = "network test; steps 4;";
        return true;
      },
      [](Transport&) { FAIL() << "they met"; });
  EXPECT_EQ(ends[0],
            "input rendezvous: rank 2 is to run steps 4, and rank 0 steps 3; start all with the "
            "same arguments");
  EXPECT_THAT(ends[1], HasSubstr("elsewhere 2 rank 2 is to run steps 4"));
  EXPECT_THAT(ends[2], HasSubstr("elsewhere 2 rank 2 is to run steps 4"));
}

TEST(Rendezvous, OneNumberOfRanksAndOneProcessForEach) {
  Ends ends = run_ranks(
      3, [](int r, TcpOptions& o) { return o.size = r == 1 ? 4 : 3, true; }, [](Transport&) {});
  EXPECT_THAT(ends[0], HasSubstr("input rendezvous: rank 1 was started as one of 4 ranks, rank 0 "
                                 "as one of 3; start all with the same number"));
  ends = run_ranks(
      3, [](int r, TcpOptions& o) { return o.rank = r == 2 ? 1 : r, true; }, [](Transport&) {});
  EXPECT_THAT(ends[0], HasSubstr("two processes say that they are rank 1; give each its own"));
}

TEST(Rendezvous, StrangersAreShownOut) {
  // Some talk, some don't; all others meet.
  std::vector<int> strangers;
  const Ends ends = run_ranks(
      3,
      [&](int r, TcpOptions& o) {
        if (r != 0) return true;
        for (const char* text : {"", "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"}) {
          const int s = ::socket(AF_INET, SOCK_STREAM, 0);
          sockaddr_in a{};
          a.sin_family = AF_INET;
          a.sin_port = htons(static_cast<std::uint16_t>(o.port));
          a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
          EXPECT_EQ(::connect(s, reinterpret_cast<const sockaddr*>(&a), sizeof a), 0);
          EXPECT_EQ(::send(s, text, std::strlen(text), 0), static_cast<ssize_t>(std::strlen(text)));
          strangers.push_back(s);
        }
        return true;
      },
      [](Transport& t) { t.barrier(); });
  expect_good(ends);
  for (const int s : strangers) ::close(s);
}

/// A socket that asks for a port where nobody listens gets, one time in some ten thousands, that
/// very port as its own, and answers itself.
TEST(Rendezvous, NobodyMeetsHimself) {
  const Listening l = listen_on_loopback(1);
  ::close(l.socket);
  Address a = loopback_address();
  set_port(a, l.port + l.port % 2);  // Linux connects from even ones
  for (int k = 0; k < 60'000; ++k) {
    int error = 0;
    ASSERT_FALSE(connect_to(a, after(5), error).good()) << "attempt " << k;
    ASSERT_EQ(error, ECONNREFUSED);
  }
}

TEST(Rendezvous, AddressesThatCannotBeAreTheUsersMistake) {
  const Listening l = listen_on_loopback(1);
  TcpOptions o = options_of(0, 2, l);
  o.listener = -1;
  EXPECT_THAT(end_of([&] { tcp_transport(o); }),
              HasSubstr(fmt::format("input MASTER_PORT: rank 0 cannot listen at 127.0.0.1:{}: "
                                    "Address already in use; choose another port",
                                    l.port)));
  for (const int rank : {0, 1}) {
    o.rank = rank;
    o.host = "no-such-host.invalid";
    EXPECT_THAT(end_of([&] { tcp_transport(o); }),
                HasSubstr("input MASTER_ADDR: 'no-such-host.invalid' is no host that this machine "
                          "knows"));
  }
  ::close(l.socket);
}

TEST(TcpTransport, APeerThatGoesWithoutAWordIsNamedByOneRankOnly) {
  for (const int victim : {0, 1, 3}) {
    const Ends ends = run_ranks(4, nullptr, [&](Transport& t) {
      t.at(2, 7);
      t.barrier();
      // A transport that was told of a failure closes without a good-bye, as a dead process does.
      if (t.rank() == victim) {
        t.abort("", 3);
        throw ToldElsewhere(0, "dead");
      }
      float x;
      t.receive((t.rank() + 1) % 4, 5, &x, sizeof x);
    });
    int said = 0;
    for (int r = 0; r < 4; ++r) {
      if (r == victim) continue;
      const auto& e = ends[static_cast<std::size_t>(r)];
      EXPECT_TRUE(e.rfind("peer ", 0) == 0 || e.rfind("elsewhere 3 ", 0) == 0) << e;
      EXPECT_THAT(e, HasSubstr(fmt::format("rank {}", victim)));
      said += e.rfind("peer ", 0) == 0;
    }
    // The victim of this test could have spoken itself, were it rank 0.
    EXPECT_EQ(said, victim == 0 ? 0 : 1);
  }
}

TEST(TcpTransport, ARankThatGivesUpTellsItsReason) {
  const Ends ends = run_ranks(3, nullptr, [&](Transport& t) {
    t.barrier();
    if (t.rank() == 1) {
      t.abort("its memory chips melted", 2);
      EXPECT_FALSE(t.speaks()) << "rank 0 lives";
      return;
    }
    float x;
    t.receive(1, 5, &x, sizeof x);
  });
  EXPECT_EQ(ends[0], "input rank 1: its memory chips melted") << "of code 2";
  EXPECT_EQ(ends[2], "elsewhere 2 rank 1: its memory chips melted");
}

/// Rank 3 hangs; 0 waits for 1, 1 for 2, 2 for 3. Whoever's patience ends first names rank 3.
TEST(TcpTransport, AHangNamesTheCulpritNotAVictim) {
  const Ends ends = run_ranks(
      4,
      [](int, TcpOptions& o) {
        o.describe = [](int rank, std::int64_t step, std::int64_t instruction) {
          return fmt::format("instruction {}/{} of rank {}", step, instruction, rank);
        };
        return true;
      },
      [](Transport& t) {
        t.at(1, 4);
        t.barrier();
        if (t.rank() == 3) {
          std::this_thread::sleep_for(std::chrono::milliseconds(1500));
          t.barrier();
          return;
        }
        float x;
        t.receive(t.rank() + 1, 5, &x, sizeof x);
      },
      0.5);
  EXPECT_THAT(ends[0], AllOf(HasSubstr("peer rank "), HasSubstr("waits in instruction 1/4"),
                             HasSubstr("rank 3"),
                             HasSubstr("has been in instruction 1/4 of rank 3 "
                                       "for 0.5 s")));
  for (const int r : {1, 2, 3})
    EXPECT_THAT(
        ends[static_cast<std::size_t>(r)],
        AllOf(HasSubstr("elsewhere 3 "), HasSubstr("has been in instruction 1/4 of rank 3")))
        << r;
}

TEST(TcpTransport, RanksThatWaitForEachOtherEndToo) {
  const Ends ends = run_ranks(
      3, nullptr,
      [](Transport& t) {
        t.at(1, t.rank() == 2 ? 3 : 4);
        t.barrier();
        float x;
        t.receive((t.rank() + 1) % 3, 5, &x, sizeof x);
      },
      0.3);
  for (const auto& e : ends) EXPECT_THAT(e, HasSubstr("rank "));
}

TEST(Board, KnowsWhoHoldsUpTheOthers) {
  const auto board = Board::create(3, 4, 2);
  const auto other = Board::open(board->path(), 3);
  ASSERT_NE(other, nullptr);
  EXPECT_EQ(Board::open(board->path(), 4), nullptr);
  EXPECT_EQ(Board::open("/nowhere", 3), nullptr);
  for (int r = 0; r < 3; ++r) {
    board->rank(r).process = ::getpid();
    board->rank(r).step = 5;
    board->rank(r).instruction = 10 + r;
    board->rank(r).waits_for = RankState::kGroup;
  }
  EXPECT_EQ(other->culprit(0, 3), 1) << "furthest behind of those that wait";
  EXPECT_EQ(other->culprit(1, 3), 0);
  board->rank(2).waits_for = RankState::kNobody;
  EXPECT_EQ(other->culprit(0, 3), 2) << "at work";
  board->rank(1).process = 0x7ffffff0;
  EXPECT_EQ(other->culprit(0, 3), 1) << "gone";
  board->note_step({1.5, 2.5}, 0.25);
  board->note_step({3.5, 4.5}, 0.5);
  EXPECT_EQ(other->steps_done(), 2);
  EXPECT_EQ(other->losses(1), (std::vector<double>{3.5, 4.5}));
  EXPECT_EQ(other->seconds(0), 0.25);
  for (int k = 0; k < 10; ++k) board->note_step({0, 0}, 0);
  EXPECT_EQ(other->steps_done(), 4) << "no more than there is room for";
}

}  // namespace
}  // namespace partita
