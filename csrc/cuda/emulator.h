// A CUDA block on the CPU: one fiber for each thread, exact fragments, poisoned shared memory.
//
// The schedule is warp-first: a warp, picked at random, runs as far as it can, to the next meeting
// of the block. A missing meeting then reads what was never written, or what is already written
// over; in lock-step it would pass unseen. Shared memory is NaN at the start of each block. Not
// modelled: the memory model, bank conflicts, register limits; cp.async and the like are absent.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace fastmeta {
namespace emulator {

struct Place {
  int x = 0, y = 0;
};
enum class State { kReady, kMeeting, kExchanging, kDone };
struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  std::unique_ptr<char[]> stack;
  State state = State::kDone;
  bool started = false;
  int place = -1, parity = 0;
};
struct Words {
  uint32_t w[6];
  const void* pointer;
};
struct Warp {
  Words words[2][32];
};

constexpr size_t kStack = 1 << 18;
inline Place block, grid;
inline char* shared = nullptr;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::function<void()> body;
inline int current = 0, skipped = -1, threads = 0;
inline uint64_t seed = 0;
inline std::string fault;
inline ucontext_t scheduler;
inline jmp_buf scheduler_jump;

inline int thread() { return current; }

// What returns twice stays out of its callers: their variables may lie in registers.
#define FM_OUT_OF_LINE inline __attribute__((noinline))
// swapcontext asks the kernel at every switch; setjmp does not, but the address sanitizer cannot
// follow it from stack to stack.
#if defined(__SANITIZE_ADDRESS__)
FM_OUT_OF_LINE void leave() { swapcontext(&fibers[current].context, &scheduler); }
FM_OUT_OF_LINE void enter(int i) {
  current = i;
  swapcontext(&scheduler, &fibers[i].context);
}
#else
FM_OUT_OF_LINE void leave() {
  if (!_setjmp(fibers[current].jump)) _longjmp(scheduler_jump, 1);
}
FM_OUT_OF_LINE void enter(int i) {
  current = i;
  if (_setjmp(scheduler_jump)) return;
  if (fibers[i].started) _longjmp(fibers[i].jump, 1);
  fibers[i].started = true;
  setcontext(&fibers[i].context);
}
#endif

inline void start() {
  body();
  fibers[current].state = State::kDone;
  leave();
}

// All threads of the block meet; at the skipped place nobody waits.
inline void meet(int place) {
  if (place == skipped) return;
  fibers[current].state = State::kMeeting;
  fibers[current].place = place;
  leave();
}

// Leaves this lane's words where the warp sees them, and waits for the other lanes.
inline const Words (&gather(const Words& mine))[32] {
  Fiber& f = fibers[current];
  Words(&all)[32] = warps[current / 32].words[f.parity];
  f.parity ^= 1;  // a lane cannot be two exchanges ahead of another
  all[current % 32] = mine;
  f.state = State::kExchanging;
  leave();
  return all;
}

inline uint32_t exchange_from(uint32_t x, int lane) {
  Words mine = {};
  mine.w[0] = x;
  return gather(mine)[lane & 31].w[0];
}
inline uint32_t exchange(uint32_t x, int mask) { return exchange_from(x, current % 32 ^ mask); }

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  Words mine = {};
  mine.pointer = row;
  if (reinterpret_cast<uintptr_t>(row) % 16) fault = "ldmatrix: a row is not on 16 bytes";
  const Words(&all)[32] = gather(mine);
  const int g = current % 32 / 4, t = current % 4;
  for (int m = 0; m < 4; ++m) {
    const auto at = [&](int i, int j) {
      return static_cast<const uint16_t*>(all[8 * m + i].pointer)[j];
    };
    const uint32_t low = transposed ? at(2 * t, g) : at(g, 2 * t);
    const uint32_t high = transposed ? at(2 * t + 1, g) : at(g, 2 * t + 1);
    r[m] = low | high << 16;
  }
}

// Formats ---

