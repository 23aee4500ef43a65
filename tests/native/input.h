// Takes a fuzzer's bytes apart into numbers. Past the end everything is zero.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>

namespace fastpref {

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

  // In [0, bound); small bounds take one byte.
  std::uint64_t below(std::uint64_t bound) {
    return (bound <= 256 ? take<std::uint8_t>() : take<std::uint64_t>()) % bound;
  }

  std::string_view rest() const { return rest_; }
  bool empty() const { return rest_.empty(); }

 private:
  std::string_view rest_;
};

// Ends the process, and so the search, where something that must hold does not.
inline void require(bool holds) {
  if (!holds) std::abort();
}

}  // namespace fastpref
