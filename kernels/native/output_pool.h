// Memory of large outputs, kept for the next call: the system maps and zeroes fresh pages for every allocation of this size, which
// costs more than computing what goes into them. Thread-safe. Freed blocks stay within kKeptBytes; they lie on huge pages if it can be.
#pragma once
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cmm_pool {

constexpr size_t kLeastBytes = size_t(1) << 20, kKeptBytes = size_t(512) << 20, kAlign = size_t(2) << 20;

struct Block {
  void* memory;
  size_t bytes;
};

class Pool {
 public:
  Block take(size_t wanted) {
    const size_t bytes = (wanted + kAlign - 1) / kAlign * kAlign;
    {
      std::lock_guard<std::mutex> guard(lock_);
      auto fits = [&](const Block& each) { return each.bytes >= bytes && each.bytes <= bytes + bytes / 4; };
      // the block given back last is the likeliest to be in the cache
      auto found = std::find_if(free_.rbegin(), free_.rend(), fits);
      if (found != free_.rend()) {
        Block block = *found;
        free_.erase(std::next(found).base());
        kept_ -= block.bytes;
        return block;
      }
    }
    void* memory = std::aligned_alloc(kAlign, bytes);
    TORCH_CHECK(memory, "cmm: out of memory for an output of ", bytes, " bytes");
#if defined(__linux__)
    madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return {memory, bytes};
  }

  void give(Block block) {
    std::vector<Block> surplus;
    {
      std::lock_guard<std::mutex> guard(lock_);
      free_.push_back(block);
      kept_ += block.bytes;
      while (kept_ > kKeptBytes) {
        surplus.push_back(free_.front());
        kept_ -= free_.front().bytes;
        free_.erase(free_.begin());
      }
    }
    for (const Block& each : surplus) std::free(each.memory);
  }

 private:
  std::mutex lock_;
  std::vector<Block> free_;
  size_t kept_ = 0;
};

// Never destroyed: tensors may outlive the end of the program's statics.
inline Pool& pool() {
  static Pool* the = new Pool;
  return *the;
}

// As at::empty; large ones come from the pool.
inline at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  size_t bytes = options.dtype().itemsize();
  for (int64_t size : sizes) bytes *= (size_t)size;
  if (bytes < kLeastBytes) return at::detail::empty_cpu(sizes, options);  // past the dispatcher, which takes half as long as a walk
  Block block = pool().take(bytes);
  return at::from_blob(block.memory, sizes, [block](void*) { pool().give(block); }, options);
}

}  // namespace cmm_pool
