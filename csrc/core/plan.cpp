#include "core/plan.h"

#include <stdexcept>

#include "core/thread_pool.h"

namespace pyllm {
namespace {
thread_local Plan* current = nullptr;
}

bool capturing() { return current != nullptr; }

void submit(const Launch* launches, size_t n) {
  if (current) {
    for (size_t i = 0; i < n; ++i) current->record(launches[i]);
  } else {
    ThreadPool::get().run(launches, n, true);
  }
}

Plan::~Plan() {
  if (current == this) current = nullptr;
}

void Plan::begin() {
  if (current) throw std::logic_error("a plan is already being captured on this thread");
  launches_.clear();
  current = this;
}

void Plan::end() {
  if (current != this) throw std::logic_error("this plan is not being captured on this thread");
  current = nullptr;
}

void Plan::replay() const { ThreadPool::get().run(launches_.data(), launches_.size()); }

std::vector<int64_t> Plan::profile(int repeats) const {
  std::vector<int64_t> ns(launches_.size());
  for (int i = 0; i < repeats; ++i)
    ThreadPool::get().run_timed(launches_.data(), launches_.size(), ns.data());
  return ns;
}

std::vector<std::string> Plan::names() const {
  std::vector<std::string> names;
  for (const Launch& launch : launches_) names.emplace_back(launch.name);
  return names;
}

}  // namespace pyllm
