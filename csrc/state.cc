#include "state.h"

#include <algorithm>
#include <stdexcept>

#include "codec.h"

namespace fastpref {
namespace {

constexpr std::string_view kMagic("FPBATCH\0", 8);

std::string text(const std::vector<Shape>& shapes) {
  std::string joined;
  for (const Shape& shape : shapes) {
    joined += (joined.empty() ? "(" : " (") + std::to_string(shape.prompt) + ", " + std::to_string(shape.completion) +
              ")";
  }
  return joined;
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
  Reader reader = open_state(bytes, kMagic);
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
