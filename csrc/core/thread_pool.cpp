#include "core/thread_pool.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <system_error>

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

// To wake a thread takes its waker some ten microseconds, and it comes some forty later: what is
// shorter than this is done sooner without it. (Measured with rows of a norm on two cores, after a
// pause and after a matmul of PyTorch, whose threads spin on.)
constexpr int64_t kWorthWaking = 60'000;
// Jobs that follow one another as fast as this are a stream, which is worth waking threads for.
constexpr auto kStream = std::chrono::microseconds(10);

// OpenMP spins for some five milliseconds. While it does, a job on its threads costs one or two
// microseconds; later 120, since it also waits for the last thread to come.
constexpr auto kTeamSpin = std::chrono::milliseconds(2);
constexpr int64_t kWorthTeam = 6'000, kWorthWakingTeam = 150'000;

// Whether `word` changes while this spins.
bool spin_while(const std::atomic<uint32_t>& word, uint32_t value) {
  Clock::time_point deadline{};
  for (;;) {
    for (int i = 0; i < 64; ++i) {
      if (word.load(std::memory_order_acquire) != value) return true;
      pause();
    }
    const auto now = Clock::now();
    if (deadline == Clock::time_point{}) deadline = now + kSpin;
    if (now >= deadline) return false;
  }
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
    pthread_atfork(nullptr, nullptr, [] { pool = new ThreadPool(pool.load()->size()); });
#endif
  });
  return *pool;
}

ThreadPool::ThreadPool(int n_threads) : n_threads_(n_threads), shares_(new Share[n_threads]) {}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::start() {
  try {
    for (int t = 1; t < n_threads_; ++t) threads_.emplace_back([this, t] { worker(t); });
  } catch (const std::system_error&) {  // the system has no more: go on with those that there are
    n_threads_ = static_cast<int>(threads_.size()) + 1;
  }
}

void ThreadPool::stop() {
  quit_ = true;
  jobs_.fetch_add(1);
  jobs_.notify_all();
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

// Opens launch `index`, or the first after it that has any chunks, or ends the job. Only the thread
// that finished the launch before may call this.
void ThreadPool::advance(uint32_t phase, size_t index) {
  int64_t n = 0;
  while (index < n_launches_ && (n = launches_[index].count(launches_[index].args)) <= 0) ++index;
  index_ = index;
  n_chunks_ = n;
  ++phase;
  if (index < n_launches_) {
    const int n_threads = n_threads_.load(std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    for (int t = 0; t < n_threads; ++t) {
      // First close the share: a thread that is late by a phase may have read the old `next`, and
      // must not find it below the new `end` and still in place.
      Share& share = shares_[t];
      const uint64_t tag = uint64_t{phase} << 32;
      share.next.store(tag | 0xffffffffu, std::memory_order_relaxed);
      share.end.store(n * (t + 1) / n_threads, std::memory_order_release);
      share.next.store(tag | static_cast<uint64_t>(n * t / n_threads), std::memory_order_release);
    }
  } else {
    running_.store(false, std::memory_order_relaxed);
  }
  phase_.store(phase);  // sequentially consistent: a waiter is either counted or sees the new value
  phase_.notify_all();
}

// Runs what chunks there are to take in this phase.
void ThreadPool::work(int thread, uint32_t phase) {
  const int n_threads = n_threads_.load(std::memory_order_relaxed);
  int64_t done = 0;
  for (int i = 0; i < n_threads; ++i) {
    Share& share = shares_[(thread + i) % n_threads];
    for (;;) {
      uint64_t next = share.next.load(std::memory_order_acquire);
      const auto chunk = static_cast<int64_t>(next & 0xffffffffu);
      if (next >> 32 != phase || chunk >= share.end.load(std::memory_order_acquire)) break;
      if (!share.next.compare_exchange_weak(next, next + 1, std::memory_order_acquire)) continue;
      const Launch& launch = launches_[index_];
      launch.run(launch.kernel, launch.args, chunk);
      ++done;
    }
  }
  if (done == 0) return;
  const int64_t n_chunks = n_chunks_;  // before the count: after it, it may be another launch's
  if (done_.fetch_add(done, std::memory_order_acq_rel) + done != n_chunks) return;
  if (ns_) {
    const auto now = Clock::now();
    ns_[index_] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - opened_).count();
    opened_ = now;
  }
  advance(phase, index_ + 1);
}

// Works until the job is over.
void ThreadPool::take_part(int thread) {
  for (;;) {
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (!running_.load(std::memory_order_relaxed)) return;
    work(thread, phase);
    if (!spin_while(phase_, phase)) phase_.wait(phase, std::memory_order_acquire);
  }
}

void ThreadPool::worker(int thread) {
  while (!quit_) {
    const uint32_t job = jobs_.load(std::memory_order_acquire);
    take_part(thread);
    if (quit_ || spin_while(jobs_, job)) continue;
    asleep_.fetch_add(1, std::memory_order_relaxed);
    jobs_.wait(job, std::memory_order_acquire);
    asleep_.fetch_sub(1, std::memory_order_relaxed);
  }
}

void ThreadPool::run_alone(const Launch* launches, size_t n, int64_t* ns) {
  for (size_t i = 0; i < n; ++i) {
    const auto begin = ns ? Clock::now() : Clock::time_point();
    const int64_t count = launches[i].count(launches[i].args);
    for (int64_t c = 0; c < count; ++c) launches[i].run(launches[i].kernel, launches[i].args, c);
    if (ns)
      ns[i] += std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count();
  }
}

// Whether more threads than the caller should take part in a job.
bool ThreadPool::worth_sharing(const Launch* launches, size_t n, bool team) {
  int64_t least = kWorthWaking;
  if (team)
    least = Clock::now() - last_team_ < kTeamSpin ? kWorthTeam : kWorthWakingTeam;
  else if (asleep_.load(std::memory_order_relaxed) < static_cast<int>(threads_.size()))
    return true;
  int64_t work = 0;
  for (size_t i = 0; i < n; ++i)
    if ((work += launches[i].work) >= least) return true;
  return (!team || work >= kWorthTeam) && Clock::now() - last_short_ < kStream;
}

void ThreadPool::run_timed(const Launch* launches, size_t n, int64_t* ns, bool beside_torch) {
  if (n == 0) return;
  std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
  if (!lock.owns_lock() || n_threads_ == 1 || (n == 1 && launches[0].count(launches[0].args) <= 1))
    return run_alone(launches, n, ns);
  const OpenMp* team = beside_torch ? openmp() : nullptr;
  if (team && team->max_threads() != n_threads_) team = nullptr;  // PyTorch's are others, or none
  if (!worth_sharing(launches, n, team)) {
    run_alone(launches, n, ns);
    last_short_ = Clock::now();
    return;
  }
  if (!team && threads_.empty()) start();
  launches_ = launches;
  n_launches_ = n;
  ns_ = ns;
  if (ns) opened_ = Clock::now();
  running_.store(true, std::memory_order_relaxed);
  advance(phase_.load(std::memory_order_relaxed), 0);
  if (team) {
    const auto member = [](void* pool) {
      static_cast<ThreadPool*>(pool)->take_part(openmp()->thread());
    };
    team->parallel(member, this, n_threads_, 0);
    last_team_ = Clock::now();
    return;
  }
  jobs_.fetch_add(1);  // sequentially consistent: a waiter is either counted or sees the new value
  jobs_.notify_all();
  take_part(0);
}

void ThreadPool::run(const Launch* launches, size_t n, bool beside_torch) {
  run_timed(launches, n, nullptr, beside_torch);
}

}  // namespace pyllm
