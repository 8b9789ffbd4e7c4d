// A launch is one kernel with its arguments, split into chunks that any thread may run in any
// order. Chunks share nothing that they write, so the result does not depend on who ran what.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace pyllm {

struct Launch {
  static constexpr size_t kMaxArgs = 1024;
  alignas(16) std::byte args[kMaxArgs];
  void (*kernel)();                         // really void(const Args&, int64_t)
  int64_t (*count)(const std::byte* args);  // asked at run time
  void (*run)(void (*kernel)(), const std::byte* args, int64_t chunk);
  const char* name;  // for profiles
  int64_t work;      // about how many nanoseconds a thread takes for it alone, on a fast processor
};

inline constexpr int64_t kLongWork = int64_t{1} << 40;

// `Args` is plain data with `int64_t chunks() const`, which may read sizes that change between
// replays (context lengths, say) through the pointers it holds.
template <class Args>
Launch make_launch(const char* name, void (*kernel)(const Args&, int64_t), const Args& args,
                   int64_t work = kLongWork) {
  static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) <= Launch::kMaxArgs);
  Launch launch;
  std::memcpy(launch.args, &args, sizeof(Args));
  launch.kernel = reinterpret_cast<void (*)()>(kernel);
  launch.count = [](const std::byte* a) { return reinterpret_cast<const Args*>(a)->chunks(); };
  launch.run = [](void (*k)(), const std::byte* a, int64_t chunk) {
    reinterpret_cast<void (*)(const Args&, int64_t)>(k)(*reinterpret_cast<const Args*>(a), chunk);
  };
  launch.name = name;
  launch.work = work;
  return launch;
}

// Runs the launches in order, or, while a plan is being captured on this thread, records them.
void submit(const Launch* launches, size_t n);

}  // namespace pyllm
