#pragma once
#include <cstddef>

namespace pyllm {

// Asks the system to back the whole 2 MB pages inside [data, data + bytes) with large pages. Only a
// request: where there is no such thing nothing happens.
void advise_huge_pages(void* data, size_t bytes);

inline constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace pyllm
