// Functions of the library that read its guard, the same for every device. Included inside extern "C", after guard() is defined.
#pragma once

void arena_end() { guard().end(); }
int64_t arena_bytes() { return guard().bytes(); }
int64_t arena_num_live() { return guard().num_live(); }
int64_t arena_num_events() { return guard().num_events(); }
void arena_events(int64_t* out) { guard().copy_events(out); }
void arena_counts(int64_t* out) {
  const auto counts = guard().counts();
  std::memcpy(out, &counts, sizeof(counts));
}
