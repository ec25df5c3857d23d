// cp.async: the destination is poison from issue on, and the bytes land only when the issuing
// thread waits for their group, the latest moment hardware may choose.
#include "runtime.h"

namespace emulation {

namespace {
void land(const CopyAsync& c) {
  unsigned char* to = shared_at(c.to, c.bytes, c.site);
  std::memcpy(to, c.from, c.bytes_read);
  std::memset(to + c.bytes_read, 0, c.bytes - c.bytes_read);
  copy_in_flight(c.to, c.bytes, false);
  landed(current().index, c.to, c.bytes, c.site);
}
}  // namespace

void copy_async(uint32_t to, const void* from, int bytes, int bytes_read, Loc loc) {
  Quiet q;
  const Site site = site_of(loc);
  Thread& t = current();
  if (bytes_read < 0 || bytes_read > bytes)
    stop("cp.async of " + std::to_string(bytes) + " bytes cannot read " +
         std::to_string(bytes_read) + ", at " + where(site));
  if (to % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    stop("cp.async of " + std::to_string(bytes) + " bytes from or to a misaligned address at " +
         where(site));
  access_shared(t.index, to, bytes, true, site);
  // Read in the pieces that are aligned, for the sake of the bounds.
  const int piece = bytes_read == bytes ? bytes : 2;
  for (int i = 0; i + piece <= bytes_read; i += piece)
    access_global(static_cast<const char*>(from) + i, piece, false, Via::kPlain, site);
  trace(true, true, to, bytes, site);
  copy_in_flight(to, bytes, true);
  std::memset(shared_at(to, bytes, site), 0xff, bytes);
  t.open_copies.push_back({to, from, bytes, bytes_read, site});
}

void copy_async_commit() {
  Quiet q;
  current().copy_groups.push_back(std::move(current().open_copies));
  current().open_copies.clear();
}

void copy_async_wait(int groups_left, Loc) {
  Quiet q;
  auto& groups = current().copy_groups;
  while (groups.size() > static_cast<size_t>(groups_left)) {
    for (const CopyAsync& c : groups.front()) land(c);
    groups.pop_front();
  }
}

void end_of_thread_copies(Thread& t) {
  size_t left = t.open_copies.size();
  for (const auto& group : t.copy_groups) left += group.size();
  if (left)
    report(name_of(t) + " exits with " + std::to_string(left) + " cp.async never waited for");
}

}  // namespace emulation
