// Numbers to little-endian bytes and back, and the words in which a saved state is refused.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace fastpref {

// Each step of FNV-1a is a bijection, so any one changed byte is found.
inline std::uint64_t fnv1a(std::string_view bytes) {
  std::uint64_t hash = 0xCBF29CE484222325;
  for (const char byte : bytes) hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001B3;
  return hash;
}

template <class T>
void put(std::string& bytes, T value) {
  for (std::size_t i = 0; i < sizeof(T); ++i) {
    bytes.push_back(static_cast<char>(static_cast<std::uint64_t>(value) >> (8 * i) & 0xFF));
  }
}

[[noreturn]] inline void damaged(const std::string& what) {
  throw std::invalid_argument("state must be the bytes of state(), got " + what +
                              "; start from an undamaged copy or anew");
}

class Reader {
 public:
  explicit Reader(std::string_view bytes) : rest_(bytes) {}

  std::string_view take(std::size_t count) {
    if (count > rest_.size()) damaged("bytes that end early");
    const std::string_view head = rest_.substr(0, count);
    rest_.remove_prefix(count);
    return head;
  }

  template <class T>
  T number() {
    std::uint64_t value = 0;
    const std::string_view bytes = take(sizeof(T));
    for (std::size_t i = 0; i < sizeof(T); ++i) {
      value |= static_cast<std::uint64_t>(static_cast<unsigned char>(bytes[i])) << (8 * i);
    }
    return static_cast<T>(value);
  }

  bool done() const { return rest_.empty(); }

 private:
  std::string_view rest_;
};

// The content of a state that begins with `magic`, without the magic and the checksum at its end.
inline Reader open_state(std::string_view bytes, std::string_view magic) {
  if (!bytes.starts_with(magic)) damaged("bytes that begin otherwise");
  constexpr std::size_t kHash = sizeof(std::uint64_t);
  if (bytes.size() < magic.size() + sizeof(std::uint32_t) + kHash) damaged("bytes that end early");
  const std::string_view content = bytes.substr(0, bytes.size() - kHash);
  if (Reader(bytes.substr(content.size())).number<std::uint64_t>() != fnv1a(content)) {
    damaged("bytes whose checksum does not match");
  }
  return Reader(content.substr(magic.size()));
}

inline std::string hex(std::string_view bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const char byte : bytes) {
    text += kDigits[static_cast<unsigned char>(byte) >> 4];
    text += kDigits[static_cast<unsigned char>(byte) & 15];
  }
  return text;
}

inline void require_equal(const char* field, const std::string& saved, const std::string& own) {
  if (saved != own) {
    throw std::invalid_argument(std::string("state is of another ") + field + ": saved " + saved +
                                ", this batcher has " + own + "; restore with what it was saved with, or start anew");
  }
}

template <class T>
void require_equal(const char* field, T saved, T own) {
  require_equal(field, std::to_string(saved), std::to_string(own));
}

}  // namespace fastpref
