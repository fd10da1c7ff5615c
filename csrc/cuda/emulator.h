// CUDA blocks on the CPU: one fiber for each thread, exact fragments, poisoned shared memory.
//
// The schedule is warp-first: a warp, picked at random, runs as far as it can, to the next meeting
// of the block. A missing meeting then reads what was never written, or what is already written
// over; in lock-step it would pass unseen. The blocks of a team are there together, and one of them,
// picked at random, runs as far as it can, to the next meeting of the team. Shared memory is NaN at
// the start of each block and again when it ends. Not modelled: the memory model, bank conflicts,
// register limits; cp.async and the like are absent.
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
enum class State { kReady, kMeeting, kMeetingTeam, kExchanging, kDone };
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
inline char* shared = nullptr;       // of the block that runs
inline std::vector<char*> memories;  // of all blocks of the team
inline std::vector<Fiber> fibers;    // of the team, block after block
inline std::vector<Warp> warps;
inline std::function<void()> body;
inline int current = 0, skipped = -1, threads = 0;  // current: of the team; threads: of a block
inline int base = 0;                                // y of the team's first block
// The device: blocks of a cluster at most (1: it has none), blocks that it holds at once; and how
// many multiprocessors work is dealt out for.
inline int cluster_limit = 8, block_limit = 1 << 20, multiprocessors = 132;
inline uint64_t seed = 0;
inline std::string fault;
inline ucontext_t scheduler;
inline jmp_buf scheduler_jump;

inline int thread() { return current % threads; }
// What lies in another block's shared memory where p lies in this one's.
inline const float* of_rank(const float* p, int rank) {
  return reinterpret_cast<const float*>(memories[rank] +
                                        (reinterpret_cast<const char*>(p) - shared));
}

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
inline void meet(int place, State state = State::kMeeting) {
  if (place == skipped) return;
  fibers[current].state = state;
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

// True if all threads from first to last met.
inline bool release(int first, int last, State state) {
  const int place = fibers[first].place;
  for (int i = first; i < last; ++i)
    if (fibers[i].state != state || fibers[i].place != place) return false;
  for (int i = first; i < last; ++i) fibers[i].state = State::kReady;
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

inline bool is_done(int first, int last) {
  for (int i = first; i < last; ++i)
    if (fibers[i].state != State::kDone) return false;
  return true;
}

inline int pick(std::vector<int>& some, std::mt19937_64& random) {
  std::uniform_int_distribution<size_t> any(0, some.size() - 1);
  const size_t at = any(random);
  const int one = some[at];
  some.erase(some.begin() + static_cast<std::ptrdiff_t>(at));
  return one;
}
inline std::vector<int> up_to(int count) {
  std::vector<int> all;
  for (int i = 0; i < count; ++i) all.push_back(i);
  return all;
}

// A block, to a meeting of the team or to its end; true if any thread moved.
inline bool run_block(int rank, std::mt19937_64& random) {
  block.y = base + rank;
  shared = memories[rank];
  const int first = rank * threads, last = first + threads;
  for (bool any = false;;) {
    bool moved = false;
    for (std::vector<int> order = up_to(threads / 32); !order.empty();)
      moved = run_warp(first / 32 + pick(order, random)) || moved;
    any = any || moved;
    if (!release(first, last, State::kMeeting) && !moved) return any;
  }
}

// Blocks that are there together; false: threads wait at different places, or a warp is divided.
inline bool run_team(size_t bytes, std::mt19937_64& random) {
  const int blocks = static_cast<int>(memories.size());
  for (int i = 0; i < blocks * threads; ++i) prepare(fibers[i]);
  for (char* one : memories) std::memset(one, 0xff, bytes);
  for (;;) {
    bool moved = false;
    for (std::vector<int> order = up_to(blocks); !order.empty();) {
      const int rank = pick(order, random);
      moved = run_block(rank, random) || moved;
      if (is_done(rank * threads, (rank + 1) * threads)) std::memset(memories[rank], 0xff, bytes);
    }
    if (is_done(0, blocks * threads)) return true;
    if (!release(0, blocks * threads, State::kMeetingTeam) && !moved) return false;
  }
}

// Every block of the grid, one after the other; the blocks of a team, which share an x, together.
// False: threads wait for each other for ever.
inline bool launch(Place blocks, int count, size_t bytes, std::function<void()> kernel,
                   bool teams = false) {
  std::mt19937_64 random(seed);
  const size_t room = (bytes + 31) / 16 * 16;
  const int side = teams ? blocks.y : 1;
  std::vector<char> memory(side * room);
  memories.clear();
  for (int i = 0; i < side; ++i) {
    void* at = memory.data() + i * room;
    size_t space = room;
    memories.push_back(static_cast<char*>(std::align(16, bytes, at, space)));
  }
  threads = count;
  if (static_cast<int>(fibers.size()) < side * count) fibers.resize(side * count);
  warps.resize(side * count / 32);
  body = std::move(kernel);
  grid = blocks;
  for (int y = 0; y < blocks.y; y += side)
    for (block.x = 0; block.x < blocks.x; ++block.x) {
      base = y;
      if (!run_team(bytes, random)) return false;
    }
  return true;
}

}  // namespace emulator
}  // namespace fastmeta
