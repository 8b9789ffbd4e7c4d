#include "emulator/traffic.h"

#include <algorithm>

namespace emu {
namespace {

// Shared memory serves 32 banks of 4 bytes a wavefront. Accesses of 8 bytes are served by half
// warps and of 16 bytes by quarter warps, each of which takes as many wavefronts as the fullest
// bank has distinct words.
void count_shared(const Access* const* lanes, int n, SiteTraffic& site) {
  const int bytes = lanes[0]->bytes;
  const int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (int begin = 0; begin < n; begin += together) {
    uintptr_t words[32][32];  // distinct, by bank
    int in_bank[32] = {}, most = 0;
    for (int i = begin; i < std::min(begin + together, n); ++i)
      for (uintptr_t w = lanes[i]->address / 4; w <= (lanes[i]->address + bytes - 1) / 4; ++w) {
        const auto bank = w % 32;
        uintptr_t* const end = words[bank] + in_bank[bank];
        if (in_bank[bank] == 32 || std::find(words[bank], end, w) != end) continue;
        *end = w;
        most = std::max(most, ++in_bank[bank]);
      }
    site.transactions += most;
    site.ideal += 1;
  }
}

}  // namespace

void Traffic::request(const Access* const* lanes, int n, uintptr_t span_base) {
  const Access& first = *lanes[0];
  SiteTraffic& site = sites[first.pc * 2 + first.write];
  site.shared = first.span < 0;
  site.write = first.write;
  ++site.requests;
  for (int i = 0; i < n; ++i) site.bytes += lanes[i]->bytes;
  if (site.shared) return count_shared(lanes, n, site);

  SpanTraffic& span = spans[first.span];
  uintptr_t sectors[32 * 2];
  int count = 0;
  uint64_t bytes = 0;
  for (int i = 0; i < n; ++i) {
    bytes += lanes[i]->bytes;
    for (uintptr_t s = lanes[i]->address / 32; s <= (lanes[i]->address + lanes[i]->bytes - 1) / 32;
         ++s)
      if ((count == 0 || sectors[count - 1] != s) && count < 64) sectors[count++] = s;
  }
  if (!std::is_sorted(sectors, sectors + count)) std::sort(sectors, sectors + count);
  count = static_cast<int>(std::unique(sectors, sectors + count) - sectors);
  site.transactions += count;
  site.ideal += (bytes + 31) / 32;
  (first.write ? span.written_bytes : span.read_bytes) += bytes;
  (first.write ? span.written_sectors : span.read_sectors) += count;
  auto& touched = first.write ? span.written : span.read;
  for (int i = 0; i < count; ++i) {
    const size_t sector = sectors[i] - span_base / 32;
    if (sector < touched.size()) touched[sector] = true;
  }
}

void Traffic::add(const Traffic& other) {
  for (const auto& [pc, s] : other.sites) {
    SiteTraffic& site = sites[pc];
    site.shared = s.shared, site.write = s.write;
    site.requests += s.requests, site.bytes += s.bytes;
    site.transactions += s.transactions, site.ideal += s.ideal;
  }
  for (const auto& [name, n] : other.instructions) instructions[name] += n;
  for (size_t i = 0; i < other.spans.size(); ++i) {
    SpanTraffic& to = spans[i];
    const SpanTraffic& from = other.spans[i];
    to.read_bytes += from.read_bytes, to.written_bytes += from.written_bytes;
    to.read_sectors += from.read_sectors, to.written_sectors += from.written_sectors;
    for (size_t s = 0; s < to.read.size(); ++s) {
      if (from.read[s]) to.read[s] = true;
      if (from.written[s]) to.written[s] = true;
    }
  }
}

}  // namespace emu
