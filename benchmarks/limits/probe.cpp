// What this machine can do at most: bytes read from memory and int8 products, both each second.
//
// Compiled at run time by benchmarks/limits and called through ctypes. The products' inner loops
// are assembly that touches registers only (but for amx_loaded), so no compiler can shorten them,
// and no flag is needed for an instruction set that the compiling machine lacks.

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cpuid.h>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

bool pin_to(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  return pthread_setaffinity_np(pthread_self(), sizeof(set), &set) == 0;
}

// All threads leave wait() together; spinning, since what follows is timed.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    const int phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.fetch_add(1, std::memory_order_release);
      return;
    }
    while (phase_.load(std::memory_order_acquire) == phase) _mm_pause();
  }

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<int> phase_{0};
};

// Runs body(thread) on one pinned thread for each CPU; false if one could not be pinned.
template <typename Body>
bool run_pinned(const int* cpus, int threads, const Body& body) {
  std::atomic<bool> pinned{true};
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      if (!pin_to(cpus[t])) pinned = false;
      body(t);
    });
  }
  for (std::thread& worker : workers) worker.join();
  return pinned;
}

// Reads `bytes`, a multiple of 256 times `streams`, as that many sequential streams.
__attribute__((target("avx2"))) uint64_t read_all(const char* data, size_t bytes, int streams) {
  __m256i sum0 = _mm256_setzero_si256(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  const size_t stride = bytes / streams;
  for (size_t at = 0; at < stride; at += 256) {
    for (int s = 0; s < streams; ++s) {
      const auto* p = reinterpret_cast<const __m256i*>(data + s * stride + at);
      sum0 =
          _mm256_xor_si256(sum0, _mm256_xor_si256(_mm256_load_si256(p), _mm256_load_si256(p + 4)));
      sum1 = _mm256_xor_si256(sum1,
                              _mm256_xor_si256(_mm256_load_si256(p + 1), _mm256_load_si256(p + 5)));
      sum2 = _mm256_xor_si256(sum2,
                              _mm256_xor_si256(_mm256_load_si256(p + 2), _mm256_load_si256(p + 6)));
      sum3 = _mm256_xor_si256(sum3,
                              _mm256_xor_si256(_mm256_load_si256(p + 3), _mm256_load_si256(p + 7)));
    }
  }
  const __m256i sum = _mm256_xor_si256(_mm256_xor_si256(sum0, sum1), _mm256_xor_si256(sum2, sum3));
  return static_cast<uint64_t>(_mm256_extract_epi64(sum, 0));
}

// ---- int8 products -----------------------------------------------------------------------------

// 12 independent accumulators hide the latency of any of these instructions.
#define FOR_12(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11)

// 12 chains of VPMADDUBSW, VPMADDWD, VPADDD, the AVX2 way to 32 products; ymm12 to ymm15 are
// operands and scratch.
void products_avx2(uint64_t rounds) {
  asm volatile(
      "vpxor %%ymm14, %%ymm14, %%ymm14\n\t"
      "vpcmpeqw %%ymm15, %%ymm15, %%ymm15\n\t"
      "1:\n\t"
#define CHAIN(i)                             \
  "vpmaddubsw %%ymm14, %%ymm15, %%ymm12\n\t" \
  "vpmaddwd %%ymm15, %%ymm12, %%ymm12\n\t"   \
  "vpaddd %%ymm12, %%ymm" #i ", %%ymm" #i "\n\t"
      FOR_12(CHAIN)
#undef CHAIN
          "dec %0\n\t"
          "jnz 1b\n\t"
          "vzeroupper\n\t"
      : "+r"(rounds)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
        "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

void products_avx512_vnni(uint64_t rounds) {
  asm volatile(
      "vpxor %%ymm14, %%ymm14, %%ymm14\n\t"
      "vpxor %%ymm15, %%ymm15, %%ymm15\n\t"
      "1:\n\t"
#define CHAIN(i) "vpdpbusd %%zmm14, %%zmm15, %%zmm" #i "\n\t"
      FOR_12(CHAIN)
#undef CHAIN
          "dec %0\n\t"
          "jnz 1b\n\t"
          "vzeroupper\n\t"
      : "+r"(rounds)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
        "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

struct alignas(64) TileConfig {
  uint8_t bytes[64] = {};
  TileConfig() {
    bytes[0] = 1;  // palette
    for (int tile = 0; tile < 8; ++tile) {
      bytes[16 + 2 * tile] = 64;  // bytes of a row
      bytes[48 + tile] = 16;      // rows
    }
  }
};

#define ZERO_TILES                                            \
  "tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\t" \
  "tilezero %%tmm3\n\ttilezero %%tmm4\n\ttilezero %%tmm5\n\t" \
  "tilezero %%tmm6\n\ttilezero %%tmm7\n\t"

// Six accumulator tiles of 16 x 16, one tile of each operand.
void products_amx(uint64_t rounds) {
  const TileConfig config;
  asm volatile("ldtilecfg (%1)\n\t" ZERO_TILES
               "1:\n\t"
               "tdpbssd %%tmm7, %%tmm6, %%tmm0\n\ttdpbssd %%tmm7, %%tmm6, %%tmm1\n\t"
               "tdpbssd %%tmm7, %%tmm6, %%tmm2\n\ttdpbssd %%tmm7, %%tmm6, %%tmm3\n\t"
               "tdpbssd %%tmm7, %%tmm6, %%tmm4\n\ttdpbssd %%tmm7, %%tmm6, %%tmm5\n\t"
               "dec %0\n\t"
               "jnz 1b\n\t"
               "tilerelease\n\t"
               : "+r"(rounds)
               : "r"(&config)
               : "cc", "memory");
}

// What a matrix product can make of them: 2 x 2 accumulators, the most that eight tiles allow, so
// that every product needs one load. The operands are 4 KiB, in the first-level cache.
void products_amx_loaded(uint64_t rounds) {
  const TileConfig config;
  alignas(64) static const uint8_t operands[4096] = {};
  asm volatile("ldtilecfg (%1)\n\t" ZERO_TILES
               "1:\n\t"
               "tileloadd (%2,%3,1), %%tmm6\n\ttileloadd 1024(%2,%3,1), %%tmm7\n\t"
               "tileloadd 2048(%2,%3,1), %%tmm4\n\ttileloadd 3072(%2,%3,1), %%tmm5\n\t"
               "tdpbssd %%tmm6, %%tmm4, %%tmm0\n\ttdpbssd %%tmm7, %%tmm4, %%tmm1\n\t"
               "tdpbssd %%tmm6, %%tmm5, %%tmm2\n\ttdpbssd %%tmm7, %%tmm5, %%tmm3\n\t"
               "dec %0\n\t"
               "jnz 1b\n\t"
               "tilerelease\n\t"
               : "+r"(rounds)
               : "r"(&config), "r"(operands), "r"(uint64_t{64})
               : "cc", "memory");
}

bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool instructions = (d >> 24 & 1) && (d >> 25 & 1);
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl, asm/prctl.h
  return instructions && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2");
}

bool has_avx512_vnni() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw");
}

struct Products {
  const char* name;
  bool (*supported)();
  void (*loop)(uint64_t rounds);  // at least one
  double operations;              // of one round; a product and its sum are two

  void run(int64_t rounds) const {
    if (rounds > 0) loop(static_cast<uint64_t>(rounds));
  }
};

// What a busy hyperthread slows most, so it watches the cores, too.
constexpr Products kAmxLoaded = {"amx_loaded", has_amx, products_amx_loaded,
                                 4 * 16 * 16 * 64 * 2.0};
constexpr Products kProducts[] = {
    {"avx2", has_avx2, products_avx2, 12 * 32 * 2.0},
    {"avx512_vnni", has_avx512_vnni, products_avx512_vnni, 12 * 64 * 2.0},
    {"amx", has_amx, products_amx, 6 * 16 * 16 * 64 * 2.0},
    kAmxLoaded,
};

bool supported(int isa) {
  return isa >= 0 && isa < static_cast<int>(std::size(kProducts)) && kProducts[isa].supported();
}

}  // namespace

extern "C" {

// Name of instruction set `isa`, or nullptr past the last one.
const char* probe_isa_name(int isa) {
  return isa >= 0 && isa < static_cast<int>(std::size(kProducts)) ? kProducts[isa].name : nullptr;
}

// 1 if this CPU and kernel run `isa`; asks for the permission to use AMX.
int probe_isa_supported(int isa) { return supported(isa); }

// Each of `threads` pinned threads fills its part of a buffer of `bytes` and reads it `passes`
// times; writes the seconds of each pass. Returns the bytes of a pass, 0 without memory, -1 if a
// thread could not be pinned.
int64_t probe_read(const int* cpus, int threads, int64_t bytes, int streams, int passes,
                   double* seconds) {
  if (!has_avx2()) return 0;
  const size_t part = static_cast<size_t>(bytes) / threads / (1 << 21) * (1 << 21);
  const size_t total = part * threads;
  void* memory =
      mmap(nullptr, total + (1 << 21), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 0;
  madvise(memory, total + (1 << 21), MADV_HUGEPAGE);
  const auto base = reinterpret_cast<uintptr_t>(memory);
  char* data = reinterpret_cast<char*>((base + (1 << 21) - 1) >> 21 << 21);
  Barrier barrier(threads);
  std::atomic<uint64_t> sink{0};
  const bool pinned = run_pinned(cpus, threads, [&](int t) {
    char* mine = data + t * part;
    memset(mine, t + 1, part);
    for (int pass = 0; pass < passes; ++pass) {
      barrier.wait();
      const auto start = Clock::now();
      sink ^= read_all(mine, part, streams);
      barrier.wait();
      if (t == 0) seconds[pass] = seconds_since(start);
    }
  });
  munmap(memory, total + (1 << 21));
  return pinned ? static_cast<int64_t>(total) : -1;
}

// `repeats` times, all threads make `rounds` rounds of products; writes the seconds of each repeat.
// Returns the operations of one repeat of all threads, 0 where the instructions are missing, -1 if
// a thread could not be pinned.
double probe_products(int isa, const int* cpus, int threads, int64_t rounds, int repeats,
                      double* seconds) {
  if (!supported(isa)) return 0;
  Barrier barrier(threads);
  const bool pinned = run_pinned(cpus, threads, [&](int t) {
    for (int repeat = 0; repeat < repeats; ++repeat) {
      barrier.wait();
      const auto start = Clock::now();
      kProducts[isa].run(rounds);
      barrier.wait();
      if (t == 0) seconds[repeat] = seconds_since(start);
    }
  });
  return pinned ? kProducts[isa].operations * static_cast<double>(rounds) * threads : -1;
}

// As probe_products, each thread timed by itself, and `watch_rounds` of amx_loaded before and after
// each repeat; all times at [repeat * threads + thread]. A core whose other hyperthread works for
// somebody else shows in the latter: loads and products then hardly overlap. Returns the operations
// of one repeat of one thread.
double probe_products_watched(int isa, const int* cpus, int threads, int64_t rounds, int repeats,
                              int64_t watch_rounds, double* seconds, double* before,
                              double* after) {
  if (!supported(isa) || !kAmxLoaded.supported()) return 0;
  Barrier barrier(threads);
  const bool pinned = run_pinned(cpus, threads, [&](int t) {
    for (int repeat = 0; repeat < repeats; ++repeat) {
      const auto timed = [](const Products& products, int64_t count) {
        const auto start = Clock::now();
        products.run(count);
        return seconds_since(start);
      };
      barrier.wait();
      before[repeat * threads + t] = timed(kAmxLoaded, watch_rounds);
      seconds[repeat * threads + t] = timed(kProducts[isa], rounds);
      after[repeat * threads + t] = timed(kAmxLoaded, watch_rounds);
    }
  });
  return pinned ? kProducts[isa].operations * static_cast<double>(rounds) : -1;
}

}  // extern "C"
