// AMX for CPUs without it, for tests: catches SIGILL on the tile instructions, does in memory what
// the instruction would do (Intel SDM volume 2, chapter 2.16 and the instruction pages), and steps
// over it. Everything else runs natively. Off unless install() is called.
#include <immintrin.h>
#include <signal.h>
#include <string.h>
#include <sys/ucontext.h>
#include <ucontext.h>

#include <atomic>
#include <cstdint>

namespace {

constexpr int kTiles = 8, kMaxRows = 16, kMaxBytes = 64;

struct Tile {
  int rows, bytes;  // as configured
  uint8_t data[kMaxRows][kMaxBytes];
};

struct State {
  bool configured;
  Tile tiles[kTiles];
};
thread_local State state;

enum Kind { kLoadConfig, kStoreConfig, kRelease, kZero, kLoad, kStore, kProduct, kKinds };
std::atomic<int64_t> counts[kKinds];
struct sigaction previous;

uint64_t general_register(const ucontext_t& context, int number) {
  static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                     REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                     REG_R12, REG_R13, REG_R14, REG_R15};
  return static_cast<uint64_t>(context.uc_mcontext.gregs[kOrder[number]]);
}

// A decoded instruction of VEX map 0F38.
struct Instruction {
  uint8_t opcode;
  int prefix;  // VEX.pp: 0 none, 1 66, 2 F3, 3 F2
  int mod, reg, rm, vvvv;
  uint8_t* address;  // of a memory operand without its index
  uint64_t index;    // scaled index register
  int length;
};

bool decode(const ucontext_t& context, Instruction& out) {
  const auto* p = reinterpret_cast<const uint8_t*>(context.uc_mcontext.gregs[REG_RIP]);
  const auto* start = p;
  if (p[0] != 0xc4 || (p[1] & 0x1f) != 2) return false;  // three-byte VEX, map 0F38
  const int r = p[1] & 0x80 ? 0 : 8, x = p[1] & 0x40 ? 0 : 8, b = p[1] & 0x20 ? 0 : 8;
  if (p[2] & 0x84) return false;  // W0, L0
  out.vvvv = ~(p[2] >> 3) & 15;
  out.prefix = p[2] & 3;
  out.opcode = p[3];
  const uint8_t modrm = p[4];
  p += 5;
  out.mod = modrm >> 6;
  out.reg = (modrm >> 3 & 7) | r;
  out.rm = (modrm & 7) | b;
  out.address = nullptr;
  out.index = 0;
  if (out.mod != 3) {
    uint64_t base = 0;
    bool no_base = false;
    if ((modrm & 7) == 4) {
      const uint8_t sib = *p++;
      const int index = (sib >> 3 & 7) | x;
      if (index != 4) out.index = general_register(context, index) << (sib >> 6);
      no_base = (sib & 7) == 5 && out.mod == 0;
      if (!no_base) base = general_register(context, (sib & 7) | b);
    } else if ((modrm & 7) == 5 && out.mod == 0) {  // RIP-relative; no immediate follows
      int32_t offset;
      memcpy(&offset, p, 4);
      p += 4;
      base = reinterpret_cast<uint64_t>(p) + static_cast<int64_t>(offset);
      out.address = reinterpret_cast<uint8_t*>(base);
    } else {
      base = general_register(context, out.rm);
    }
    if (out.address == nullptr) {
      int64_t offset = 0;
      if (out.mod == 1) {
        offset = static_cast<int8_t>(*p++);
      } else if (out.mod == 2 || no_base) {
        int32_t wide;
        memcpy(&wide, p, 4);
        p += 4;
        offset = wide;
      }
      out.address = reinterpret_cast<uint8_t*>(base + offset);
    }
  }
  out.length = static_cast<int>(p - start);
  return true;
}

bool load_config(const uint8_t* memory) {
  if (memory[0] == 0) {
    state = State{};
    return true;
  }
  if (memory[0] != 1) return false;
  State fresh{};
  fresh.configured = true;
  for (int t = 0; t < kTiles; ++t) {
    uint16_t bytes;
    memcpy(&bytes, memory + 16 + 2 * t, 2);
    fresh.tiles[t].bytes = bytes;
    fresh.tiles[t].rows = memory[48 + t];
    if (bytes > kMaxBytes || fresh.tiles[t].rows > kMaxRows) return false;
  }
  state = fresh;
  return true;
}

void store_config(uint8_t* memory) {
  memset(memory, 0, 64);
  if (!state.configured) return;
  memory[0] = 1;
  for (int t = 0; t < kTiles; ++t) {
    const auto bytes = static_cast<uint16_t>(state.tiles[t].bytes);
    memcpy(memory + 16 + 2 * t, &bytes, 2);
    memory[48 + t] = static_cast<uint8_t>(state.tiles[t].rows);
  }
}