inline float as_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline uint16_t to_half(float x) {  // to nearest, ties to even
  const uint32_t u = as_bits(x), sign = u >> 16 & 0x8000u, m = u & 0x7fffffffu;
  if (m > 0x7f800000u) return sign | 0x7e00u;
  if (m >= 0x477ff000u) return sign | 0x7c00u;
  const float a = as_float(m);
  if (a < 6.103515625e-05f) {  // subnormal: multiples of 2^-24
    return sign | static_cast<uint32_t>(std::nearbyint(a * 16777216.0f));
  }
  const uint32_t rounded = m + 0xfffu + (m >> 13 & 1u);
  return sign | ((rounded >> 13) - (112u << 10));
}
inline float half_by_hand(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, e = h >> 10 & 31u, f = h & 0x3ffu;
  if (e == 31) return as_float(sign | 0x7f800000u | f << 13);
  if (e == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(f) * 5.9604644775390625e-08f;
  return as_float(sign | (e + 112) << 23 | f << 13);
}
inline float from_half(uint16_t h) {
  static const std::vector<float> table = [] {
    std::vector<float> all(65536);
    for (int i = 0; i < 65536; ++i) all[i] = half_by_hand(static_cast<uint16_t>(i));
    return all;
  }();
  return table[h];
}
inline uint16_t to_bfloat(float x) {
  const uint32_t u = as_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
inline uint32_t to_tf32(float x) {  // to nearest, ties away from zero
  const uint32_t u = as_bits(x);
  return (u & 0x7f800000u) == 0x7f800000u ? u : (u + 0x1000u) & 0xffffe000u;
}
inline float half_pair(uint32_t u, int i) { return from_half(static_cast<uint16_t>(u >> 16 * i)); }
inline float bfloat_pair(uint32_t u, int i) { return as_float(i ? u & 0xffff0000u : u << 16); }

inline Words fragments(const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  return {{a[0], a[1], a[2], a[3], b[0], b[1]}, nullptr};
}

// C += A B, A [16,16], B [16,8]: a lane holds A's (g,2t..), (g+8,2t..), (g,2t+8..), (g+8,2t+8..),
// and B's (2t..,g), (2t+8..,g).
template <int kDepth, class Get>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Get get) {
  const Words(&all)[32] = gather(fragments(a, b));
  const int g = current % 32 / 4, t = current % 4;
  for (int e = 0; e < 4; ++e) {
    const int row = e / 2, n = 2 * t + e % 2;
    double sum = c[e];
    for (int k = 0; k < kDepth; ++k) {
      const int half = k / 8, lane = k % 8 / 2;
      sum += double(get(all[4 * g + lane].w[row + 2 * half], k % 2)) *
             double(get(all[4 * n + lane].w[4 + half], k % 2));
    }
    c[e] = static_cast<float>(sum);
  }
}

// A [16,8], B [8,8]: A's (g,t), (g+8,t), (g,t+4), (g+8,t+4); B's (t,g), (t+4,g). The low 13 bits of
// an operand are not read.
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Words(&all)[32] = gather(fragments(a, b));
  const int g = current % 32 / 4, t = current % 4;
  for (int e = 0; e < 4; ++e) {
    const int row = e / 2, n = 2 * t + e % 2;
    double sum = c[e];
    for (int k = 0; k < 8; ++k)
      sum += double(as_float(all[4 * g + k % 4].w[row + 2 * (k / 4)] & 0xffffe000u)) *
             double(as_float(all[4 * n + k % 4].w[4 + k / 4] & 0xffffe000u));
    c[e] = static_cast<float>(sum);
  }
}

// Blocks ---

inline bool wake_warp(int w) {  // after an exchange that all lanes have reached
  for (int i = 32 * w; i < 32 * w + 32; ++i)
    if (fibers[i].state != State::kExchanging) return false;
  for (int i = 32 * w; i < 32 * w + 32; ++i) fibers[i].state = State::kReady;
  return true;
}

inline bool run_warp(int w) {  // true if any lane moved
  bool moved = false;
  for (bool again = true; again;) {
    again = false;
    for (int i = 32 * w; i < 32 * w + 32; ++i)
      if (fibers[i].state == State::kReady) {
        enter(i);
        again = true;
      }
    again = wake_warp(w) || again;
    moved = moved || again;
  }
  return moved;
}

inline bool release() {  // true if the block met
  int place = -1;
  for (Fiber& f : fibers) {
    if (f.state != State::kMeeting || (place >= 0 && f.place != place)) return false;
    place = f.place;
  }
  for (Fiber& f : fibers) f.state = State::kReady;
  return true;
}

FM_OUT_OF_LINE void prepare(Fiber& f) {
  if (!f.stack) f.stack.reset(new char[kStack]);
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, start, 0);
  f.state = State::kReady;
  f.started = false;
  f.parity = 0;
}

inline bool run_block(std::mt19937_64& random) {
  for (Fiber& f : fibers) prepare(f);
  std::vector<int> order(warps.size());
  for (;;) {
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    bool moved = false;
    while (!order.empty()) {
      std::uniform_int_distribution<size_t> pick(0, order.size() - 1);
      const size_t at = pick(random);
      moved = run_warp(order[at]) || moved;
      order.erase(order.begin() + static_cast<std::ptrdiff_t>(at));
    }
    order.resize(warps.size());
    bool done = true;
    for (Fiber& f : fibers) done = done && f.state == State::kDone;
    if (done) return true;
    if (!release() && !moved) return false;  // some wait at another place, or a warp is divided
  }
}

// Every block of the grid, one after the other. False: threads wait for each other for ever.
inline bool launch(Place blocks, int count, size_t bytes, std::function<void()> kernel) {
  std::mt19937_64 random(seed);
  std::vector<char> memory(bytes + 16);
  void* at = memory.data();
  size_t space = bytes + 16;
  shared = static_cast<char*>(std::align(16, bytes, at, space));
  threads = count;
  if (static_cast<int>(fibers.size()) != count) fibers = std::vector<Fiber>(count);
  warps.resize(count / 32);
  body = std::move(kernel);
  grid = blocks;
  for (block.y = 0; block.y < blocks.y; ++block.y)
    for (block.x = 0; block.x < blocks.x; ++block.x) {
      std::memset(shared, 0xff, bytes);
      if (!run_block(random)) return false;
    }
  return true;
}

}  // namespace emulator
}  // namespace fastmeta
