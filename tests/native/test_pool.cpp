// The thread pool: every item once, on a lane of its own, from one thread and from several at a time. Run
// under the thread sanitizer too, which reports a race whether or not it shows.
#include "../../csrc/cpu/pool.h"

#include <atomic>
#include <memory>
#include <thread>

#include "check.h"

namespace {

constexpr int64_t much = 1000000;  // row elements an item: far above the grain

// Every item must be run once, and a lane must never be in two items at a time. Plain writes on purpose: what
// two threads write without order is a race, and that is what the sanitizer is to see.
int64_t faults_of_a_loop(int threads, int64_t count, int64_t cost) {
  std::vector<int> runs(count, 0);
  std::unique_ptr<std::atomic<int>[]> busy(new std::atomic<int>[threads]);
  for (int lane = 0; lane < threads; ++lane) busy[lane] = 0;
  std::atomic<int64_t> faults{0};
  l2t::parallel_for(threads, count, cost, [&](int64_t item, int lane) {
    if (lane < 0 || lane >= threads || busy[lane]++ != 0) ++faults;
    ++runs[item];
    --busy[lane];
  });
  for (int times : runs) faults += times != 1;
  return faults;
}

void every_item_once() {
  int64_t faults = 0;
  for (int repeat = 0; repeat < 50; ++repeat)
    for (int threads : {1, 2, 3, 8})
      for (int64_t count : {0, 1, 2, 7, 100})
        for (int64_t cost : {int64_t(1), int64_t(3000), much})
          faults += faults_of_a_loop(threads, count, cost);
  check("every item once, lanes apart", static_cast<double>(faults), 0);
}

void several_callers_at_a_time() {
  std::atomic<int64_t> faults{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 100; ++repeat) faults += faults_of_a_loop(3, 20, much);
    });
  for (auto& caller : callers) caller.join();
  check("several callers at a time", static_cast<double>(faults), 0);
}

void work_is_shared_where_it_pays() {
  const auto lanes_seen = [](int threads, int64_t cost) {
    std::unique_ptr<std::atomic<int>[]> seen(new std::atomic<int>[threads]);
    for (int lane = 0; lane < threads; ++lane) seen[lane] = 0;
    // An item waits for a second lane to come, so that a fast caller cannot do everything before the worker
    // is awake.
    std::atomic<int> lanes{0};
    l2t::parallel_for(threads, 8, cost, [&](int64_t, int lane) {
      if (seen[lane]++ == 0) ++lanes;
      for (int wait = 0; cost == much && threads > 1 && lanes < 2 && wait < 5000; ++wait)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    });
    return lanes.load();
  };
  check("little work stays on the caller", lanes_seen(4, 1), 1);
  check("one thread is one lane", lanes_seen(1, much), 1);
  check("much work is shared", lanes_seen(2, much) == 2 ? 0 : 1, 0);
}

}  // namespace

int main() {
  every_item_once();
  several_callers_at_a_time();
  work_is_shared_where_it_pays();
  return failures != 0;
}
