// AMX for a CPU without it: the instructions of the compiled kernels trap, and are carried out in memory.
//
// A library to preload. What it checks is what the hardware would: the encoded operands, the layout of the
// configuration, the shapes of the tiles of a product. Intel's manual, volume 2, says what they do.
#include <signal.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct Tile {
  unsigned rows = 0, bytes = 0;  // of a row
  uint8_t data[16][64] = {};
};

thread_local Tile tiles[8];

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "AMX: %s\n", what);
  std::abort();
}

void configure(const uint8_t* from) {
  if (from[0] != 1 || from[1] != 0) fail("LDTILECFG takes palette 1 and start row 0");
  for (int i = 2; i < 16; ++i)
    if (from[i]) fail("reserved bytes of a configuration are zero");
  for (int t = 0; t < 8; ++t) {
    tiles[t] = Tile();
    std::memcpy(&tiles[t].bytes, from + 16 + 2 * t, 2);
    tiles[t].rows = from[48 + t];
    if (tiles[t].rows > 16 || tiles[t].bytes > 64) fail("a tile has 16 rows of 64 bytes at most");
  }
}

Tile& configured(int t) {
  if (!tiles[t].rows || !tiles[t].bytes) fail("a tile is used that was not configured");
  return tiles[t];
}

void load(int t, const uint8_t* from, int64_t stride) {
  Tile& tile = configured(t);
  std::memset(tile.data, 0, sizeof tile.data);
  for (unsigned row = 0; row < tile.rows; ++row) std::memcpy(tile.data[row], from + row * stride, tile.bytes);
}

void store(int t, uint8_t* to, int64_t stride) {
  const Tile& tile = configured(t);
  for (unsigned row = 0; row < tile.rows; ++row) std::memcpy(to + row * stride, tile.data[row], tile.bytes);
}

float widened(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Of a pair of bfloat16.
float first(uint32_t pair) { return widened(pair << 16); }
float second(uint32_t pair) { return widened(pair & 0xFFFF0000); }

// TDPBF16PS
void multiply(int sum, int left, int right) {
  Tile& c = configured(sum);
  const Tile &a = configured(left), &b = configured(right);
  if (sum == left || sum == right || left == right) fail("the tiles of a product are three");
  if (c.rows != a.rows || c.bytes != b.bytes || a.bytes != 4 * b.rows) fail("the tiles of a product do not fit");
  for (unsigned m = 0; m < c.rows; ++m) {
    uint32_t row[16], column[16];
    float sums[2][16] = {}, totals[16];
    std::memcpy(row, a.data[m], sizeof row);
    for (unsigned k = 0; k < b.rows; ++k) {
      std::memcpy(column, b.data[k], sizeof column);
      for (int n = 0; n < 16; ++n) {
        sums[0][n] = std::fma(first(row[k]), first(column[n]), sums[0][n]);
        sums[1][n] = std::fma(second(row[k]), second(column[n]), sums[1][n]);
      }
    }
    std::memcpy(totals, c.data[m], sizeof totals);
    for (int n = 0; n < 16; ++n) totals[n] += sums[0][n] + sums[1][n];
    std::memcpy(c.data[m], totals, c.bytes);
  }
}

constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// A memory operand: where it begins, what a row adds, and how many bytes encode it, from ModRM on.
struct Operand {
  uint8_t* base;
  int64_t stride;
  int length;
};

Operand operand(const uint8_t* modrm, int index_high, int base_high, const greg_t* registers, int64_t next) {
  const int mod = *modrm >> 6, rm = *modrm & 7;
  int length = 1, base = rm | base_high;
  int64_t stride = 0;
  const bool from_rip = mod == 0 && rm == 5;
  if (rm == 4) {
    const uint8_t sib = modrm[length++];
    const int index = (sib >> 3 & 7) | index_high;
    base = (sib & 7) | base_high;
    if (index != 4) stride = registers[kRegisters[index]] << (sib >> 6);
  }
  const bool no_base = mod == 0 && (base & 7) == 5;
  int32_t shift = 0;
  if (mod == 1) {
    shift = int8_t(modrm[length++]);
  } else if (mod == 2 || no_base) {
    std::memcpy(&shift, modrm + length, 4);
    length += 4;
  }
  const int64_t from = from_rip ? next + length : no_base ? 0 : int64_t(registers[kRegisters[base]]);
  return {reinterpret_cast<uint8_t*>(from + shift), stride, length};
}

// The instruction at `at`, and its length; 0 if it is none of AMX.
int carry_out(const uint8_t* at, const greg_t* registers) {
  constexpr int kNone = 0, k66 = 1, kF3 = 2, kF2 = 3;
  if (at[0] != 0xC4 || (at[1] & 0x1F) != 2) return 0;
  const int reg_high = at[1] & 0x80 ? 0 : 8, index_high = at[1] & 0x40 ? 0 : 8, base_high = at[1] & 0x20 ? 0 : 8;
  const int third = ~(at[2] >> 3) & 15, prefix = at[2] & 3, code = at[3];
  const uint8_t* modrm = at + 4;
  const int reg = (*modrm >> 3 & 7) | reg_high, rm = *modrm & 7;
  const bool in_memory = *modrm >> 6 != 3;
  const Operand memory =
      in_memory ? operand(modrm, index_high, base_high, registers, int64_t(modrm)) : Operand{nullptr, 0, 1};
  if (code == 0x49 && prefix == kNone && in_memory) {
    configure(memory.base);
  } else if (code == 0x49 && prefix == kNone) {
    for (Tile& tile : tiles) tile = Tile();
  } else if (code == 0x49 && prefix == kF2 && !in_memory) {
    Tile& tile = configured(reg);
    std::memset(tile.data, 0, sizeof tile.data);
  } else if (code == 0x4B && (prefix == kF2 || prefix == k66)) {
    load(reg, memory.base, memory.stride);
  } else if (code == 0x4B && prefix == kF3) {
    store(reg, memory.base, memory.stride);
  } else if (code == 0x5C && prefix == kF3 && !in_memory) {
    multiply(reg, rm, third);
  } else {
    return 0;
  }
  return 4 + memory.length;
}

void trapped(int number, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const int64_t trapped_at = registers[REG_RIP];
  // With those that follow at once: a trap takes longer than what they do.
  while (const int length = carry_out(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers))
    registers[REG_RIP] += length;
  if (registers[REG_RIP] == trapped_at) signal(number, SIG_DFL);  // to happen again, and be reported
}

[[gnu::constructor]] void install() {
  struct sigaction action = {};
  action.sa_sigaction = trapped;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace

// What the kernels ask for before they ask the CPU.
extern "C" bool folo_has_amx_tiles() { return true; }
