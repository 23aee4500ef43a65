#include "state.h"

#include <algorithm>
#include <stdexcept>

namespace fastpref {
namespace {

constexpr std::string_view kMagic("FPBATCH\0", 8);

std::uint64_t fnv1a(std::string_view bytes) {
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

[[noreturn]] void damaged(const std::string& what) {
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

std::string hex(std::string_view bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const char byte : bytes) {
    text += kDigits[static_cast<unsigned char>(byte) >> 4];
    text += kDigits[static_cast<unsigned char>(byte) & 15];
  }
  return text;
}

std::string text(const std::vector<Shape>& shapes) {
  std::string joined;
  for (const Shape& shape : shapes) {
    joined += (joined.empty() ? "(" : " (") + std::to_string(shape.prompt) + ", " + std::to_string(shape.completion) +
              ")";
  }
  return joined;
}

void require_equal(const char* field, const std::string& saved, const std::string& own) {
  if (saved != own) {
    throw std::invalid_argument(std::string("state is of another ") + field + ": saved " + saved +
                                ", this batcher has " + own + "; restore with what it was saved with, or start anew");
  }
}

std::string_view view(const std::array<unsigned char, kFingerprintBytes>& fingerprint) {
  return {reinterpret_cast<const char*>(fingerprint.data()), fingerprint.size()};
}

}  // namespace

std::string encode_state(const Identity& identity, std::uint64_t batches) {
  std::string bytes(kMagic);
  put(bytes, kStateFormat);
  put(bytes, kPlanVersion);
  bytes += view(identity.fingerprint);
  put(bytes, identity.records);
  put(bytes, identity.seed);
  put(bytes, identity.batch_size);
  put(bytes, identity.completions);
  put(bytes, static_cast<std::uint32_t>(identity.shapes.size()));
  for (const Shape& shape : identity.shapes) {
    put(bytes, shape.prompt);
    put(bytes, shape.completion);
  }
  put(bytes, batches);
  put(bytes, fnv1a(bytes));
  return bytes;
}

std::uint64_t decode_state(std::string_view bytes, const Identity& expected) {
  if (!bytes.starts_with(kMagic)) damaged("bytes that begin otherwise");
  constexpr std::size_t kHash = sizeof(std::uint64_t);
  if (bytes.size() < kMagic.size() + sizeof(kStateFormat) + kHash) damaged("bytes that end early");
  const std::string_view content = bytes.substr(0, bytes.size() - kHash);
  if (Reader(bytes.substr(content.size())).number<std::uint64_t>() != fnv1a(content)) {
    damaged("bytes whose checksum does not match");
  }
  Reader reader(content);
  reader.take(kMagic.size());
  require_equal("format", std::to_string(reader.number<std::uint32_t>()), std::to_string(kStateFormat));
  require_equal("plan version", std::to_string(reader.number<std::uint32_t>()), std::to_string(kPlanVersion));
  const std::string_view fingerprint = reader.take(kFingerprintBytes);
  const auto records = reader.number<std::uint64_t>();
  const auto seed = reader.number<std::uint64_t>();
  const auto batch_size = reader.number<std::uint64_t>();
  const auto completions = reader.number<std::uint32_t>();
  const auto count = reader.number<std::uint32_t>();
  if (count > kMaxShapes) damaged("more shapes than there can be");
  std::vector<Shape> shapes(count);
  for (Shape& shape : shapes) {
    shape.prompt = reader.number<std::int32_t>();
    shape.completion = reader.number<std::int32_t>();
  }
  const auto batches = reader.number<std::uint64_t>();
  if (!reader.done()) damaged("bytes that go on too long");

  // The plainest differences first: other data has another fingerprint whatever else differs.
  require_equal("number of completions", std::to_string(completions), std::to_string(expected.completions));
  require_equal("number of records", std::to_string(records), std::to_string(expected.records));
  require_equal("data fingerprint", hex(fingerprint), hex(view(expected.fingerprint)));
  require_equal("seed", std::to_string(seed), std::to_string(expected.seed));
  require_equal("batch_size", std::to_string(batch_size), std::to_string(expected.batch_size));
  require_equal("set of shapes", text(shapes), text(expected.shapes));
  if (batches > (std::uint64_t{1} << 61) / batch_size) damaged("a position beyond 2^61 records");
  return batches;
}

}  // namespace fastpref
