// Persistent threads that run a list of launches with a barrier between them.
//
// Each launch's chunks are dealt out in equal runs, one a thread; a thread that has finished its own
// takes chunks from the others, so a thread that lost its core for a while holds back one chunk
// and not a whole share. Waiting spins for a few microseconds and then sleeps, which hands the core
// to whoever needs it: next to a busy process we slow down by the fair share and no more.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/launch.h"

namespace pyllm {

class ThreadPool {
 public:
  static ThreadPool& get();

  // Thread 0 is the caller. Safe from several threads at once: whoever finds the pool busy runs
  // alone on its own thread.
  void run(const Launch* launches, size_t n);
  // As run(), and adds the nanoseconds of launch i to ns[i].
  void run_timed(const Launch* launches, size_t n, int64_t* ns);

  int size() const { return n_threads_; }
  void resize(int n_threads);  // n_threads >= 1

 private:
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  void start();
  void stop();
  void worker(int thread, uint32_t seen);
  void work(int thread);
  void open(const Launch& launch);
  void execute(const Launch& launch, int thread);

  // What a thread has left of its run of chunks; a cache line each, so that taking a chunk of one's
  // own touches nobody else's line.
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  struct alignas(64) Word {
    std::atomic<uint32_t> value{0};
  };

  int n_threads_;
  std::vector<std::thread> threads_;
  std::unique_ptr<Share[]> shares_;
  std::mutex busy_;

  const Launch* launches_ = nullptr;
  size_t n_launches_ = 0;
  int64_t* ns_ = nullptr;
  Word job_;      // changes when there is work; workers sleep on it
  Word arrived_;  // how many threads have reached the barrier
  Word phase_;    // changes when the barrier opens
  std::atomic<bool> quit_{false};
};

// The processors that this process may use: the affinity mask, cut to the cgroup's CPU quota.
// PYLLM_NUM_THREADS overrides it.
int default_num_threads();

}  // namespace pyllm
