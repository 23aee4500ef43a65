#include "pair_log.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "hash.h"

namespace fastpref {
namespace {

constexpr std::string_view kMagic("FPPAIRS\0", 8);
constexpr std::size_t kFixedHeader = 24;
constexpr std::size_t kHead = 32;
constexpr std::size_t kCheck = sizeof(std::uint64_t);
constexpr std::size_t kWord = 8;
constexpr std::size_t kSector = 512;

template <class T>
void put(std::string& bytes, T value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

template <class T>
T get(std::string_view bytes, std::size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(value));
  return value;
}

std::string_view view(std::span<const std::int32_t> tokens) {
  return {reinterpret_cast<const char*>(tokens.data()), tokens.size_bytes()};
}

std::size_t padded(std::size_t size) { return (size + kWord - 1) / kWord * kWord; }

}  // namespace

std::uint64_t append_header(std::string& out, std::string_view judge, std::uint64_t seed) {
  if (judge.size() > std::numeric_limits<std::uint16_t>::max()) {
    throw std::invalid_argument("judge must have at most 65535 bytes, got " + std::to_string(judge.size()));
  }
  std::string bytes(kMagic);
  put(bytes, kPairLogFormat);
  put(bytes, static_cast<std::uint32_t>(judge.size()));
  put(bytes, seed);
  const std::uint64_t head = checksum(0, bytes);
  put(bytes, head);
  bytes += judge;
  bytes.resize(padded(bytes.size()));
  const std::uint64_t check = checksum(head, std::string_view(bytes).substr(kFixedHeader + kCheck));
  put(bytes, check);
  out += bytes;
  return check;
}

std::uint64_t append_pair(std::string& out, std::uint64_t before, const JudgedPair& pair) {
  constexpr std::size_t kMost = std::numeric_limits<std::uint32_t>::max();
  if (pair.step < 0) throw std::invalid_argument("step must be at least 0, got " + std::to_string(pair.step));
  // A NaN fails both comparisons.
  if (!(pair.preference >= 0 && pair.preference <= 1)) {
    throw std::invalid_argument("preference must be in [0, 1], got " + std::to_string(pair.preference) +
                                " for prompt " + std::to_string(pair.prompt));
  }
  if (pair.first.size() > kMost || pair.second.size() > kMost) {
    throw std::invalid_argument("a completion must have fewer than 2^32 tokens");
  }
  const std::size_t start = out.size();
  put(out, static_cast<std::uint32_t>(pair.first.size()));
  put(out, static_cast<std::uint32_t>(pair.second.size()));
  put(out, pair.step);
  put(out, pair.prompt);
  put(out, pair.preference);
  put(out, std::uint32_t{0});
  const std::uint64_t head = checksum(before, std::string_view(out).substr(start, kHead));
  put(out, head);
  out += view(pair.first);
  out += view(pair.second);
  const std::uint64_t check = checksum(head, std::string_view(out).substr(start + kHead + kCheck));
  put(out, check);
  return check;
}

PairReader::PairReader(std::string_view bytes) : bytes_(bytes) {
  torn_ = unwritten(1);
  if (torn_) return;
  const std::size_t seen = std::min(bytes.size(), kMagic.size());
  if (bytes.substr(0, seen) != kMagic.substr(0, seen)) damaged("it begins otherwise than a pair log");
  torn_ = bytes.size() < kFixedHeader + kCheck;
  if (torn_) return;
  const std::uint64_t head = checksum(0, bytes.substr(0, kFixedHeader));
  if (get<std::uint64_t>(bytes, kFixedHeader) != head) {
    torn_ = unwritten(kFixedHeader + kCheck);
    if (torn_) return;
    damaged("it does not match its checksum");
  }
  if (const auto format = get<std::uint32_t>(bytes, 8); format != kPairLogFormat) {
    damaged("its format is " + std::to_string(format) + ", and only " + std::to_string(kPairLogFormat) + " is known");
  }
  const std::size_t name = get<std::uint32_t>(bytes, 12);
  const std::size_t end = kFixedHeader + kCheck + padded(name);
  torn_ = bytes.size() < end + kCheck;
  if (torn_) return;
  const std::uint64_t check = checksum(head, bytes.substr(kFixedHeader + kCheck, padded(name)));
  if (get<std::uint64_t>(bytes, end) != check) {
    torn_ = unwritten(end + kCheck);
    if (torn_) return;
    damaged("the judge's name does not match its checksum");
  }
  seed_ = get<std::uint64_t>(bytes, 16);
  judge_ = bytes.substr(kFixedHeader + kCheck, name);
  before_ = check;
  end_ = end + kCheck;
}

std::optional<JudgedPair> PairReader::next() {
  if (torn_ || end_ == bytes_.size()) return std::nullopt;
  const std::string_view rest = bytes_.substr(end_);
  torn_ = rest.size() < kHead + kCheck;
  if (torn_) return std::nullopt;
  const std::uint64_t head = checksum(before_, rest.substr(0, kHead));
  if (get<std::uint64_t>(rest, kHead) != head) {
    torn_ = unwritten(end_ + kHead + kCheck);
    if (torn_) return std::nullopt;
    damaged("its head does not match its checksum");
  }
  const std::size_t first = get<std::uint32_t>(rest, 0);
  const std::size_t second = get<std::uint32_t>(rest, 4);
  const std::size_t size = (first + second) * sizeof(std::int32_t);
  torn_ = rest.size() < kHead + kCheck + size + kCheck;
  if (torn_) return std::nullopt;
  const std::string_view tokens = rest.substr(kHead + kCheck, size);
  const std::uint64_t check = checksum(head, tokens);
  if (get<std::uint64_t>(rest, kHead + kCheck + size) != check) {
    torn_ = unwritten(end_ + kHead + kCheck + size + kCheck);
    if (torn_) return std::nullopt;
    damaged("its tokens do not match their checksum");
  }
  JudgedPair pair{get<std::int64_t>(rest, 8), get<std::int64_t>(rest, 16), get<float>(rest, 24), {}, {}};
  if (pair.step < 0 || !(pair.preference >= 0 && pair.preference <= 1) || get<std::uint32_t>(rest, 28) != 0) {
    damaged("its values are out of range");
  }
  tokens_.resize(first + second);
  if (size > 0) std::memcpy(tokens_.data(), tokens.data(), size);
  const std::span<const std::int32_t> both(tokens_);
  pair.first = both.first(first);
  pair.second = both.subspan(first);
  before_ = check;
  end_ += kHead + kCheck + size + kCheck;
  ++records_;
  return pair;
}

// Whether what should be whole at `stop` was never written: a loss of power leaves zeros, from the beginning of the
// record or of a sector on, to the end of the file.
bool PairReader::unwritten(std::size_t stop) const {
  const std::size_t from = std::min(std::max(end_, (stop - 1) / kSector * kSector), bytes_.size());
  return std::all_of(bytes_.begin() + static_cast<std::ptrdiff_t>(from), bytes_.end(),
                     [](char byte) { return byte == 0; });
}

void PairReader::damaged(const std::string& what) const {
  throw PairLogDamage((end_ == 0 ? std::string("header") : "record " + std::to_string(records_)) + " at byte " +
                      std::to_string(end_) + " is damaged: " + what);
}

PairIndex::Key PairIndex::key(std::int64_t prompt, std::span<const std::int32_t> first,
                              std::span<const std::int32_t> second) {
  const auto half = [&](std::uint64_t seed) {
    return checksum(checksum(mix64(seed ^ static_cast<std::uint64_t>(prompt)), view(first)), view(second));
  };
  return {half(1), half(kGoldenRatio)};
}

void PairIndex::add(const JudgedPair& pair) {
  steps_[pair.step].insert_or_assign(key(pair.prompt, pair.first, pair.second), pair.preference);
}

std::optional<float> PairIndex::find(std::int64_t step, std::int64_t prompt, std::span<const std::int32_t> first,
                                     std::span<const std::int32_t> second) const {
  const auto answers = steps_.find(step);
  if (answers == steps_.end()) return std::nullopt;
  const auto found = answers->second.find(key(prompt, first, second));
  return found == answers->second.end() ? std::nullopt : std::optional(found->second);
}

void PairIndex::forget_before(std::int64_t step) { steps_.erase(steps_.begin(), steps_.lower_bound(step)); }

std::size_t PairIndex::size() const {
  std::size_t total = 0;
  for (const auto& [step, answers] : steps_) total += answers.size();
  return total;
}

}  // namespace fastpref
