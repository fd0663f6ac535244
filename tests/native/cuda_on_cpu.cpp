// The scheduler of cuda_on_cpu.h: fibers, their order, what they wait for, and what the sanitizers are told.
//
// Compiled WITHOUT -fsanitize, one object for all builds: its own bookkeeping is no thread's memory access. It
// speaks to the sanitizer that the rest was built with through weak symbols, which are null without one.
//
// What the thread sanitizer must be told, each learnt from a false or a missing report:
//   * switches do not order memory (no_sync); only barriers release and acquire, and the end of a launch;
//   * fibers, stacks and shared memory are new for each block until the launch (or a wave of it) ends: what is
//     used again orders, or races with, the block that had it before. From then on fibers are kept: one costs
//     0.5 ms and 0.8 MB;
//   * malloc and memset count as writes by the fiber that runs, so they happen as the launching thread, which
//     releases afterwards;
//   * what a fiber calls here has no template of the standard library that the tests may have too: of two copies
//     the linker keeps one, which can be theirs, and then the scheduler's own memory seems shared by all fibers.
//     So containers hold types of this file, and random numbers are made here;
//   * two variables for each barrier in turn: a thread that is already at the next one must not order one that
//     has yet to leave this one.
// What the address sanitizer must be told: each switch, with the bounds of the stack.
#include "cuda_on_cpu.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#ifndef __x86_64__
#  include <ucontext.h>
#endif

#define WEAK __attribute__((weak))
extern "C" {
WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_size);
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_acquire(void* address);
WEAK void __tsan_release(void* address);
}

