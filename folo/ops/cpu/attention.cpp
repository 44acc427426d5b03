// Causal attention over paged K and V, which are read where they lie.
//
// What a tile of keys gives to a row depends on nothing before it (worker.h). So the tiles of one long context
// can be shared out among threads, and sequences that share their first blocks can see them together (plan.h),
// without changing a bit.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "kernels.h"
#include "plan.h"
#include "rows.h"
#include "worker.h"

namespace folo::FOLO_ISA {
namespace {

template <typename T>
void attention_of(const Attention& a) {
  const int64_t threads = omp_get_max_threads();
  const Plan plan(a, threads);
  const std::vector<Tile>& tiles = plan.tiles;
  const std::vector<Span>& spans = plan.spans;
  const int64_t count = int64_t(tiles.size()), num_spans = int64_t(spans.size());
  if (!count) return;
  auto compute = [&](Worker<T>& worker, int64_t n, Part to) {
    const Span* next = n + 1 < num_spans ? &spans[size_t(n) + 1] : nullptr;
    return worker.span(spans[size_t(n)], next, next ? tiles[size_t(next->tile)].head : 0, to);
  };
  if (threads == 1 || count >= 4 * threads || num_spans == count) {
    // A thread goes through its share in order, fetching what comes next, and then helps the others with theirs.
    std::vector<std::atomic<int64_t>> taken(plan.shares.size());
#pragma omp parallel
    {
      Worker<T> worker(a);
      for (size_t i = 0; i < taken.size(); ++i) {
        const size_t whose = (size_t(omp_get_thread_num()) + i) % taken.size();
        const Share& share = plan.shares[whose];
        for (int64_t t; (t = share.begin + taken[whose].fetch_add(1, std::memory_order_relaxed)) < share.end;) {
          const Tile& tile = tiles[size_t(t)];
          worker.start(tile);
          for (int64_t n = tile.first_span; n < tile.end_span; ++n) {
            const int64_t first = compute(worker, n, worker.own());
            worker.merge(worker.own(), first, spans[size_t(n)].end);
          }
          worker.finish();
        }
      }
    }
    return;
  }
  // Few, and long: each span is work of its own, and the parts are merged afterwards.
  std::vector<int64_t> first(spans.size());
  const int64_t size = Worker<T>(a).floats_of_part();
  std::unique_ptr<float[]> parts(new float[spans.size() * size_t(size)]);
#pragma omp parallel
  {
    Worker<T> worker(a);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < num_spans; ++n) {
      worker.start(tiles[size_t(spans[size_t(n)].tile)]);
      first[size_t(n)] = compute(worker, n, worker.part_at(parts.get() + n * size));
    }
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < count; ++t) {
      const Tile& tile = tiles[size_t(t)];
      worker.start(tile);
      for (int64_t n = tile.first_span; n < tile.end_span; ++n)
        worker.merge(worker.part_at(parts.get() + n * size), first[size_t(n)], spans[size_t(n)].end);
      worker.finish();
    }
  }
}

}  // namespace

void attention(const Attention& a) { FOLO_BY_DTYPE(a.dtype, attention_of, a); }

}  // namespace folo::FOLO_ISA
