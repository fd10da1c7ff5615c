// The memory a call works in: one block per calling thread, kept for the next call.
//
// Fresh pages cost more than the arithmetic on them (a meta-gradient may keep 25 MB of activations
// per task and step), so the block is grown and reused, and freed when its thread ends.
#pragma once

#include <cstdint>

namespace fastmeta {

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
