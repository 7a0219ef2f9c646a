// AMX for CPUs without it, for tests: catches SIGILL on the tile instructions, does in memory what
// the instruction would do (Intel SDM volume 2, chapter 2.16 and the instruction pages), and steps
// over it. Everything else runs natively. Off unless install() is called.
#include <signal.h>
#include <string.h>
#include <sys/ucontext.h>
#include <ucontext.h>

#include <cstdint>

#include "tiles.h"

namespace {

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

// c += a b. Prefix F2: both signed; F3: first signed; 66: second signed; none: neither.
bool multiply(int prefix, int c, int a, int b) {
  switch (prefix) {
    case 3:
      return tiles::multiply<int8_t, int8_t>(c, a, b);
    case 2:
      return tiles::multiply<int8_t, uint8_t>(c, a, b);
    case 1:
      return tiles::multiply<uint8_t, int8_t>(c, a, b);
    default:
      return tiles::multiply<uint8_t, uint8_t>(c, a, b);
  }
}

// Whether the instruction was one of ours and legal.
bool execute(const Instruction& i) {
  const bool in_memory = i.mod != 3;
  switch (i.opcode) {
    case 0x49:
      if (in_memory && i.prefix == 0) return tiles::load_config(i.address + i.index);
      if (in_memory && i.prefix == 1) return tiles::store_config(i.address + i.index);
      if (i.prefix == 0) return tiles::release();
      return i.prefix == 3 && tiles::zero(i.reg);
    case 0x4b: {
      if (!in_memory || i.prefix == 0) return false;
      const auto stride = static_cast<int64_t>(i.index);
      return i.prefix == 2 ? tiles::store(i.reg, i.address, stride)
                           : tiles::load(i.reg, i.address, stride);
    }
    case 0x5e:
      return !in_memory && multiply(i.prefix, i.reg, i.rm, i.vvvv);
    default:
      return false;
  }
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

}  // namespace

extern "C" {

int install() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGILL, &action, &previous);
}
}
