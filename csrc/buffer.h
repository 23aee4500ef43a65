// Memory handed to Python: aligned so that an accelerator runtime may take it without a copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

namespace fastpref {

inline constexpr std::size_t kAlignment = 64;

struct Free {
  void operator()(void* pointer) const noexcept { std::free(pointer); }
};

// An uninitialised array of `size` trivially copyable values at a multiple of 64 bytes. Throws std::bad_alloc.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t size) : size_(size) {
    if (size > (std::numeric_limits<std::size_t>::max() - kAlignment) / sizeof(T)) throw std::bad_alloc();
    // aligned_alloc wants a multiple of the alignment, and an empty array still needs an address of its own.
    const std::size_t bytes = (size * sizeof(T) / kAlignment + 1) * kAlignment;
    data_.reset(static_cast<T*>(std::aligned_alloc(kAlignment, bytes)));
    if (!data_) throw std::bad_alloc();
  }

  T* data() noexcept { return data_.get(); }
  const T* data() const noexcept { return data_.get(); }
  std::size_t size() const noexcept { return size_; }
  T& operator[](std::size_t index) noexcept { return data_.get()[index]; }
  T* release() noexcept { return data_.release(); }

 private:
  std::unique_ptr<T, Free> data_;
  std::size_t size_;
};

}  // namespace fastpref
