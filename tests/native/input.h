// What a driver reads its case from, and how it says that a rule does not hold.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

// Stops the process where `condition` does not hold, whatever the build.
#define HOLDS(condition)                                                            \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                 \
    }                                                                               \
  } while (false)

// Numbers out of bytes; 0 once they have run out.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::size_t left() const { return size_; }

  std::uint64_t number(std::size_t bytes) {
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < std::min(bytes, size_); ++i) value |= std::uint64_t{data_[i]} << (8 * i);
    const std::size_t taken = std::min(bytes, size_);
    data_ += taken;
    size_ -= taken;
    return value;
  }

  // In [low, high].
  std::int64_t in(std::int64_t low, std::int64_t high, std::size_t bytes = 2) {
    return low + static_cast<std::int64_t>(number(bytes) % static_cast<std::uint64_t>(high - low + 1));
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