namespace l2t_shim {
namespace {

constexpr unsigned no_sync = 1;  // __tsan_switch_to_fiber_no_sync
constexpr int warp_size = 32;
constexpr size_t stack_bytes = 256 << 10;  // a sanitizer's report is written on the fiber's own stack
constexpr size_t shared_limit = 48 << 10, opt_in_limit = 64 << 10;  // of the smallest card, sm_75
constexpr size_t tsan_fibers = 1024;  // at a time: memory, and the time of each barrier
constexpr int multiprocessors = 3;

// ---- switching stacks ----

#ifdef __x86_64__
extern "C" void l2t_shim_switch(void** save_stack, void* load_stack);
asm(R"(
.text
l2t_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

struct Context {
  char* bottom = nullptr;  // of the stack; of the main thread's own once a fiber has been told
  size_t size = 0;
  void* fake_stack = nullptr;
  void* tsan = nullptr;
#ifdef __x86_64__
  void* stack = nullptr;
  void prepare(void (*entry)(), size_t stagger) {
    // Below the registers that the switch pops lies the address that it returns to; at a function's entry the
    // stack is 8 short of a multiple of 16. Tops that all lie on the same cache lines would evict each other.
    void** top = reinterpret_cast<void**>(bottom + size - 64 - stagger);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    stack = std::fill_n(top - 6, 6, nullptr) - 6;
  }
  void load(Context& from) { l2t_shim_switch(&from.stack, stack); }
#else
  ucontext_t context;
  void prepare(void (*entry)(), size_t stagger) {
    getcontext(&context);
    context.uc_stack.ss_sp = bottom;
    context.uc_stack.ss_size = size - stagger;
    makecontext(&context, entry, 0);
  }
  void load(Context& from) { swapcontext(&from.context, &context); }
#endif
};

struct Fiber : Context {
  enum { ready, waiting, ended } state;
  Call call;
  unsigned mask;
  int source_lane;
  uint64_t bits, result;
  Site at;
  unsigned warp_syncs;  // whose count tells the two variables of a __syncwarp apart,
  char sync_warp[2];    // those of the lowest lane of its mask
  size_t number;        // in the block
  uint3 thread;
};

// ---- the launch and its block ----

struct Launch {
  const std::function<void()>* body;
  dim3 grid, block;
  size_t shared_bytes, shared_limit;
  bool running = false;
} launch;

struct Word {
  uint64_t bits;
};

struct Warp {
  unsigned waiting;  // lanes in a call of the warp
};

struct Shared {
  const char* key;
  size_t bytes;
  void* memory;
};

struct Block {
  uint3 index;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  std::vector<Word> ready;  // a bit a fiber, at its place in the order
  size_t left, at_barrier, cursor;
  unsigned barriers;
  std::vector<Shared> shared;
  void* dynamic;
} block;

Context main_context;
Fiber* current = nullptr;
uint3 thread_index, block_index;
dim3 block_dim, grid_dim;
char sync_block[2], sync_shared, sync_start, sync_end;
uint64_t blocks = 0;
std::map<const void*, size_t> allowed_shared;

[[noreturn]] void fail(Site at, const Fiber* fiber, const char* format, ...) {
  char sentence[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(sentence, sizeof sentence, format, arguments);
  va_end(arguments);
  std::fflush(stdout);
  if (at.file) std::fprintf(stderr, "%s:%d: ", at.file, at.line);
  std::fprintf(stderr, "CUDA fault: ");
  if (fiber)
    std::fprintf(stderr, "block (%u,%u,%u), thread (%u,%u,%u) ", block.index.x, block.index.y, block.index.z,
                 fiber->thread.x, fiber->thread.y, fiber->thread.z);
  std::fprintf(stderr, "%s\n", sentence);
  _exit(70);
}

// ---- orders ----

struct Random {  // splitmix64
  uint64_t state;
  uint64_t operator()() {
    uint64_t x = state += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
  }
};

struct Order {
  bool reverse, ahead, random;
  Random generator;
};

Order parse(const std::string& name) {
  if (name == "lockstep") return {false, false, false, {}};
  if (name == "reverse") return {true, false, false, {}};
  if (name == "first-warp-ahead") return {false, true, false, {}};
  if (name == "last-warp-ahead") return {true, true, false, {}};
  if (name.rfind("random:", 0) == 0) {
    return {false, false, true, {std::strtoull(name.c_str() + 7, nullptr, 10)}};
  }
  fail({}, nullptr, "there is no order '%s'", name.c_str());
}

Order& order() {
  static Order chosen = parse(std::getenv("L2T_CUDA_ORDER") ? std::getenv("L2T_CUDA_ORDER") : "lockstep");
  return chosen;
}

void set_ready(size_t number) {
  const size_t place = order().reverse ? block.fibers.size() - 1 - number : number;
  block.fibers[number]->state = Fiber::ready;
  block.ready[place / 64].bits |= uint64_t(1) << place % 64;
}

// The next fiber that can go on, from a place on that the order says; null if none can.
Fiber* take_ready() {
  const size_t count = block.fibers.size(), words = block.ready.size();
  size_t from = block.cursor;
  if (order().ahead) from = 0;
  if (order().random) from = order().generator() % count;
  for (size_t i = 0; i <= words; ++i) {
    const size_t word = (from / 64 + i) % words;
    uint64_t bits = block.ready[word].bits;
    if (i == 0) bits &= ~uint64_t(0) << from % 64;
    if (bits == 0) continue;
    const size_t place = 64 * word + size_t(__builtin_ctzll(bits));
    block.ready[word].bits &= ~(uint64_t(1) << place % 64);
    block.cursor = (place + 1) % count;
    return block.fibers[order().reverse ? count - 1 - place : place];
  }
  return nullptr;
}

// ---- fibers ----

void switch_to(Context& from, Context& to, bool for_good = false) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.bottom, to.size);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan, no_sync);
  to.load(from);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

void resume(Context& from, bool for_good = false) {
  Fiber* next = take_ready();
  if (next == &from) return;
  current = next;
  if (next) thread_index = next->thread;
  switch_to(from, next ? *next : main_context, for_good);
}

void fiber_main() {
  if (__sanitizer_finish_switch_fiber) {
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!main_context.bottom) main_context.bottom = (char*)bottom, main_context.size = size;
  }
  if (__tsan_acquire) __tsan_acquire(&sync_start);
  (*launch.body)();
  if (__tsan_release) __tsan_release(&sync_end);
  current->state = Fiber::ended;
  --block.left;
  resume(*current, true);
}

// What a fiber needs the launching thread to do for it.
template <class F>
void as_main(const F& work) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(main_context.tsan, no_sync);
  work();
  if (__tsan_release) __tsan_release(&sync_shared);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(current->tsan, no_sync);
  if (__tsan_acquire) __tsan_acquire(&sync_shared);
}

