#include "core/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace pyllm {
namespace {

using Clock = std::chrono::steady_clock;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Long enough for a thread that is nearly done and for the Python code between two tokens, short
// against a scheduler's time slice (milliseconds).
constexpr auto kSpin = std::chrono::microseconds(60);

void wait_while(const std::atomic<uint32_t>& word, uint32_t value) {
  const auto deadline = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (word.load(std::memory_order_acquire) != value) return;
      pause();
    }
  } while (Clock::now() < deadline);
  word.wait(value, std::memory_order_acquire);
}

int cgroup_quota() {
#if defined(__linux__)
  long quota = -1, period = 100000;
  if (FILE* f = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    if (std::fscanf(f, "%ld %ld", &quota, &period) < 1) quota = -1;  // "max 100000"
    std::fclose(f);
  } else if (FILE* g = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r")) {
    if (std::fscanf(g, "%ld", &quota) != 1) quota = -1;
    std::fclose(g);
  }
  if (quota > 0 && period > 0) return std::max(1, static_cast<int>((quota + period - 1) / period));
#endif
  return 1 << 16;
}

}  // namespace

int default_num_threads() {
  if (const char* text = std::getenv("PYLLM_NUM_THREADS")) {
    const int n = std::atoi(text);
    if (n >= 1) return std::min(n, 1024);
  }
  int n = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) n = CPU_COUNT(&set);
#endif
  return std::max(1, std::min(n, cgroup_quota()));
}

ThreadPool& ThreadPool::get() {
  // Never destroyed: the workers may be asleep when the process exits, and joining them from a
  // static destructor can deadlock. A forked child has none of the threads, so it gets a new pool.
  static std::atomic<ThreadPool*> pool{nullptr};
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new ThreadPool(default_num_threads());
#if defined(__linux__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { pool = new ThreadPool(default_num_threads()); });
#endif
  });
  return *pool;
}

ThreadPool::ThreadPool(int n_threads) : n_threads_(n_threads), shares_(new Share[n_threads]) {}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::start() {
  const uint32_t seen = job_.value.load();
  for (int t = 1; t < n_threads_; ++t)
    threads_.emplace_back([this, t, seen] { worker(t, seen); });
}

void ThreadPool::stop() {
  quit_ = true;
  job_.value.fetch_add(1);
  job_.value.notify_all();
  for (std::thread& t : threads_) t.join();
  threads_.clear();
  quit_ = false;
}

void ThreadPool::resize(int n_threads) {
  std::lock_guard<std::mutex> lock(busy_);
  stop();
  n_threads_ = n_threads;
  shares_.reset(new Share[n_threads]);
}

void ThreadPool::open(const Launch& launch) {
  const int64_t n = launch.count(launch.args);
  for (int t = 0; t < n_threads_; ++t) {
    shares_[t].end = n * (t + 1) / n_threads_;
    shares_[t].next.store(n * t / n_threads_, std::memory_order_relaxed);
  }
}

void ThreadPool::execute(const Launch& launch, int thread) {
  for (int i = 0; i < n_threads_; ++i) {
    Share& share = shares_[(thread + i) % n_threads_];
    for (;;) {
      if (share.next.load(std::memory_order_relaxed) >= share.end) break;
      const int64_t chunk = share.next.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= share.end) break;
      launch.run(launch.kernel, launch.args, chunk);
    }
  }
}

void ThreadPool::work(int thread) {
  // Launch 0 was opened by the caller; the last thread to reach a barrier opens the next one. The
  // job is copied first: once the last barrier opens, the caller may already be writing another.
  const Launch* launches = launches_;
  const size_t n = n_launches_;
  int64_t* ns = thread == 0 ? ns_ : nullptr;
  auto begin = ns ? Clock::now() : Clock::time_point();
  for (size_t i = 0; i < n; ++i) {
    execute(launches[i], thread);
    const uint32_t phase = phase_.value.load(std::memory_order_acquire);
    if (arrived_.value.fetch_add(1, std::memory_order_acq_rel) + 1 ==
        static_cast<uint32_t>(n_threads_)) {
      arrived_.value.store(0, std::memory_order_relaxed);
      if (i + 1 < n) open(launches[i + 1]);
      phase_.value.fetch_add(1, std::memory_order_release);
      phase_.value.notify_all();
    } else {
      wait_while(phase_.value, phase);
    }
    if (ns) {
      const auto now = Clock::now();
      ns[i] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - begin).count();
      begin = now;
    }
  }
}

void ThreadPool::worker(int thread, uint32_t seen) {
  for (;;) {
    wait_while(job_.value, seen);
    seen = job_.value.load(std::memory_order_acquire);
    if (quit_) return;
    work(thread);
  }
}

void ThreadPool::run_timed(const Launch* launches, size_t n, int64_t* ns) {
  if (n == 0) return;
  std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
  const bool alone = !lock.owns_lock() || n_threads_ == 1 ||
                     (n == 1 && launches[0].count(launches[0].args) <= 1);
  if (alone) {
    for (size_t i = 0; i < n; ++i) {
      const auto begin = ns ? Clock::now() : Clock::time_point();
      const int64_t count = launches[i].count(launches[i].args);
      for (int64_t c = 0; c < count; ++c) launches[i].run(launches[i].kernel, launches[i].args, c);
      if (ns) ns[i] += std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count();
    }
    return;
  }
  if (threads_.empty()) start();
  launches_ = launches;
  n_launches_ = n;
  ns_ = ns;
  open(launches[0]);
  job_.value.fetch_add(1, std::memory_order_release);
  job_.value.notify_all();
  work(0);
}

void ThreadPool::run(const Launch* launches, size_t n) { run_timed(launches, n, nullptr); }

}  // namespace pyllm
