// What a driver takes its case from, and how it says that a rule does not hold.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

// Stops the process where the condition does not hold, whatever the build.
#define HOLDS(...)                                                                            \
  do {                                                                                        \
    if (!(__VA_ARGS__)) {                                                                     \
      std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #__VA_ARGS__);   \
      std::abort();                                                                           \
    }                                                                                         \
  } while (false)

// Numbers out of bytes; 0 once they have run out.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : rest_(reinterpret_cast<const char*>(data), size) {}

  template <class T>
  T take() {
    T value{};
    const std::size_t count = std::min(sizeof(T), rest_.size());
    if (count > 0) std::memcpy(&value, rest_.data(), count);
    rest_.remove_prefix(count);
    return value;
  }

  std::uint64_t number(std::size_t bytes) {
    std::uint64_t value = 0;
    const std::size_t count = std::min(bytes, rest_.size());
    for (std::size_t i = 0; i < count; ++i) value |= std::uint64_t{static_cast<unsigned char>(rest_[i])} << (8 * i);
    rest_.remove_prefix(count);
    return value;
  }

  // In [0, bound); small bounds take one byte.
  std::uint64_t below(std::uint64_t bound) {
    return (bound <= 256 ? take<std::uint8_t>() : take<std::uint64_t>()) % bound;
  }

  // In [low, high].
  std::int64_t in(std::int64_t low, std::int64_t high, std::size_t bytes = 2) {
    return low + static_cast<std::int64_t>(number(bytes) % static_cast<std::uint64_t>(high - low + 1));
  }

  std::string_view rest() const { return rest_; }
  std::size_t left() const { return rest_.size(); }
  bool empty() const { return rest_.empty(); }

 private:
  std::string_view rest_;
};

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
