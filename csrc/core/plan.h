// A plan is a recorded list of launches: one decoding step, say. Replaying it is one call with no
// Python in it. Whatever changes between replays is read from the buffers that the launches point
// to, which must outlive the plan (pyllm/runtime/graph.py sees to that).
#pragma once
#include <string>
#include <vector>

#include "core/launch.h"

namespace pyllm {

class Plan {
 public:
  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan();  // ends a capture that this thread left open

  // Between begin() and end(), submit() on this thread records into this plan and runs nothing.
  void begin();
  void end();
  void replay() const;
  // Nanoseconds of each launch, summed over `repeats` replays.
  std::vector<int64_t> profile(int repeats) const;

  void record(const Launch& launch) { launches_.push_back(launch); }
  size_t size() const { return launches_.size(); }
  std::vector<std::string> names() const;

 private:
  std::vector<Launch> launches_;
};

bool capturing();

}  // namespace pyllm
