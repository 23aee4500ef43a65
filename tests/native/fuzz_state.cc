// Any bytes as a state: refused with a message, or those of a state; what is encoded is decoded as it was.
#include <stdexcept>
#include <string>

#include "codec.h"
#include "input.h"
#include "pair_state.h"
#include "state.h"

namespace {

fastpref::PairIdentity pair_identity(Input& input) {
  fastpref::PairIdentity identity{};
  for (unsigned char& byte : identity.fingerprint) byte = static_cast<unsigned char>(input.number(1));
  identity.pairs = input.number(8);
  identity.layout = {static_cast<fastpref::Style>(input.in(0, 2, 1)), static_cast<std::int32_t>(input.number(4))};
  identity.pack.max_pairs = static_cast<std::int32_t>(input.number(4));
  identity.pack.window = static_cast<std::int32_t>(input.number(4));
  identity.pack.seed = input.number(8);
  for (std::int64_t i = input.in(1, fastpref::kMaxRowShapes, 1); i > 0; --i) {
    identity.pack.shapes.push_back({static_cast<std::int32_t>(input.number(4)),
                                    {static_cast<std::int32_t>(input.number(4)), static_cast<std::int32_t>(input.number(1))}});
  }
  return identity;
}

fastpref::Identity identity(Input& input) {
  fastpref::Identity identity{};
  identity.records = input.number(8);
  identity.seed = input.number(8);
  identity.batch_size = 1 + input.number(4);
  identity.completions = static_cast<std::uint32_t>(input.number(4));
  for (std::int64_t i = input.in(1, fastpref::kMaxShapes, 1); i > 0; --i) {
    identity.shapes.push_back({static_cast<std::int32_t>(input.number(4)), static_cast<std::int32_t>(input.number(4))});
  }
  return identity;
}

template <class Decode>
bool refused(const Decode& decode) {
  try {
    decode();
  } catch (const std::invalid_argument& error) {
    HOLDS(std::string(error.what()).starts_with("state "));
    return true;
  }
  return false;
}

// Content behind a magic and before a right checksum gets past the first doors.
std::string sealed(std::string_view magic, std::string_view content) {
  std::string bytes(magic);
  bytes += content;
  fastpref::put(bytes, fastpref::fnv1a(bytes));
  return bytes;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  Input input(data, size);
  const fastpref::PairIdentity pairs = pair_identity(input);
  const fastpref::Identity records = identity(input);
  const fastpref::PairState state{input.number(8) >> 2, input.number(8) >> 2, input.number(8)};
  const std::string pair_bytes = encode_pair_state(pairs, state);
  HOLDS(pair_bytes.size() <= 316);
  const bool too_far = state.epoch >= std::uint64_t{1} << 62 || state.batch >= std::uint64_t{1} << 62;
  HOLDS(refused([&] { decode_pair_state(pair_bytes, pairs); }) == too_far);
  if (!too_far) {
    const fastpref::PairState back = decode_pair_state(pair_bytes, pairs);
    HOLDS(back.epoch == state.epoch && back.batch == state.batch && back.plan == state.plan);
  }
  const std::uint64_t batches = input.number(3);
  const std::string record_bytes = encode_state(records, batches);
  HOLDS(decode_state(record_bytes, records) == batches);
  // One byte changed, cut short, or anything at all.
  std::string changed = pair_bytes;
  changed[static_cast<std::size_t>(input.in(0, static_cast<std::int64_t>(changed.size()) - 1))] ^=
      static_cast<char>(1 + input.in(0, 254, 1));
  HOLDS(refused([&] { decode_pair_state(changed, pairs); }));
  HOLDS(refused([&] { decode_pair_state(std::string_view(pair_bytes).substr(0, input.in(0, 100, 1)), pairs); }));
  HOLDS(refused([&] { decode_pair_state(record_bytes, pairs); }) && refused([&] { decode_state(pair_bytes, records); }));
  for (const std::string& any : {std::string(bytes), sealed(std::string_view("FPPAIRS\0", 8), bytes),
                                 sealed(std::string_view("FPBATCH\0", 8), bytes)}) {
    refused([&] { decode_pair_state(any, pairs); });
    refused([&] { decode_state(any, records); });
  }
  // The right head and any rest.
  const std::string head = pair_bytes.substr(8, static_cast<std::size_t>(input.in(0, static_cast<std::int64_t>(pair_bytes.size()) - 16)));
  refused([&] { decode_pair_state(sealed(std::string_view("FPPAIRS\0", 8), head + std::string(bytes)), pairs); });
  return 0;
}
