// The shared memory of an emulated block: bytes, and per 16-byte chunk what is on its way in and out, who wrote it and
// whether the async proxy (TMA, wgmma) may know.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace moetrain::emulation {

class SharedMemory {
 public:
    static constexpr size_t kChunkBytes = 16;
    static constexpr uint32_t kBase = 1024;                     // so that a null address is an error
    static constexpr size_t kStaticBytes = 48 << 10;            // for __shared__ variables, behind the dynamic part
    static constexpr int kPoison = 0xFF;                        // NaN as bf16 and as fp32, -1 as an integer
    using Fail = std::function<void(const std::string& what)>;  // throws

    SharedMemory(size_t dynamic_bytes, int num_threads, Fail fail);

    uint8_t* dynamic() const { return bytes_; }
    // The block's one copy of the variable that `key` names.
    void* static_variable(const std::string& key, size_t num_bytes);

    // Addresses as the device sees them.
    uint32_t address(const void* pointer) const;
    uint8_t* pointer(uint32_t address, size_t num_bytes) const;

    // A chunk that an asynchronous copy fills: undefined from begin to end.
    void begin_copy(void* chunk);
    void end_copy_async_proxy(void* chunk);                    // written by TMA
    void end_copy_generic_proxy(void* chunk, int writer_idx);  // written by cp.async

    // A chunk that a TMA store reads: not to be written from begin to end.
    void begin_async_read(uint32_t address, int reader_idx);
    void end_async_read(uint32_t address);

    // Accesses of threads, through ptx/shared.h: `num_bytes` is 4 or 16, naturally aligned.
    void write(void* target, const void* source, size_t num_bytes, int writer_idx);
    void read(void* target, const void* source, size_t num_bytes) const;

    // A chunk read by the async proxy for thread `reader_idx`, `who` in reports. What the generic proxy wrote must have
    // been fenced since, by the thread that wrote it or by the reader.
    const uint8_t* read_async_proxy(uint32_t address, int reader_idx, const char* who) const;
    void fence_async_proxy(int thread_idx) { fences_[static_cast<size_t>(thread_idx)] = num_generic_writes_; }

 private:
    static constexpr size_t kWordBytes = 4;
    struct Chunk {
        int num_copies_in_flight = 0;
        int num_reads_in_flight = 0;
        std::array<uint64_t, kChunkBytes / kWordBytes> generic_write_idx{};  // 0: last written through the async proxy
        std::array<int, kChunkBytes / kWordBytes> writer_idx{};
        std::array<uint8_t, kChunkBytes> seen{};  // content after the last write that the emulation saw
    };

    Chunk& chunk_at(uint32_t address) { return chunks_[(address - kBase) / kChunkBytes]; }
    const Chunk& chunk_at(uint32_t address) const { return chunks_[(address - kBase) / kChunkBytes]; }
    Chunk& chunk_of(const void* pointer) { return chunk_at(address(pointer)); }
    void remember(Chunk& chunk, const void* content);
    void require_not_read(uint32_t address) const;

    size_t size_;
    Fail fail_;
    std::unique_ptr<uint8_t[]> storage_;
    uint8_t* bytes_;
    std::vector<Chunk> chunks_;
    std::map<std::string, size_t> static_offsets_;
    size_t static_end_;
    uint64_t num_generic_writes_ = 0;
    std::vector<uint64_t> fences_;  // per thread: the generic writes up to this one are fenced
};

}  // namespace moetrain::emulation
