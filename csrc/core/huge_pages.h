#pragma once
#include <cstddef>

namespace pyllm {

// Asks the system to back the whole 2 MB pages inside [data, data + bytes) with large pages. Only a
// request: where there is no such thing nothing happens.
void advise_huge_pages(void* data, size_t bytes);

// Has the system find memory for [data, data + bytes) now, where it can be asked to (Linux 5.14);
// the contents stay as they are, and any thread may read and write them meanwhile.
void populate(void* data, size_t bytes);

inline constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace pyllm
