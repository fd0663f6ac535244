// A large output that nobody has touched yet is given to the system as pages of 2 MB rather than 4 kB: the first touch
// of each page is most of what such an output costs. docs/benchmarks.md has the kernel with fresh outputs beside the
// one with reused outputs. For memory in use the call changes nothing.
//
// It is advice: where the system has no such pages, or keeps them from programs, nothing happens.
#ifndef L2T_CPU_PAGES_H
#define L2T_CPU_PAGES_H

#include <cstdint>

#if defined(__linux__)
#  include <sys/mman.h>
#endif

namespace l2t {

inline void advise_large_pages(void* out, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  if (out == nullptr || bytes < static_cast<int64_t>(2 * page)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(out) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(out) + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)out, (void)bytes;
#endif
}

}  // namespace l2t
#endif