// c[m][n] += sum over k of four byte products; a signed or not, b signed or not.
bool product(Tile& c, const Tile& a, const Tile& b, bool a_signed, bool b_signed) {
  if (!state.configured || a.rows != c.rows || b.bytes != c.bytes || a.bytes / 4 != b.rows ||
      c.bytes % 4 || a.bytes % 4)
    return false;
  for (int m = 0; m < c.rows; ++m) {
    for (int k = 0; k < a.bytes / 4; ++k) {
      for (int n = 0; n < c.bytes / 4; ++n) {
        int32_t sum;
        memcpy(&sum, &c.data[m][4 * n], 4);
        auto bits = static_cast<uint32_t>(sum);
        for (int j = 0; j < 4; ++j) {
          const uint8_t x = a.data[m][4 * k + j], y = b.data[k][4 * n + j];
          const int32_t xv = a_signed ? static_cast<int8_t>(x) : x;
          const int32_t yv = b_signed ? static_cast<int8_t>(y) : y;
          bits += static_cast<uint32_t>(xv * yv);
        }
        memcpy(&c.data[m][4 * n], &bits, 4);
      }
    }
  }
  return true;
}

// Whether the instruction was one of ours and legal.
bool execute(const Instruction& i) {
  Kind kind;
  if (i.opcode == 0x49 && i.mod != 3 && i.prefix == 0) {
    kind = kLoadConfig;
    if (!load_config(i.address + i.index)) return false;
  } else if (i.opcode == 0x49 && i.mod != 3 && i.prefix == 1) {
    kind = kStoreConfig;
    store_config(i.address + i.index);
  } else if (i.opcode == 0x49 && i.prefix == 0) {
    kind = kRelease;
    state = State{};
  } else if (i.opcode == 0x49 && i.prefix == 3) {
    kind = kZero;
    if (!state.configured || i.reg >= kTiles) return false;
    memset(state.tiles[i.reg].data, 0, sizeof state.tiles[i.reg].data);
  } else if (i.opcode == 0x4b && i.mod != 3) {
    if (!state.configured || i.reg >= kTiles || i.prefix == 0) return false;
    Tile& tile = state.tiles[i.reg];
    kind = i.prefix == 2 ? kStore : kLoad;
    if (kind == kLoad) memset(tile.data, 0, sizeof tile.data);
    for (int row = 0; row < tile.rows; ++row) {
      uint8_t* memory = i.address + static_cast<int64_t>(i.index) * row;
      if (kind == kStore) {
        memcpy(memory, tile.data[row], tile.bytes);
      } else {
        memcpy(tile.data[row], memory, tile.bytes);
      }
    }
  } else if (i.opcode == 0x5e && i.mod == 3) {
    kind = kProduct;
    if (i.reg >= kTiles || i.rm >= kTiles || i.vvvv >= kTiles) return false;
    // Prefix F2: both signed; F3: first signed; 66: second signed; none: neither.
    const bool a_signed = i.prefix == 3 || i.prefix == 2, b_signed = i.prefix == 3 || i.prefix == 1;
    if (!product(state.tiles[i.reg], state.tiles[i.rm], state.tiles[i.vvvv], a_signed, b_signed))
      return false;
  } else {
    return false;
  }
  counts[kind].fetch_add(1, std::memory_order_relaxed);
  return true;
}

void on_illegal_instruction(int, siginfo_t*, void* raw) {
  auto& context = *static_cast<ucontext_t*>(raw);
  Instruction instruction;
  if (decode(context, instruction) && execute(instruction)) {
    context.uc_mcontext.gregs[REG_RIP] += instruction.length;
  } else {
    sigaction(SIGILL, &previous, nullptr);  // the instruction faults again, for good
  }
}

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

}  // namespace

extern "C" {

int install() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGILL, &action, &previous);
}

// Instructions so far: loadconfig, storeconfig, release, zero, load, store, product.
void read_counts(int64_t* out) {
  for (int i = 0; i < kKinds; ++i) out[i] = counts[i].load();
}

// Test programs of real tile instructions: c += a b for an m x (4 k4) by k4 x n product in the four
// signednesses (0 ss, 1 su, 2 us, 3 uu), each row of a, b and c at its own stride.
__attribute__((target("amx-tile,amx-int8"))) void run_product(int kind, int m, int n, int k4,
                                                              const void* a, long a_stride,
                                                              const void* b, long b_stride, void* c,
                                                              long c_stride) {
  Config config;
  const int bytes[3] = {4 * n, 4 * k4, 4 * n}, rows[3] = {m, m, k4};
  for (int t = 0; t < 3; ++t) {
    config.bytes[t] = static_cast<uint16_t>(bytes[t]);
    config.rows[t] = static_cast<uint8_t>(rows[t]);
  }
  _tile_loadconfig(&config);
  _tile_loadd(0, c, c_stride);
  _tile_loadd(1, a, a_stride);
  _tile_stream_loadd(2, b, b_stride);
  if (kind == 0) _tile_dpbssd(0, 1, 2);
  if (kind == 1) _tile_dpbsud(0, 1, 2);
  if (kind == 2) _tile_dpbusd(0, 1, 2);
  if (kind == 3) _tile_dpbuud(0, 1, 2);
  _tile_stored(0, c, c_stride);
  _tile_release();
}

// The configuration after loading `config`, then after a release; the contents of a zeroed tile.
__attribute__((target("amx-tile"))) void run_config(const void* config, void* loaded,
                                                    void* released, void* zeroed) {
  _tile_loadconfig(config);
  _tile_storeconfig(loaded);
  _tile_loadd(3, zeroed, 64);
  _tile_zero(3);
  _tile_stored(3, zeroed, 64);
  _tile_release();
  _tile_storeconfig(released);
}
}