// All fibers, those that no block has, and what blocks have left: given back when a wave has ended.
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> free_fibers, ended_fibers;
std::vector<void*> ended_shared;

// Stacks by a bare system call, since a sanitizer's mmap would clear the shadow of each whole one.
void make_fibers() {
  const size_t page = 4096, count = 64;
  char* stacks = (char*)syscall(SYS_mmap, nullptr, count * stack_bytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail({}, nullptr, "has no memory for stacks");
  for (size_t i = 0; i < count; ++i) {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber* fiber = fibers.back().get();
    fiber->bottom = stacks + i * stack_bytes;
    fiber->size = stack_bytes;
    if (__tsan_create_fiber) fiber->tsan = __tsan_create_fiber(0);
    syscall(SYS_mprotect, fiber->bottom, page, PROT_NONE);
    free_fibers.push_back(fiber);
  }
}

Fiber* take_fiber(size_t number) {
  if (free_fibers.empty()) make_fibers();
  Fiber* fiber = free_fibers.back();
  free_fibers.pop_back();
  ended_fibers.push_back(fiber);
  const dim3& size = launch.block;
  fiber->number = number;
  fiber->thread = {unsigned(number % size.x), unsigned(number / size.x % size.y),
                   unsigned(number / size.x / size.y)};
  fiber->warp_syncs = 0;
  fiber->prepare(fiber_main, number % 61 * 192);
  return fiber;
}

void give_back() {
  if (__tsan_acquire) __tsan_acquire(&sync_end);
  for (Fiber* fiber : ended_fibers) free_fibers.push_back(fiber);
  for (void* memory : ended_shared) std::free(memory);
  ended_fibers.clear(), ended_shared.clear();
}

void* poisoned(size_t bytes) {
  void* memory = std::malloc(bytes);
  return std::memset(memory, 0xff, bytes);
}

// ---- why nothing goes on ----

const char* name(Call call) {
  switch (call) {
    case Call::shuffle:
      return "a shuffle";
    case Call::vote:
      return "a vote";
    case Call::sync_warp:
      return "__syncwarp";
    case Call::sync_threads:
      return "__syncthreads";
  }
  return "?";
}

bool same_call(const Fiber* a, const Fiber* b) {
  return b->state == Fiber::waiting && a->call == b->call && a->mask == b->mask && a->at.line == b->at.line &&
         (a->at.file == b->at.file || std::strcmp(a->at.file, b->at.file) == 0);
}

[[noreturn]] void explain_missing(const Fiber* waits, size_t other) {
  char other_is[512];
  if (other >= block.fibers.size()) {
    std::snprintf(other_is, sizeof other_is, "the block has only %zu threads", block.fibers.size());
  } else if (block.fibers[other]->state == Fiber::ended) {
    std::snprintf(other_is, sizeof other_is, "that thread has exited");
  } else {
    const Fiber* o = block.fibers[other];
    std::snprintf(other_is, sizeof other_is, "that thread is at %s, %s:%d, mask %08x", name(o->call),
                  o->at.file, o->at.line, o->mask);
  }
  if (waits->call == Call::sync_threads)
    fail(waits->at, waits, "waits at __syncthreads for thread number %zu of the block, and %s", other,
         other_is);
  fail(waits->at, waits, "waits in %s with mask %08x for lane %zu, and %s", name(waits->call), waits->mask,
       other % warp_size, other_is);
}

// Of the threads that wait, the first whose partner can no longer come: one at a warp's call before one at a
// barrier, which may wait only for the former.
[[noreturn]] void explain() {
  for (const bool barrier : {false, true}) {
    for (size_t number = 0; number < block.fibers.size(); ++number) {
      const Fiber* waits = block.fibers[number];
      if (waits->state != Fiber::waiting || barrier != (waits->call == Call::sync_threads)) continue;
      const size_t first = barrier ? 0 : number / warp_size * warp_size;
      const size_t end = barrier ? block.fibers.size() : first + warp_size;
      for (size_t other = first; other < end; ++other) {
        if (!barrier && !(waits->mask >> (other - first) & 1)) continue;
        if (other >= block.fibers.size() || !same_call(waits, block.fibers[other]))
          explain_missing(waits, other);
      }
    }
  }
  fail({}, nullptr, "nothing goes on, and the shim does not know why");
}

// ---- meetings ----

void meet_block() {
  if (__tsan_release) __tsan_release(&sync_block[block.barriers % 2]);
  const unsigned barrier = block.barriers;
  if (++block.at_barrier == block.fibers.size()) {
    const Fiber* first = block.fibers[0];
    for (size_t i = 0; i < block.fibers.size(); ++i)
      if (!same_call(first, block.fibers[i])) explain_missing(first, i);
    block.at_barrier = 0, ++block.barriers;
    for (size_t i = 0; i < block.fibers.size(); ++i) set_ready(i);
  }
  resume(*current);
  if (__tsan_acquire) __tsan_acquire(&sync_block[barrier % 2]);
}

// f(fiber) for each lane of the mask in the warp that begins with thread `first`.
template <class F>
void each_lane(size_t first, unsigned mask, const F& f) {
  for (; mask != 0; mask &= mask - 1) f(block.fibers[first + size_t(__builtin_ctz(mask))]);
}

bool all_at_same_call(size_t first, unsigned mask) {
  bool all = true;
  each_lane(first, mask, [&](Fiber* fiber) { all = all && same_call(current, fiber); });
  return all;
}

void finish_call(size_t first, unsigned mask) {
  unsigned ballot = 0;
  each_lane(first, mask,
            [&](Fiber* fiber) { ballot |= unsigned(fiber->bits & 1) << (fiber->number - first); });
  each_lane(first, mask, [&](Fiber* fiber) {
    fiber->result = ballot;
    if (fiber->call == Call::shuffle) {
      const int source = fiber->source_lane;
      if (!(mask >> source & 1))
        fail(fiber->at, fiber, "shuffles from lane %d, which its mask %08x does not name", source, mask);
      fiber->result = block.fibers[first + size_t(source)]->bits;
    }
    set_ready(fiber->number);
  });
}

void meet_warp() {
  const size_t number = current->number, first = number / warp_size * warp_size;
  const unsigned mask = current->mask, self = 1u << (number - first);
  Warp& warp = block.warps[number / warp_size];
  if (!(mask & self))
    fail(current->at, current, "is not named by its own mask %08x in %s", mask, name(current->call));
  const size_t lowest = first + size_t(__builtin_ctz(mask));
  char* sync = nullptr;
  if (current->call == Call::sync_warp && lowest < block.fibers.size()) {
    Fiber* keeper = block.fibers[lowest];
    sync = &keeper->sync_warp[keeper->warp_syncs % 2];
    if (__tsan_release) __tsan_release(sync);
  }
  warp.waiting |= self;
  // Lanes that are elsewhere may yet come; if they never do, explain() says so when nothing else can go on.
  if ((warp.waiting & mask) == mask && all_at_same_call(first, mask)) {
    warp.waiting &= ~mask;
    finish_call(first, mask);
    if (sync) ++block.fibers[lowest]->warp_syncs;
  }
  resume(*current);
  if (sync && __tsan_acquire) __tsan_acquire(sync);
}

void run_block(uint3 index) {
  const dim3 size = launch.block;
  const size_t count = size_t(size.x) * size.y * size.z;
  block.index = block_index = index;
  block.fibers.clear(), block.shared.clear();
  block.warps.assign((count + 31) / 32, {0});
  block.ready.assign((count + 63) / 64, {0});
  block.left = count, block.at_barrier = 0, block.cursor = 0, block.barriers = 0;
  block.dynamic = poisoned(launch.shared_bytes);
  for (size_t i = 0; i < count; ++i) block.fibers.push_back(take_fiber(i));
  for (size_t i = 0; i < count; ++i) set_ready(i);
  if (__tsan_release) __tsan_release(&sync_start);
  resume(main_context);
  if (block.left != 0) explain();
  for (const Shared& shared : block.shared) ended_shared.push_back(shared.memory);
  ended_shared.push_back(block.dynamic);
  ++blocks;
}

}  // namespace

