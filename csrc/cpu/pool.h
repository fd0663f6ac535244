// The thread pool of the CPU kernels: one function. No arithmetic and nothing about the loss.
//
// The items of a loop are handed out in chunks to whichever lane is free, so an item's result must depend on
// the item alone: then the bits are the same for every number of threads. Not OpenMP: its threads spin while
// they wait, and a second copy of its runtime beside PyTorch's would be a second pool that
// torch.set_num_threads does not reach.
#ifndef L2T_CPU_POOL_H
#define L2T_CPU_POOL_H

#include <cstdint>

namespace l2t {

// body(context, begin, end, lane) for chunks [begin, end) that together are [0, count), on at most `threads`
// lanes, the caller's among them; no two chunks run on one lane at once, so the lane names a piece of scratch
// memory. `cost` is the work of one item in row elements (about a nanosecond each): little work is done by
// the caller alone. The body must not throw.
using Body = void (*)(const void* context, int64_t begin, int64_t end, int lane);
void run(int threads, int64_t count, int64_t cost, Body body, const void* context) noexcept;

template <class F>
void parallel_for(int threads, int64_t count, int64_t cost, const F& f) {
  run(
      threads, count, cost,
      [](const void* context, int64_t begin, int64_t end, int lane) {
        const F& f = *static_cast<const F*>(context);
        for (int64_t i = begin; i < end; ++i) f(i, lane);
      },
      &f);
}

}  // namespace l2t
#endif
