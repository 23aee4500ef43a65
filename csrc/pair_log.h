// What a judge was asked and answered, one record a pair, in files that are only appended to.
//
// Layout, little-endian. Header: magic "FPPAIRS\0", u32 format, u32 bytes of the judge's name, u64 seed, u64 checksum;
// the name, filled with zeros to a multiple of 8, u64 checksum. Record: u32 tokens of the first completion, u32 of the
// second, i64 step, i64 prompt id, f32 p(first beats second), u32 zero, u64 checksum; i32 tokens of the first and then
// of the second, u64 checksum. Each checksum covers what follows the one before and goes on from it (see hash.h), so a
// record fits only where it was written, and lengths are checked before they are believed.
//
// A process killed while it writes leaves the beginning of a record, a loss of power zeros: a torn tail, which ends the
// log without being an error. Everything else that does not fit is damage, and never taken for an answer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace fastpref {

inline constexpr std::uint32_t kPairLogFormat = 1;

struct JudgedPair {
  std::int64_t step;
  std::int64_t prompt;
  float preference;  // p(first beats second), in [0, 1]
  std::span<const std::int32_t> first;
  std::span<const std::int32_t> second;
};

// Bytes that were never written by this log; the message names record and offset.
class PairLogDamage : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// Appends to `out` and returns the checksum that the next record goes on from. Throws std::invalid_argument where a
// value breaks its rule; `out` is then as it was.
std::uint64_t append_header(std::string& out, std::string_view judge, std::uint64_t seed);
std::uint64_t append_pair(std::string& out, std::uint64_t before, const JudgedPair& pair);

// Reads one file from memory. Pairs are checked as they are reached.
class PairReader {
 public:
  // Throws PairLogDamage.
  explicit PairReader(std::string_view bytes);

  // The next pair, valid until the call after; none at the end. Throws PairLogDamage.
  std::optional<JudgedPair> next();

  bool has_header() const { return end_ > 0; }
  const std::string& judge() const { return judge_; }
  std::uint64_t seed() const { return seed_; }
  std::size_t records() const { return records_; }
  // End of what is whole; the rest of the bytes, once `next` gave none, is a torn tail.
  std::size_t end() const { return end_; }

 private:
  bool unwritten(std::size_t stop) const;
  [[noreturn]] void damaged(const std::string& what) const;

  std::string_view bytes_;
  std::size_t end_ = 0;
  std::size_t records_ = 0;
  bool torn_ = false;
  std::uint64_t before_ = 0;
  std::string judge_;
  std::uint64_t seed_ = 0;
  std::vector<std::int32_t> tokens_;
};

// The answers of a log by what was asked: step, prompt and all tokens, as a 128-bit hash.
class PairIndex {
 public:
  void add(const JudgedPair& pair);
  std::optional<float> find(std::int64_t step, std::int64_t prompt, std::span<const std::int32_t> first,
                            std::span<const std::int32_t> second) const;
  // Lets go of all answers of earlier steps.
  void forget_before(std::int64_t step);
  std::size_t size() const;

 private:
  struct Key {
    std::uint64_t low, high;
    bool operator==(const Key&) const = default;
  };
  struct Low {
    std::size_t operator()(const Key& key) const noexcept { return key.low; }
  };
  static Key key(std::int64_t prompt, std::span<const std::int32_t> first, std::span<const std::int32_t> second);

  std::map<std::int64_t, std::unordered_map<Key, float, Low>> steps_;
};

}  // namespace fastpref
