// The reader of pair logs: any bytes are a log, a torn tail or damage, and what was not written is never read.
#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "hash.h"
#include "pair_log.h"
#include "input.h"

namespace {

using namespace fastpref;

struct Pair {
  std::int64_t step, prompt;
  float preference;
  std::vector<std::int32_t> first, second;
  bool operator==(const Pair&) const = default;
};

Pair copy_of(const JudgedPair& pair) {
  return {pair.step,
          pair.prompt,
          pair.preference,
          {pair.first.begin(), pair.first.end()},
          {pair.second.begin(), pair.second.end()}};
}

struct Log {
  std::vector<Pair> pairs;
  std::size_t end = 0;
  bool damaged = false;
};

Log read(std::string_view bytes) {
  Log log;
  try {
    PairReader reader(bytes);
    while (const std::optional<JudgedPair> pair = reader.next()) log.pairs.push_back(copy_of(*pair));
    HOLDS(!reader.next().has_value());
    HOLDS(reader.records() == log.pairs.size());
    log.end = reader.end();
  } catch (const PairLogDamage&) {
    log.damaged = true;
  }
  HOLDS(log.end <= bytes.size());
  return log;
}

template <class T>
T at(const std::string& bytes, std::size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(value));
  return value;
}

void put_check(std::string& bytes, std::size_t offset, std::uint64_t check) {
  std::memcpy(bytes.data() + offset, &check, sizeof(check));
}

// Makes the checksums fit whatever the bytes say, so that the search gets behind them.
void repair(std::string& bytes) {
  if (bytes.size() < 32) return;
  std::memcpy(bytes.data(), "FPPAIRS\0\1\0\0", 11);
  std::uint64_t before = checksum(0, std::string_view(bytes).substr(0, 24));
  put_check(bytes, 24, before);
  std::size_t offset = 32;
  const auto block = [&](std::size_t size) {
    if (bytes.size() - offset < 8 || bytes.size() - offset - 8 < size) return false;
    before = checksum(before, std::string_view(bytes).substr(offset, size));
    put_check(bytes, offset + size, before);
    offset += size + 8;
    return true;
  };
  if (!block((std::size_t{at<std::uint32_t>(bytes, 12)} + 7) / 8 * 8)) return;
  while (offset < bytes.size()) {
    const std::size_t head = offset;
    if (!block(32)) return;
    if (!block(4 * (std::size_t{at<std::uint32_t>(bytes, head)} + at<std::uint32_t>(bytes, head + 4)))) return;
  }
}

void check_whatever(std::string_view bytes) {
  const Log log = read(bytes);
  if (log.damaged) return;
  const Log again = read(bytes.substr(0, log.end));
  HOLDS(!again.damaged && again.end == log.end && again.pairs == log.pairs);
  PairIndex index;
  for (const Pair& pair : log.pairs) {
    index.add({pair.step, pair.prompt, pair.preference, pair.first, pair.second});
    HOLDS(index.find(pair.step, pair.prompt, pair.first, pair.second) == pair.preference);
  }
  HOLDS(index.size() <= log.pairs.size());
}

// Writes what the input says, then cuts the file or flips one bit of it.
void check_written(Input input) {
  std::string bytes;
  std::vector<Pair> pairs;
  std::vector<std::size_t> ends;
  const std::string judge(input.number(1) % 20, 'j');
  std::uint64_t chain = append_header(bytes, judge, input.number(8));
  const bool cut = input.number(1) % 2 == 0;
  const auto where = static_cast<std::uint32_t>(input.number(4));
  ends.push_back(bytes.size());
  while (input.left() > 0 && pairs.size() < 64) {
    Pair pair{static_cast<std::int64_t>(input.number(4)), static_cast<std::int64_t>(input.number(8)),
              static_cast<float>(input.number(1) % 256) / 255, {}, {}};
    for (auto* side : {&pair.first, &pair.second}) {
      side->resize(input.number(1) % 12);
      for (std::int32_t& token : *side) token = static_cast<std::int32_t>(input.number(4));
    }
    const auto append = [&](float preference) {
      chain = append_pair(bytes, chain, {pair.step, pair.prompt, preference, pair.first, pair.second});
    };
    if (const auto wrong = std::bit_cast<float>(static_cast<std::uint32_t>(input.number(4))); pairs.empty() && !(wrong >= 0 && wrong <= 1)) {
      const std::string before = bytes;
      bool refused = false;
      try {
        append(wrong);
      } catch (const std::invalid_argument&) {
        refused = bytes == before;
      }
      HOLDS(refused);
    }
    append(pair.preference);
    pairs.push_back(pair);
    ends.push_back(bytes.size());
  }
  const Log whole = read(bytes);
  HOLDS(!whole.damaged && whole.end == bytes.size() && whole.pairs == pairs);
  if (cut) {
    const std::size_t size = where % (bytes.size() + 1);
    std::size_t kept = 0;
    while (kept < ends.size() && ends[kept] <= size) ++kept;
    const Log log = read(std::string_view(bytes).substr(0, size));
    HOLDS(!log.damaged && log.end == (kept == 0 ? 0 : ends[kept - 1]));
    pairs.resize(kept == 0 ? 0 : kept - 1);
    HOLDS(log.pairs == pairs);
  } else {
    bytes[where / 8 % bytes.size()] ^= static_cast<char>(1U << where % 8);
    HOLDS(read(bytes).damaged);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  const std::uint64_t kind = input.number(1) % 3;
  if (kind == 2) {
    check_written(input);
    return 0;
  }
  std::string bytes(reinterpret_cast<const char*>(data) + (size - input.left()), input.left());
  if (kind == 1) repair(bytes);
  check_whatever(bytes);
  return 0;
}
