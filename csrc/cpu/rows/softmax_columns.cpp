// softmax and log_softmax over a dimension that is not the last: x [outer, cols, inner], contiguous, with the lanes along inner.
#include "core/dispatch.h"
#include "cpu/dispatch/kernels.h"
#include "cpu/rows/softmax_columns.inl.h"
#include "cpu/simd/parallel.h"
#include "cpu/simd/scratch.h"

namespace foveate::cpu::FOVEATE_ISA {
namespace {

// f(offset of the tile's first element, its columns, thread), a tile at a time.
template <class A, class F>
void each_tile(int64_t outer, int64_t cols, int64_t inner, int threads, const F& f) {
  const int64_t tiles = ceil_div(inner, kColumnBlock<A>), elements = cols * kColumnBlock<A>;
  const int64_t together = 1 + 32768 / elements, count = outer * tiles;  // tiles of a task: enough to hide its hand-out
  parallel_tasks(ceil_div(count, together), threads, [&](int64_t task, int thread) {
    for (int64_t i = task * together; i < count && i < (task + 1) * together; ++i) {
      const int64_t first = i % tiles * kColumnBlock<A>, rest = inner - first;
      f(i / tiles * cols * inner + first, min<int64_t>(rest, kColumnBlock<A>), thread);
    }
  });
}

}  // namespace

void softmax_columns_forward(const SoftmaxColumnsParams& p, int threads) {
  visit_float(p.dtype, [&]<class T>(std::type_identity<T>) {
    using A = AccumulatorOf<T>;
    visit_bool(p.log, [&](auto log) {
      const int64_t elements = p.cols * kColumnBlock<A>, kept = log || elements > kKeptElements ? 0 : elements;
      Scratch scratch;
      scratch.allocate(threads * kept * static_cast<int64_t>(sizeof(A)));
      each_tile<A>(p.outer, p.cols, p.inner, threads, [&](int64_t at, int64_t n, int thread) {
        A* memory = kept > 0 ? scratch.at<A>(thread * kept * static_cast<int64_t>(sizeof(A))) : nullptr;
        softmax_columns_tile<kExpDegree<T>, log>(static_cast<const T*>(p.x) + at, p.inner, static_cast<T*>(p.out) + at, p.inner, p.cols, n,
                                                 static_cast<A>(p.scale), memory);
      });
    });
  });
}

void softmax_columns_backward(const SoftmaxColumnsBackwardParams& p, int threads) {
  visit_float(p.dtype, [&]<class T>(std::type_identity<T>) {
    using A = AccumulatorOf<T>;
    const auto run = [&]<class Out>(Out* dx) {
      visit_bool(p.log, [&](auto log) {
        each_tile<A>(p.outer, p.cols, p.inner, threads, [&](int64_t at, int64_t n, int) {
          softmax_backward_columns_tile<kExpDegree<T>, log>(static_cast<const T*>(p.dout) + at, static_cast<const T*>(p.out) + at, dx + at,
                                                            p.inner, p.cols, n, static_cast<A>(p.scale));
        });
      });
    };
    if (p.dx_wide)
      run(static_cast<A*>(p.dx));
    else
      run(static_cast<T*>(p.dx));
  });
}

}  // namespace foveate::cpu::FOVEATE_ISA
