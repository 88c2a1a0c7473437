#include "emulation/shared_memory.h"

#include <algorithm>
#include <cstring>

#include "emulation/failure.h"

namespace moetrain::emulation {

namespace {

constexpr size_t kAlignment = 1024;

size_t round_up(size_t x, size_t multiple) { return (x + multiple - 1) / multiple * multiple; }

}  // namespace

SharedMemory::SharedMemory(size_t dynamic_bytes, int num_threads, Fail fail)
    : size_(round_up(dynamic_bytes, kChunkBytes) + kStaticBytes),
      fail_(std::move(fail)),
      storage_(std::make_unique_for_overwrite<uint8_t[]>(size_ + kAlignment)),
      chunks_(size_ / kChunkBytes),
      static_end_(size_ - kStaticBytes),
      fences_(num_threads) {
    const auto address = reinterpret_cast<uintptr_t>(storage_.get());
    bytes_ = storage_.get() + (kAlignment - address % kAlignment) % kAlignment;
    std::memset(bytes_, kPoison, size_);
    for (Chunk& chunk : chunks_)
        chunk.seen.fill(kPoison);
}

void* SharedMemory::static_variable(const std::string& key, size_t num_bytes) {
    const auto [entry, is_new] = static_offsets_.try_emplace(key, static_end_);
    if (is_new) static_end_ += round_up(num_bytes, kChunkBytes);
    if (static_end_ > size_) fail_("the block's __shared__ variables take more than 48 KiB");
    return bytes_ + entry->second;
}

uint32_t SharedMemory::address(const void* pointer) const {
    const auto offset = static_cast<const uint8_t*>(pointer) - bytes_;
    if (offset < 0 || static_cast<size_t>(offset) >= static_end_)
        fail_("pointer outside the " + std::to_string(static_end_) + " bytes of shared memory, at offset " +
              std::to_string(offset));
    return kBase + static_cast<uint32_t>(offset);
}

uint8_t* SharedMemory::pointer(uint32_t address, size_t num_bytes) const {
    if (address < kBase || address - kBase + num_bytes > static_end_)
        fail_("shared address " + hex(address) + " is outside the block's shared memory");
    return bytes_ + (address - kBase);
}

void SharedMemory::remember(Chunk& chunk, const void* content) { std::memcpy(chunk.seen.data(), content, kChunkBytes); }

void SharedMemory::require_not_read(uint32_t address) const {
    if (chunk_at(address).num_reads_in_flight > 0)
        fail_("race: shared address " + hex(address) + " is written while a TMA store has yet to read it");
}

void SharedMemory::begin_copy(void* chunk) {
    require_not_read(address(chunk));
    ++chunk_of(chunk).num_copies_in_flight;
    std::memset(chunk, kPoison, kChunkBytes);
    remember(chunk_of(chunk), chunk);
}

void SharedMemory::end_copy_async_proxy(void* chunk) {
    Chunk& state = chunk_of(chunk);
    --state.num_copies_in_flight;
    state.generic_write_idx.fill(0);
    remember(state, chunk);
}

void SharedMemory::end_copy_generic_proxy(void* chunk, int writer_idx) {
    Chunk& state = chunk_of(chunk);
    --state.num_copies_in_flight;
    state.generic_write_idx.fill(++num_generic_writes_);
    state.writer_idx.fill(writer_idx);
    remember(state, chunk);
}

void SharedMemory::begin_async_read(uint32_t address, int reader_idx) {
    read_async_proxy(address, reader_idx, "a TMA store");
    ++chunk_at(address).num_reads_in_flight;
}

void SharedMemory::end_async_read(uint32_t address) { --chunk_at(address).num_reads_in_flight; }

void SharedMemory::write(void* target, const void* source, size_t num_bytes, int writer_idx) {
    const uint32_t first = address(target);
    if (first % num_bytes != 0)
        fail_("store of " + std::to_string(num_bytes) + " bytes to shared address " + hex(first) + ": misaligned");
    require_not_read(first);
    Chunk& chunk = chunk_at(first);
    if (chunk.num_copies_in_flight > 0)
        fail_("race: shared address " + hex(first) + " is written while a copy into it is in flight");
    std::memcpy(target, source, num_bytes);
    ++num_generic_writes_;
    const size_t offset = first % kChunkBytes;
    std::memcpy(chunk.seen.data() + offset, source, num_bytes);
    for (size_t word = offset / kWordBytes; word < (offset + num_bytes) / kWordBytes; ++word) {
        chunk.generic_write_idx[word] = num_generic_writes_;
        chunk.writer_idx[word] = writer_idx;
    }
}

void SharedMemory::read(void* target, const void* source, size_t num_bytes) const {
    const uint32_t first = address(source);
    if (first % num_bytes != 0)
        fail_("load of " + std::to_string(num_bytes) + " bytes from shared address " + hex(first) + ": misaligned");
    if (chunk_at(first).num_copies_in_flight > 0)
        fail_("race: shared address " + hex(first) + " is read while a copy into it is in flight");
    std::memcpy(target, source, num_bytes);
}

const uint8_t* SharedMemory::read_async_proxy(uint32_t address, int reader_idx, const char* who) const {
    const uint8_t* content = pointer(address, kChunkBytes);
    const Chunk& chunk = chunk_at(address);
    const auto reads = [&] { return std::string(who) + " reads shared address " + hex(address); };
    if (chunk.num_copies_in_flight > 0) fail_("race: " + reads() + " while a copy into it is in flight");
    if (std::memcmp(content, chunk.seen.data(), kChunkBytes) != 0)
        fail_(reads() + ", written by a plain store; only those of ptx/shared.h are followed to the async proxy");
    for (size_t word = 0; word < chunk.writer_idx.size(); ++word) {
        if (chunk.generic_write_idx[word] == 0) continue;
        const uint64_t fenced =
            std::max(fences_[static_cast<size_t>(reader_idx)], fences_[static_cast<size_t>(chunk.writer_idx[word])]);
        if (chunk.generic_write_idx[word] > fenced)
            fail_("proxy: " + reads() + ", written through the generic proxy by thread " +
                  std::to_string(chunk.writer_idx[word]) + ", without fence_async_proxy in between");
    }
    return content;
}

}  // namespace moetrain::emulation
