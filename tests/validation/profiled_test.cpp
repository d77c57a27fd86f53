// A job's profiler trace as terms of its step: docs/compare.md.
#include "validation/profiled.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <zlib.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>

#include "base/error.h"
#include "base/yaml.h"
#include "models/models.h"
#include "simulator/lower/lower.h"

namespace partita::validation {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

const std::vector<KernelKind>& kinds() {
  static const auto all = load_kernel_kinds(data_folder("validation/kernel_kinds.yaml"));
  return all;
}

std::string event(const std::string& name, const std::string& category, const std::string& ts,
                  const std::string& dur, int stream = 7, int device = 0) {
  return fmt::format(
      R"({{"ph": "X", "cat": "{}", "name": "{}", "pid": 0, "tid": {}, "ts": {}, "dur": {}, )"
      R"("args": {{"device": {}, "stream": {}, "grid": [1, 2, 3]}}}})",
      category, name, stream, ts, dur, device, stream);
}

std::string text_of(const std::vector<std::string>& events, const std::string& before = "") {
  return fmt::format("{{{}\"traceEvents\": [{}], \"traceName\": \"x\"}}", before,
                     fmt::join(events, ","));
}

ProfilerTrace trace_of(const std::vector<std::string>& events,
                       std::optional<std::int64_t> device = std::nullopt) {
  return parse_profiler_trace(text_of(events), "t.json", device);
}

std::map<std::string, std::int64_t> by_kind(const ProfiledStep& s) {
  std::map<std::string, std::int64_t> all;
  for (const auto& t : s.terms) all[t.kind] += t.ns;
  return all;
}

TEST(ProfiledStep, EqualsTheExampleByHand) {
  const std::string file = PARTITA_TEST_DATA "/cli/trace.json";
  const auto trace = parse_profiler_trace(read_file(file), file, std::nullopt);
  const ProfiledStep s = profiled_step(trace, kinds());
  EXPECT_EQ(s.steps, 3);
  EXPECT_EQ(s.low, 1'000'000);
  EXPECT_EQ(s.high, 1'200'000);
  EXPECT_EQ(s.ns, 1'100'000);
  const std::map<std::string, std::int64_t> by_hand{
      {"linear", 400'000},    {"attention", 100'000}, {"add", 10'000},
      {"all_reduce", 90'000}, {"optimizer", 200'000}, {"host", 50'000},
      {"unknown", 50'000},    {"normalize", 50'000},  {"", 150'000}};
  EXPECT_EQ(by_kind(s), by_hand);
  for (const auto& t : s.terms) {
    if (t.kind == "all_reduce") {
      EXPECT_EQ(t.kernel_ns, 250'000);
      EXPECT_EQ(t.kernels, 1);
    }
  }
  ASSERT_EQ(s.unknown.size(), 1u);
  EXPECT_EQ(s.unknown[0].name, "my_kernel(float*)");
  EXPECT_EQ(s.unknown[0].ns, 50'000);
}

TEST(ProfiledStep, GivesEachInstantToOneClassOnRandomTraces) {
  std::mt19937_64 rng{20261127};
  const std::vector<std::string> names{"nvjet_a",
                                       "flash_fwd_kernel",
                                       "ncclDevKernel_AllGather_RING_LL",
                                       "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL",
                                       "Memcpy DtoH (Device -> Pinned)",
                                       "mine"};
  const auto one = [&](int n) { return static_cast<int>(rng() % static_cast<unsigned>(n)); };
  for (int round = 0; round < 300; ++round) {
    ProfilerTrace t;
    t.names = names;
    const int events = 1 + one(12);
    for (int k = 0; k < events; ++k) {
      const std::int64_t start = one(60);
      t.events.push_back({start, start + one(25), one(3), one(6)});
    }
    if (one(3) > 0) {
      for (int k = 0, at = one(10); k < 1 + one(4); ++k) {
        const int length = 1 + one(30);
        t.steps.push_back({at, at + length});
        at += length;
      }
    }
    const ProfiledStep s = profiled_step(t, kinds());
    std::int64_t sum = 0;
    for (const auto& term : s.terms) {
      sum += term.ns;
      EXPECT_GE(term.ns, 0);
      if (term.group != TermGroup::idle) {
        EXPECT_LE(term.ns, term.kernel_ns);
      }
    }
    ASSERT_EQ(sum, s.ns) << "round " << round;
    if (s.steps > 0) continue;

    // Instant by instant.
    std::map<std::int64_t, std::int64_t> work;
    std::int64_t from = INT64_MAX, to = INT64_MIN;
    for (const auto& e : t.events) {
      from = std::min(from, e.start), to = std::max(to, e.end);
      if (e.name < 2 || e.name == 5) work[e.stream] += e.end - e.start;
    }
    std::int64_t busiest = -1;
    for (const auto& [stream, ns] : work)
      if (busiest < 0 || ns > work[busiest]) busiest = stream;
    const std::vector<std::string> kind{"linear",         "attention", "all_gather",
                                        "reduce_scatter", "host",      "unknown"};
    std::map<std::string, std::int64_t> expected, got;
    for (std::int64_t now = from; now < to; ++now) {
      int best = -1, class_of_best = 9;
      for (int k = 0; k < events; ++k) {
        const auto& e = t.events[static_cast<std::size_t>(k)];
        if (e.start > now || e.end <= now) continue;
        const int c = e.name == 4                  ? 3
                      : e.name == 2 || e.name == 3 ? 2
                      : e.stream == busiest        ? 0
                                                   : 1;
        const bool better =
            c < class_of_best ||
            (c == class_of_best && e.start < t.events[static_cast<std::size_t>(best)].start);
        if (better) best = k, class_of_best = c;
      }
      ++expected[best < 0 ? ""
                          : kind[static_cast<std::size_t>(
                                t.events[static_cast<std::size_t>(best)].name)]];
    }
    for (const auto& [k, ns] : by_kind(s))
      if (ns > 0) got[k] = ns;
    ASSERT_EQ(got, expected) << "round " << round;
  }
}

TEST(ProfiledStep, IsTheLowerMedianWithoutTheFirstAndWithoutEmptyOnes) {
  const auto step = [](int n, int from, int us) {
    return event(fmt::format("ProfilerStep#{}", n), "user_annotation", std::to_string(from),
                 std::to_string(us));
  };
  const auto kernel = [](int at) { return event("nvjet", "kernel", std::to_string(at), "1"); };
  const auto one = profiled_step(trace_of({step(1, 0, 50), kernel(3)}), kinds());
  EXPECT_EQ(one.ns, 50'000);  // the only one is taken
  EXPECT_EQ(one.steps, 1);
  const auto two = profiled_step(
      trace_of({step(3, 80, 40), step(1, 0, 50), step(2, 50, 30), kernel(60), kernel(100)}),
      kinds());
  EXPECT_EQ(two.steps, 2);
  EXPECT_EQ(two.ns, 30'000);
  const auto empty = profiled_step(
      trace_of({step(3, 80, 40), step(1, 0, 50), step(2, 50, 30), kernel(79), kernel(10)}),
      kinds());
  EXPECT_EQ(empty.steps, 1);
  EXPECT_EQ(empty.ns, 30'000);
  const auto touching = profiled_step(  // ends where the step begins, begins where it ends
      trace_of({step(1, 0, 50), step(2, 51, 29), step(3, 80, 20), kernel(50), kernel(80)}),
      kinds());
  EXPECT_EQ(touching.steps, 1);
  EXPECT_EQ(touching.ns, 20'000);
  const auto none = profiled_step(trace_of({kernel(60), kernel(100)}), kinds());
  EXPECT_EQ(none.steps, 0);
  EXPECT_EQ(none.ns, 41'000);
}

// docs/compare.md, by hand: the host is ahead of its GPU.
TEST(ProfiledStep, IsTheGpusWhereTheHostWasAhead) {
  const auto mark = [](const std::string& category, int n, int from, int us, int stream = 7) {
    return event(fmt::format("ProfilerStep#{}", n), category, std::to_string(from),
                 std::to_string(us), stream);
  };
  const auto kernel = [](int from, int us, int stream = 7) {
    return event("nvjet", "kernel", std::to_string(from), std::to_string(us), stream);
  };
  const std::vector<std::string> host{mark("user_annotation", 1, 0, 10),
                                      mark("user_annotation", 2, 10, 10)};
  const std::vector<std::string> kernels{kernel(4, 50), kernel(54, 6, 20), kernel(58, 52)};
  const std::string gpu = "gpu_user_annotation";
  const std::vector<std::string> ahead{mark(gpu, 1, 4, 50), mark(gpu, 1, 54, 6, 20),
                                       mark(gpu, 2, 58, 52)};
  const auto with = [&](std::vector<std::vector<std::string>> parts) {
    std::vector<std::string> all;
    for (const auto& p : parts) all.insert(all.end(), p.begin(), p.end());
    return trace_of(all);
  };
  const ProfilerTrace t = with({host, kernels, ahead});
  EXPECT_TRUE(t.steps_of_gpu);
  ASSERT_EQ(t.steps.size(), 2u);
  EXPECT_EQ(t.steps[0].end - t.steps[0].start, 54'000);
  EXPECT_EQ(t.steps[1].end - t.steps[1].start, 52'000);
  EXPECT_EQ(profiled_step(t, kinds()).ns, 52'000);
  EXPECT_EQ(profiled_step(t, kinds()).later, 0);
  // One step alone, and marks of the GPU alone.
  EXPECT_EQ(profiled_step(with({{host[0], kernels[0], ahead[0]}}), kinds()).ns, 50'000);
  EXPECT_EQ(profiled_step(with({kernels, ahead}), kinds()).ns, 52'000);
  // Marks of the host alone: the part of the kernels that began after them.
  const ProfiledStep alone = profiled_step(with({host, kernels}), kinds());
  EXPECT_EQ(alone.ns, 10'000);
  EXPECT_DOUBLE_EQ(alone.later, 58.0 / 108);
  // A host that waits marks its own.
  const std::vector<std::string> waits{mark("user_annotation", 1, 0, 40),
                                       mark("user_annotation", 2, 40, 60)};
  const auto kept = [&](int end) {
    return with({waits,
                 {kernel(4, 36), kernel(60, end - 60)},
                 {mark(gpu, 1, 4, 36), mark(gpu, 2, 60, end - 60)}})
        .steps_of_gpu;
  };
  EXPECT_FALSE(kept(100));
  EXPECT_FALSE(kept(103));  // a twentieth of 60 later
  EXPECT_TRUE(kept(104));
  // Another device's marks say nothing.
  EXPECT_FALSE(with({waits, {kernel(4, 36)}, {event("ProfilerStep#2", gpu, "60", "90", 7, 3)}})
                   .steps_of_gpu);
}

TEST(ProfilerTrace, KnowsTheCategoriesOfOldPyTorch) {
  EXPECT_EQ(trace_of({event("nvjet", "Kernel", "1", "2"), event("copy", "Memcpy", "3", "1"),
                      event("fill", "Memset", "4", "1"), event("aten::mm", "Operator", "1", "2")})
                .events.size(),
            3u);
}

TEST(ProfilerTrace, TakesNanosecondsFromTheDigits) {
  const auto t = trace_of({event("nvjet", "kernel", "1713378654123456.789", "0.001"),
                           event("nvjet", "kernel", "1713378654123456.7894", "10"),
                           event("nvjet", "kernel", "-1.25", "2.5"),
                           event("nvjet", "kernel", "1.5e3", "1.9996"),
                           event("nvjet", "kernel", "0.0005", "0.0004")});
  EXPECT_EQ(t.events[0].start, 1713378654123456789);
  EXPECT_EQ(t.events[0].end, 1713378654123456790);
  EXPECT_EQ(t.events[1].start, 1713378654123456789);
  EXPECT_EQ(t.events[2].start, -1250);
  EXPECT_EQ(t.events[2].end, 1250);
  EXPECT_EQ(t.events[3].start, 1'500'000);
  EXPECT_EQ(t.events[3].end, 1'502'000);
  EXPECT_EQ(t.events[4].start, 1);
  EXPECT_EQ(t.events[4].end, 1);
}

TEST(ProfilerTrace, KeepsOneDeviceAndNothingOfTheHost) {
  const std::vector<std::string> events{
      event("nvjet", "kernel", "1", "2", 7, 0), event("nvjet", "kernel", "1", "2", 7, 3),
      event("aten::mm", "cpu_op", "1", "2"), event("nvjet", "gpu_user_annotation", "1", "2"),
      R"({"ph": "s", "cat": "kernel", "name": "flow", "ts": 1, "id": 1})"};
  EXPECT_EQ(trace_of(events, 3).events.size(), 1u);
  EXPECT_EQ(trace_of(events, 3).device, 3);
  EXPECT_THAT([&] { trace_of(events); },
              ThrowsMessage<InputError>(HasSubstr("devices 0, 3; pick one with --device")));
  EXPECT_THAT([&] { trace_of(events, 1); },
              ThrowsMessage<InputError>(HasSubstr("no kernels of device 1; it has those of 0, 3")));
  const auto ranks = parse_profiler_trace(
      text_of({events[0]}, R"("distributedInfo": {"rank": 3, "world_size": 8},)"), "t", {});
  EXPECT_EQ(ranks.ranks, 8);
  EXPECT_EQ(ranks.rank, 3);
  EXPECT_EQ(trace_of({events[0]}).ranks, std::nullopt);
  EXPECT_EQ(trace_of({events[0]}).rank, std::nullopt);
}

// As torch.profiler's tensorboard_trace_handler(use_gzip=True) writes them.
TEST(ProfilerTrace, MayBePacked) {
  const std::string text = text_of({event("nvjet", "kernel", "1", "2")});
  const auto pack = [](const std::string& plain) {
    z_stream z{};
    EXPECT_EQ(deflateInit2(&z, 9, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
    std::string packed(plain.size() + 100, '\0');
    std::string in = plain;
    z.next_in = reinterpret_cast<unsigned char*>(in.data());
    z.avail_in = static_cast<unsigned>(in.size());
    z.next_out = reinterpret_cast<unsigned char*>(packed.data());
    z.avail_out = static_cast<unsigned>(packed.size());
    EXPECT_EQ(deflate(&z, Z_FINISH), Z_STREAM_END);
    packed.resize(packed.size() - z.avail_out);
    deflateEnd(&z);
    return packed;
  };
  const auto plain = parse_profiler_trace(text, "t", {});
  const std::string half = text.substr(0, 20), rest = text.substr(20);
  for (const std::string& packed : {pack(text), pack(half) + pack(rest)}) {
    const auto trace = parse_profiler_trace(packed, "t", {});
    ASSERT_EQ(trace.events.size(), plain.events.size());
    EXPECT_EQ(trace.events[0].start, plain.events[0].start);
  }
  const std::string packed = pack(text);
  for (std::size_t n = 2; n < packed.size(); ++n)
    EXPECT_THAT([&] { parse_profiler_trace(packed.substr(0, n), "t", {}); },
                ThrowsMessage<InputError>(HasSubstr("t: is cut off after ")))
        << n;
  std::string damaged = packed;
  damaged[packed.size() / 2] = static_cast<char>(damaged[packed.size() / 2] ^ 0x55);
  EXPECT_THROW(parse_profiler_trace(damaged, "t", {}), InputError);
}

TEST(ProfilerTrace, SaysWhatIsWrongWithAFile) {
  const auto says = [](const std::string& text, const std::string& what) {
    EXPECT_THAT([&] { parse_profiler_trace(text, "t.json", std::nullopt); },
                ThrowsMessage<InputError>(HasSubstr("t.json: " + what)));
  };
  says("\x1f\x8b\x08", "is cut off after 3 bytes");
  says("\x1f\x8b\x01\x01 is no method of gzip's",
       "is a damaged gzip file (unknown compression "
       "method); copy it again");
  says("PK\x03\x04", "is compressed; unpack it: unzip t.json");
  says("", "is empty");
  says(" \n", "is empty");
  says("partita", "is no JSON at byte 1");
  const std::string good = text_of({event("nvjet", "kernel", "1", "2")});
  says(good.substr(0, good.size() - 1), "is cut off after ");
  says(good.substr(0, good.size() / 2), "is cut off after ");
  says(good.substr(0, good.find("nvjet") + 2), "is cut off after ");
  says(good + "}", "is no JSON at byte ");
  says("{\"a\": [1]}", "has no traceEvents");
  says("[]", "has no traceEvents");
  says(text_of({event("aten::mm", "cpu_op", "1", "2")}), "has no kernels of a GPU");
  says(text_of({event("nvjet", "kernel", "1", "2"), event("nvjet", "kernel", "1", "-2")}),
       "traceEvents[1] (nvjet): dur: -2 us is below 0");
  says(text_of({event("nvjet", "kernel", "null", "2")}), "traceEvents[0] (nvjet): ts: nothing");
  says(text_of({event("nvjet", "kernel", "12345678901234567", "2")}),
       "traceEvents[0] (nvjet): ts: 12345678901234567 is no time");
  says(text_of({event("nvjet", "kernel", "1e300", "2")}), "traceEvents[0] (nvjet): ts: 1e300");
}

TEST(KernelKinds, KnowWhatFrameworksLaunch) {
  // As profilers print them.
  const std::vector<std::pair<std::string, std::string>> known{
      {"nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "linear"},
      {"sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_"
       "segment_k_off_kernel__5x_cublas",
       "linear"},
      {"ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn", "linear"},
      {"void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>"
       "(cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8::Params)",
       "linear"},
      {"void cublasLt::splitKreduce_kernel<32, 16, int, float>(float*)", "linear"},
      {"void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::"
       "GroupProblemShape<cute::tuple<int, int, int> > > >",
       "grouped_product"},
      {"sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage4",
       "convolution"},
      {"sm90_xmma_wgrad_implicit_gemm_indexed_f16f16_f16f32_f32_nhwckrsc_nhwc", "convolution"},
      {"void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4> >(Flash_fwd_params)",
       "attention"},
      {"void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128> >",
       "attention"},
      {"void pytorch_flash::flash_bwd_dot_do_o_kernel<true>()", "attention"},
      {"void cutlass::device_kernel<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2> > "
       ">",
       "attention"},
      {"cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_"
       "kernel0",
       "attention"},
      {"fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<>)",
       "attention"},
      {"triton_tem_fused_flex_attention_0", "attention"},
      {"void (anonymous namespace)::scaled_upper_triang_masked_softmax_warp_forward<c10::Half>",
       "attention"},
      {"void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>",
       "normalize"},
      {"void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>",
       "normalize"},
      {"void transformer_engine::normalization::rmsnorm_fwd_general_kernel<>", "normalize"},
      {"void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>", "normalize"},
      {"void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous "
       "namespace)::TensorListMetadata<1>, at::native::(anonymous "
       "namespace)::UnaryOpFunctor<float>>",
       "optimizer"},
      {"void multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctor<float, float, int> >",
       "optimizer"},
      {"void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float, "
       "at::native::(anonymous namespace)::SoftMaxForwardEpilogue>",
       "softmax"},
      {"void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float, "
       "at::native::(anonymous namespace)::LogSoftMaxForwardEpilogue>",
       "cross_entropy"},
      {"void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float>",
       "cross_entropy"},
      {"void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::"
       "TensorIteratorBase&, at::native::GeluType)::{lambda()#2}>",
       "activation"},
      {"void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::"
       "BFloat16>, std::array<char*, 3ul> >",
       "add"},
      {"void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, float, "
       "float, at::native::binary_internal::MulFunctor<float> > >",
       "multiply"},
      {"void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float> >",
       "other"},
      {"void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::"
       "TensorIteratorBase&)>",
       "other"},
      {"void at::native::(anonymous namespace)::fused_dropout_kernel_vec<float, float>", "dropout"},
      {"void at::native::(anonymous namespace)::embedding_backward_feature_kernel<float>",
       "embedding"},
      {"void at::native::(anonymous namespace)::indexSelectLargeIndex<float, long>", "embedding"},
      {"void transformer_engine::fused_rope_forward_kernel<__nv_bfloat16>", "rotary"},
      {"triton_poi_fused_mul_silu_7", "gated_activation"},
      {"triton_red_fused__log_softmax_3", "cross_entropy"},
      {"_permute_kernel", "dispatch"},
      {"_unpermute_kernel", "combine"},
      {"ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all_reduce"},
      {"ncclKernel_AllReduce_RING_LL_Sum_half(ncclDevComm*, unsigned long, ncclWork*)",
       "all_reduce"},
      {"ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all_gather"},
      {"ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
       "reduce_scatter"},
      {"ncclDevKernel_Reduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "reduce"},
      {"ncclDevKernel_Broadcast_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "broadcast"},
      {"ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "send_receive"},
      {"ncclDevKernel_Generic_1(ncclDevKernelArgsStorage<4096ul>)", "mixed"},
      {"void deep_ep::intranode::dispatch<2, 768, 8192>(int4*, float*)", "send_receive"},
      {"Memcpy HtoD (Pinned -> Device)", "host"},
      {"Memcpy DtoH (Device -> Pageable)", "host"},
      {"Memcpy DtoD (Device -> Device)", "other"},
      {"Memcpy PtoP (Device -> Device)", "send_receive"},
      {"Memset (Device)", "other"}};
  for (const auto& [name, kind] : known) {
    const KernelKind* k = kind_of_kernel(kinds(), name);
    EXPECT_EQ(k != nullptr ? k->kind : "unknown", kind) << name;
  }
  EXPECT_EQ(kind_of_kernel(kinds(), "my_kernel(float*)"), nullptr);
}

TEST(CompareTerms, PutsTheBreakdownBesideAndSumsToBothSteps) {
  const std::string file = PARTITA_TEST_DATA "/cli/trace.json";
  const ProfiledStep s =
      profiled_step(parse_profiler_trace(read_file(file), file, std::nullopt), kinds());
  Breakdown b;
  b.compute = {{"linear", Ticks{300}}, {"convolution", Ticks{20}}, {"rotary", Ticks{3}}};
  b.exposed = {{"tp", Ticks{1000}}, {"launch", Ticks{70}}, {"host", Ticks{5}}};
  b.bubble = Ticks{4000}, b.optimizer = Ticks{600}, b.other = Ticks{7};
  std::map<std::string, std::pair<double, double>> groups, terms;  // ns, ps
  double measured = 0, predicted = 0;
  for (const TermRow& r : compare_terms(s, b)) {
    const std::pair both{r.measured ? r.measured->count * 1e9 : -1,
                         r.predicted ? r.predicted->count * 1e12 : -1};
    if (r.kind.empty()) {
      groups[std::string(name(r.group))] = both;
      measured += both.first, predicted += both.second;
    } else {
      terms[r.kind] = both;
    }
  }
  const auto is = [](const std::pair<double, double>& x, double ns, double ps) {
    EXPECT_NEAR(x.first, ns, 1e-6);
    EXPECT_NEAR(x.second, ps, 1e-6);
  };
  EXPECT_NEAR(measured, 1'100'000, 1e-6);
  EXPECT_NEAR(predicted, static_cast<double>(b.total().count), 1e-6);
  is(groups.at("products"), 500'000, 320);
  is(groups.at("other kernels"), 110'000, 10);
  is(groups.at("optimizer"), 200'000, 600);
  is(groups.at("exposed communication"), 90'000, 5000);
  is(groups.at("host copies"), 50'000, 5);
  is(groups.at("idle"), 150'000, 70);
  is(terms.at("linear"), 400'000, 300);
  is(terms.at("convolution"), -1, 20);
  is(terms.at("attention"), 100'000, -1);
  is(terms.at("bubble"), -1, 4000);
  is(terms.at("all_reduce"), 90'000, -1);
}

// docs/compare.md, "Axes", by hand: 16 ranks, tp 2, dp 4 and pp 2; rank 5 is 1 of tp, 2 of dp, 0 of
// pp.
TEST(ProfiledStep, CommunicationIsOfTheAxisWhoseRanksItHas) {
  TransformerConfig c;
  c.layers = 2, c.hidden = 16, c.heads = 4, c.ffn = 32, c.vocabulary = 40, c.sequence = 8;
  const Graph g = build_transformer(c);
  Plan wanted;
  wanted.tp = 2, wanted.dp = 4, wanted.pp = 2, wanted.global_batch = 8;
  wanted.sequence_parallel = true;
  const auto plan = complete(g, wanted);
  ASSERT_TRUE(plan) << plan.reason();
  const auto program = lower(g, *plan);
  ASSERT_TRUE(program);
  using Group = ProfilerTrace::Group;
  const std::vector<Group> groups{{2, {4, 5}}, {4, {1, 3, 5, 7}}, {2, {5, 13}},
                                  {4, {1, 7}}, {2, {4, 6}},       {6, {0, 1, 2, 3}}};
  const auto axes = axes_of(*program, 5, groups);
  ASSERT_EQ(axes.size(), groups.size());
  const auto axis = [&](std::size_t k, const char* collective) {
    const auto at = axes[k].find(collective);
    return at == axes[k].end() ? std::string("none") : at->second;
  };
  EXPECT_EQ(axis(0, "all_gather"), "tp");
  EXPECT_EQ(axis(0, ""), "tp");
  EXPECT_EQ(axis(1, "all_reduce"), "dp");
  EXPECT_EQ(axis(2, "send_receive"), "pp");
  EXPECT_EQ(axis(3, ""), "dp") << "a cut list";
  EXPECT_TRUE(axes[4].empty()) << "no axis has these two";
  EXPECT_TRUE(axes[5].empty()) << "nor so many";

  // In a trace: NCCL's kernels by name and group; one without a group keeps its collective.
  const auto kernel = [](const char* name, int at, const char* group) {
    return fmt::format(R"({{"ph": "X", "cat": "kernel", "name": "{}", "ts": {}, "dur": 10,)"
                       R"( "args": {{"device": 0, "stream": 1{}}}}})",
                       name, at, group);
  };
  const std::string text = fmt::format(
      R"({{"deviceProperties": [{{"id": 0, "name": "NVIDIA H100"}}], "traceEvents": [{}, {}, {}, {}]}})",
      kernel("ncclDevKernel_AllGather_RING_LL", 0,
             R"(, "Group size": 2, "Process Group Ranks": "[4, 5]")"),
      kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 10,
             R"(, "Group size": 4, "Process Group Ranks": "[1, ..., 7]")"),
      kernel("ncclDevKernel_SendRecv", 20,
             R"(, "Group size": 2, "Process Group Ranks": "[5, 13]")"),
      kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 30, ""));
  const auto trace = parse_profiler_trace(text, "t.json", std::nullopt);
  EXPECT_EQ(trace.gpu, "NVIDIA H100");
  ASSERT_EQ(trace.groups.size(), 3u);
  EXPECT_EQ(trace.groups[1], (Group{4, {1, 7}}));
  const std::map<std::string, std::int64_t> by_axis{
      {"tp", 10'000}, {"dp", 10'000}, {"pp", 10'000}, {"all_reduce", 10'000}};
  EXPECT_EQ(by_kind(profiled_step(trace, kinds(), axes_of(*program, 5, trace.groups))), by_axis);
  const std::map<std::string, std::int64_t> by_collective{
      {"all_gather", 10'000}, {"all_reduce", 20'000}, {"send_receive", 10'000}};
  EXPECT_EQ(by_kind(profiled_step(trace, kinds())), by_collective);
}

TEST(KernelKinds, RefuseWhatIsNoKind) {
  const auto load = [](const std::string& entry) {
    const std::string file = ::testing::TempDir() + "kinds.yaml";
    std::FILE* f = std::fopen(file.c_str(), "w");
    std::fputs(("schema: partita.kernel_kinds/1\nkernels:\n  - " + entry).c_str(), f);
    std::fclose(f);
    return load_kernel_kinds(file);
  };
  EXPECT_EQ(load("{kind: linear, source: x, patterns: ['*A*']}")[0].patterns[0], "*a*");
  EXPECT_THAT([&] { load("{kind: linera, source: x, patterns: ['*']}"); },
              ThrowsMessage<InputError>(HasSubstr("'linera' is unknown; did you mean 'linear'?")));
  EXPECT_THAT([&] { load("{collective: allreduce, source: x, patterns: ['*']}"); },
              ThrowsMessage<InputError>(HasSubstr("did you mean 'all_reduce'?")));
  EXPECT_THAT([&] { load("{kind: linear, patterns: ['*']}"); },
              ThrowsMessage<InputError>(HasSubstr("source")));
  EXPECT_THAT([&] { load("{kind: linear, source: x, patterns: ['*'], pattern: y}"); },
              ThrowsMessage<InputError>(HasSubstr("pattern")));
}

}  // namespace
}  // namespace partita::validation