// ---- what cuda_on_cpu.h declares ----

void run(const void* kernel, dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body) {
  const auto asked = allowed_shared.find(kernel);
  const bool opted_in = asked != allowed_shared.end();
  const size_t allowed = opted_in ? asked->second : shared_limit;
  if (launch.running) fail({}, nullptr, "a kernel launches a kernel");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    fail({}, nullptr, "no card runs a grid of (%u,%u,%u) blocks", grid.x, grid.y, grid.z);
  if (!size.x || !size.y || !size.z || size.z > 64 || uint64_t(size.x) * size.y * size.z > 1024)
    fail({}, nullptr, "no card runs a block of (%u,%u,%u) threads", size.x, size.y, size.z);
  if (shared_bytes > allowed)
    fail({}, nullptr, "a launch with %zu bytes of dynamic shared memory, where %zu are allowed", shared_bytes,
         allowed);
  launch = {&body, grid, size, shared_bytes, std::max(shared_limit, opted_in ? opt_in_limit : 0), true};
  block_dim = size, grid_dim = grid;
  if (__tsan_get_current_fiber) main_context.tsan = __tsan_get_current_fiber();

  const uint64_t count = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> sequence(count);
  for (uint64_t i = 0; i < count; ++i) sequence[i] = order().reverse ? count - 1 - i : i;
  for (uint64_t i = count - 1; order().random && i > 0; --i)
    std::swap(sequence[i], sequence[order().generator() % (i + 1)]);
  // To the thread sanitizer the blocks of a wave are one beside the other, and a wave begins when the one before
  // has ended: of a launch that is larger, a race between two waves is seen only where another order puts both
  // blocks into one.
  const size_t wave = __tsan_create_fiber ? tsan_fibers : 1;
  for (const uint64_t i : sequence) {
    if (ended_fibers.size() >= wave) give_back();
    run_block({unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)});
  }
  give_back();
  launch.running = false;
}

