// Persistent threads that run a list of launches, one after the other.
//
// Each launch's chunks are dealt out in equal runs, one a thread; a thread that has finished its
// own takes chunks from the others. A launch is over when its chunks are done, not when every
// thread has come by: a thread that lost its core holds back the chunk that it was in and nothing
// else, and one that is still asleep holds back nothing. Whoever finishes the last chunk opens the
// next launch. Waiting spins for some microseconds and then sleeps, which hands the core to whoever
// needs it. A job shorter than it takes to wake threads that sleep is done by the caller alone.
//
// A job runs on the pool's own threads or, where these would compete with PyTorch's, on those.
#pragma once
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/launch.h"
#include "core/openmp.h"

namespace pyllm {

class ThreadPool {
 public:
  static ThreadPool& get();

  // Thread 0 is the caller. Safe from several threads at once: whoever finds the pool busy runs
  // alone on its own thread. `beside_torch`: the caller may call PyTorch before and after.
  void run(const Launch* launches, size_t n, bool beside_torch = false);
  // As run(), and adds the nanoseconds of launch i to ns[i].
  void run_timed(const Launch* launches, size_t n, int64_t* ns, bool beside_torch = false);

  int size() const { return n_threads_; }
  void resize(int n_threads);  // n_threads >= 1

 private:
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  void start();
  void stop();
  void worker(int thread);
  void take_part(int thread);
  void work(int thread, uint32_t phase);
  void advance(uint32_t phase, size_t index);
  void run_alone(const Launch* launches, size_t n, int64_t* ns);
  bool worth_sharing(const Launch* launches, size_t n, bool team);

  // What a thread has left of its run of chunks; a cache line each, so that taking a chunk of one's
  // own touches nobody else's line. `next` is phase << 32 | chunk: whoever takes a chunk with the
  // phase in hand knows that it belongs to the launch that is open now.
  struct alignas(64) Share {
    std::atomic<uint64_t> next{0};
    std::atomic<int64_t> end{0};
  };

  std::atomic<int> n_threads_;
  std::vector<std::thread> threads_;
  std::unique_ptr<Share[]> shares_;
  std::mutex busy_;

  // The job: written while no chunk can be taken, read by whoever holds one.
  const Launch* launches_ = nullptr;
  size_t n_launches_ = 0;
  size_t index_ = 0;      // of the open launch
  int64_t n_chunks_ = 0;  // that it has
  int64_t* ns_ = nullptr;
  std::chrono::steady_clock::time_point last_short_;  // when a job that woke nobody ended
  std::chrono::steady_clock::time_point last_team_;   // when a job on PyTorch's threads ended
  std::chrono::steady_clock::time_point opened_;

  alignas(64) std::atomic<uint32_t> phase_{0};  // changes when a launch opens or the job is over
  std::atomic<bool> running_{false};
  std::atomic<bool> quit_{false};
  std::atomic<uint32_t> jobs_{0};             // of the pool's own threads
  std::atomic<int> asleep_{0};                // of these, those that are not spinning
  alignas(64) std::atomic<int64_t> done_{0};  // chunks of the open launch
};

// The processors that this process may use: the affinity mask, cut to the cgroup's CPU quota.
// PYLLM_NUM_THREADS overrides it.
int default_num_threads();

}  // namespace pyllm
