// Threads that ask, go elsewhere and close, all at once: what is handed out is what one thread alone is handed out.
#include <atomic>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "input.h"
#include "loader.h"
#include "random.h"

namespace {

using namespace std::chrono_literals;
using fastpref::Loader;

struct Data {
  std::vector<std::int32_t> values;
  std::vector<fastpref::Ragged> columns;
  std::vector<float> preference;
  std::vector<std::int64_t> ids;
  std::vector<fastpref::Size> sizes;

  explicit Data(std::int64_t count) : values(1000, 5), preference(static_cast<std::size_t>(count), 1.0F) {
    std::mt19937 random(1);
    for (int k = 0; k < 3; ++k) {
      std::vector<std::int64_t> offsets{0};
      for (std::int64_t i = 0; i < count; ++i) offsets.push_back(offsets.back() + 1 + random() % 4);
      values.resize(std::max<std::size_t>(values.size(), offsets.back()), 5);
      columns.emplace_back(values, offsets, 100);
    }
    // The values may have moved.
    for (fastpref::Ragged& column : columns) {
      std::vector<std::int64_t> offsets{0};
      for (std::int64_t i = 0; i < count; ++i) offsets.push_back(offsets.back() + static_cast<std::int64_t>(column.row(i).size()));
      column = fastpref::Ragged(values, offsets, 100);
    }
    for (std::int64_t i = 0; i < count; ++i) {
      ids.push_back(i);
      sizes.push_back(fastpref::size_of({fastpref::Style::kShared, 0}, columns[0].row(i).size(), columns[1].row(i).size(),
                              columns[2].row(i).size()));
    }
  }

  fastpref::PairSource source() const { return {&columns[0], &columns[1], &columns[2], preference, {}, ids}; }
};

// `pairs` in a batch, more than there are for epochs without a batch; with 0 rows are filled.
std::unique_ptr<Loader> make(const Data& data, std::int32_t pairs, std::int32_t threads, std::int32_t prefetch) {
  std::vector<fastpref::RowShape> shapes{{2, {24, 0}}};
  if (pairs > 2) shapes.push_back({pairs, {24, 0}});
  const fastpref::LoaderConfig config{{shapes, 4, 8, 3, pairs}, {fastpref::Style::kShared, 0}, 0, 1, threads, prefetch, true};
  return std::make_unique<Loader>(data.source(), std::vector<std::int32_t>{}, data.sizes, config);
}

std::uint64_t digest(fastpref::PackedBatch& batch) {
  const std::size_t bytes = static_cast<std::size_t>(batch.shape.rows) * static_cast<std::size_t>(batch.shape.tokens) * 4;
  std::uint64_t hash = 0;
  // Padding between the fields is not written: hash fields alone.
  for (std::size_t field = 0; field <= fastpref::kSequences; ++field) {
    const std::byte* at = batch.memory->data() + offsets_of(batch.shape).at[field];
    for (std::size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<std::uint64_t>(at[i])) * 0x100000001B3;
  }
  return hash;
}

std::uint64_t take(Loader& loader) {
  while (true) {
    auto batch = loader.next(20ms);
    if (batch) return digest(*batch);
  }
}

void seek(Loader& loader, const fastpref::Standing& standing) {
  loader.seek(standing.position.epoch, standing.position.batch, standing.plan);
}

void stress(const Data& data, std::int32_t pairs) {
  std::vector<std::uint64_t> expected;
  std::vector<fastpref::Standing> standings;
  const auto plain = make(data, pairs, 1, 0);
  for (int i = 0; i < 60; ++i) {
    standings.push_back(plain->standing());
    expected.push_back(take(*plain));
  }

  std::mt19937 random(2);
  for (int turn = 0; turn < 200; ++turn) {
    const auto loader = make(data, pairs, 1 + turn % 4, turn % 7);
    std::size_t at = 0;
    for (int step = 0; step < 25; ++step) {
      if (random() % 5 == 0) {
        at = random() % 50;
        seek(*loader, standings[at]);
      }
      HOLDS(take(*loader) == expected[at++ % 60]);
      if (at >= 60) break;
    }
  }

  // Several that ask, one that goes elsewhere, one that closes in the middle of it.
  for (int turn = 0; turn < 100; ++turn) {
    const auto loader = make(data, pairs, 3, 1 + turn % 5);
    std::atomic<int> handed{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i) {
      threads.emplace_back([&] {
        try {
          while (true) {
            take(*loader);
            ++handed;
          }
        } catch (const fastpref::Cancelled&) {
        }
      });
    }
    threads.emplace_back([&] {
      try {
        for (std::size_t i = 0;; ++i) {
          seek(*loader, standings[i % 50]);
          loader->standing();
        }
      } catch (const fastpref::Cancelled&) {
      }
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(turn % 4));
    loader->close();
    for (std::thread& thread : threads) thread.join();
    loader->close();
  }
}

}  // namespace

int main() {
  const Data data(40);
  for (const std::int32_t pairs : {0, 7, 90}) stress(data, pairs);
  // A plan that takes a while is given up.
  std::vector<fastpref::Size> many(2'000'000, {3, 0});
  const Data one(1);
  const std::vector<std::int32_t> same(many.size(), 0);
  const fastpref::LoaderConfig config{{{{2, {24, 0}}}, 4, 1 << 16, 3, 0}, {fastpref::Style::kShared, 0}, 0, 1, 2, 2, false};
  Loader large(one.source(), same, std::move(many), config);
  large.close();
  std::printf("loader holds\n");
  return 0;
}