void use_order(const char* name) { order() = parse(name); }

const std::vector<const char*>& orders() {
  static const std::vector<const char*> all = {"lockstep", "reverse",  "first-warp-ahead", "last-warp-ahead",
                                               "random:1", "random:2", "random:3"};
  return all;
}

uint64_t blocks_run() { return blocks; }

int lane() { return int(current->number % warp_size); }

uint64_t meet(Call call, unsigned mask, int source_lane, uint64_t bits, Site at) {
  Fiber& self = *current;
  self.state = Fiber::waiting;
  self.call = call, self.mask = mask, self.source_lane = source_lane, self.bits = bits, self.at = at;
  call == Call::sync_threads ? meet_block() : meet_warp();
  return self.result;
}

void* shared(const char* key, size_t bytes) {
  void* memory = nullptr;
  as_main([&] {
    size_t sum = launch.shared_bytes + bytes;
    for (const Shared& known : block.shared) {
      if (known.key == key) memory = known.memory;
      sum += known.bytes;
    }
    if (memory) return;
    if (sum > launch.shared_limit)
      fail({}, current, "needs %zu bytes of shared memory in all, where a block has %zu", sum,
           launch.shared_limit);
    memory = poisoned(bytes);
    block.shared.push_back({key, bytes, memory});
  });
  return memory;
}

void* dynamic_shared() { return block.dynamic; }

}  // namespace l2t_shim

const uint3 &threadIdx = l2t_shim::thread_index, &blockIdx = l2t_shim::block_index;
const dim3 &blockDim = l2t_shim::block_dim, &gridDim = l2t_shim::grid_dim;

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value =
      attribute == cudaDevAttrMultiProcessorCount ? l2t_shim::multiprocessors : int(l2t_shim::opt_in_limit);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || size_t(value) > l2t_shim::opt_in_limit) return cudaErrorInvalidValue;
  l2t_shim::allowed_shared[kernel] = size_t(value);
  return cudaSuccess;
}
