// The memory a call works in: one block per calling thread, kept for the next call.
//
// Fresh pages cost more than the arithmetic on them (a meta-gradient may keep 25 MB of activations
// per task and step), so the block is grown and reused, and freed when its thread ends.
#pragma once

#include <cstdint>

// Under AddressSanitizer a block is closed until a Carver hands out its parts, and red zones lie
// between them: the sanitizer sees only malloc's borders by itself. Wider than most blocks of rows,
// so that a stray stride lands in one.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define FM_OPEN_MEMORY(p, bytes) ASAN_UNPOISON_MEMORY_REGION(p, bytes)
#define FM_CLOSE_MEMORY(p, bytes) ASAN_POISON_MEMORY_REGION(p, bytes)
#else
#define FM_OPEN_MEMORY(p, bytes) (static_cast<void>(0))
#define FM_CLOSE_MEMORY(p, bytes) (static_cast<void>(0))
#endif

namespace fastmeta {

#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kRedZone = 4096;
#else
constexpr int64_t kRedZone = 0;
#endif

class Arena {
 public:
  ~Arena();
  char* reserve(int64_t bytes);  // 64-byte aligned; throws std::bad_alloc
  int64_t size() const { return size_; }
  void release();

  static void poison(bool on);  // whether reserve fills the block with NaN, for tests

 private:
  char* block_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace fastmeta
