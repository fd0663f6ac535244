// The thread pool (pool.h): workers asleep on a condition variable, chunks handed out by an atomic counter.
//
// One loop has the pool at a time; a loop that finds it taken (two Python threads in the core at once) runs
// on its caller alone, so nothing ever waits for the pool. Workers are started when first wanted and never
// stopped: they sleep, hold nothing, and end with the process, so there is no destructor to race with threads
// that still compute at exit. After fork() the child has no workers, and the lock may be held by a thread
// that does not exist there: it gets a new pool.
#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace l2t {
namespace {

// In row elements. A loop below the grain stays on its caller: it takes about ten times what waking a thread
// does.
constexpr int64_t kGrain = 100'000;
constexpr int64_t kChunk = kGrain / 4;

struct Loop {
  Body body;
  const void* context;
  int64_t count, chunk;
  std::atomic<int64_t> next{0};

  void work(int lane) {
    for (;;) {
      const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
      if (begin >= count) return;
      body(context, begin, std::min(begin + chunk, count), lane);
    }
  }
};

class Pool {
 public:
  // False if another loop has the pool.
  bool run(Loop& loop, int threads) {
    std::unique_lock<std::mutex> mine(taken_, std::try_to_lock);
    if (!mine) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      start_workers(threads - 1);
      loop_ = &loop;
      next_lane_ = 1;
      lanes_ = std::min(threads, workers_ + 1);
    }
    wake_.notify_all();
    loop.work(0);
    // Whoever has not come by now has nothing left to do; whoever has is waited for.
    std::unique_lock<std::mutex> lock(mutex_);
    loop_ = nullptr;
    done_.wait(lock, [this] { return active_ == 0; });
    return true;
  }

 private:
  void start_workers(int wanted) {
    if (workers_ >= wanted) return;
    sigset_t all, old;  // signals are for the program's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    try {
      for (; workers_ < wanted; ++workers_) std::thread(&Pool::serve, this).detach();
    } catch (const std::system_error&) {  // the system gives no more threads: fewer lanes, same bits
    }
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return loop_ != nullptr && next_lane_ < lanes_; });
      Loop& loop = *loop_;
      const int lane = next_lane_++;
      ++active_;
      lock.unlock();
      loop.work(lane);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex taken_;  // held by the loop that has the pool
  std::mutex mutex_;  // guards all below
  std::condition_variable wake_, done_;
  Loop* loop_ = nullptr;
  int workers_ = 0, lanes_ = 0, next_lane_ = 0, active_ = 0;
};

std::atomic<Pool*> the_pool{nullptr};

const int forget_after_fork =
    pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr, std::memory_order_relaxed); });

// Null where there can be none.
Pool* pool() {
  if (forget_after_fork != 0) return nullptr;
  Pool* current = the_pool.load(std::memory_order_acquire);
  if (current != nullptr) return current;
  Pool* fresh = new (std::nothrow) Pool;
  if (fresh == nullptr || the_pool.compare_exchange_strong(current, fresh, std::memory_order_acq_rel))
    return fresh;
  delete fresh;  // another thread was first
  return current;
}

}  // namespace

void run(int threads, int64_t count, int64_t cost, Body body, const void* context) noexcept {
  if (count <= 0) return;
  cost = std::max<int64_t>(cost, 1);
  const bool little = count <= kGrain / cost;
  Loop loop{body, context, count, std::max<int64_t>(kChunk / cost, 1)};
  const int64_t chunks = (count + loop.chunk - 1) / loop.chunk;
  const int lanes = static_cast<int>(std::min<int64_t>(threads, chunks));
  if (!little && lanes > 1) {
    Pool* shared = pool();
    if (shared != nullptr && shared->run(loop, lanes)) return;
  }
  body(context, 0, count, 0);
}

}  // namespace l2t
