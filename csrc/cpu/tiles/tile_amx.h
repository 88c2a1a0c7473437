// Tile products with AMX: 32 rows by 64 columns, as two halves of 2 x 2 tiles of 16 x 16 sums. Included once per
// instruction set; see kernels.h. Amx provides the instructions: the machine's, or the same computed step by step
// (EmulatedAmx), on which this source runs and is tested on machines without AMX.
//
// A tile of A is 16 rows of 32 bf16 (64 bytes apart by the row stride), a tile of B 16 pairs of rows of 16 columns: a
// panel's own order. TDPBF16PS adds, for every pair, the two products (Intel SDM, volume 2, TDPBF16PS).
template <typename Amx, typename Packing, int kTileColumns = kPanel>
struct AmxTile : Packing {
    using Session = typename Amx::Session;
    static constexpr const char* kInstructions = Amx::kName;
    static constexpr int64_t kRows = 32, kColumns = kTileColumns;
    static constexpr int64_t kUnitMultiple = 16;
    static constexpr bool kEvenRows = true;

    static void multiply(const uint32_t* const* a, int64_t num_rows, int64_t /*rows_left*/, int64_t k_units,
                         const uint32_t* panel, float* c) {
        const int64_t stride = num_rows > 1 ? a[1] - a[0] : 0;
        typename Amx::Registers amx;
        for (int64_t j = 0; j < kColumns; j += 32) {
            amx.template zero<0>();
            amx.template zero<1>();
            amx.template zero<2>();
            amx.template zero<3>();
            for (int64_t k = 0; k < k_units; k += 16) {
                amx.template load<6>(panel + k * kColumns + j, kColumns * 4);
                amx.template load<7>(panel + k * kColumns + j + 16, kColumns * 4);
                amx.template load<4>(a[0] + k, stride * 4);
                amx.template multiply_add<0, 4, 6>();
                amx.template multiply_add<1, 4, 7>();
                if (num_rows > 16) {
                    amx.template load<5>(a[0] + 16 * stride + k, stride * 4);
                    amx.template multiply_add<2, 5, 6>();
                    amx.template multiply_add<3, 5, 7>();
                }
            }
            amx.template store<0>(c + j, kColumns * 4);
            amx.template store<1>(c + j + 16, kColumns * 4);
            if (num_rows > 16) {
                amx.template store<2>(c + 16 * kColumns + j, kColumns * 4);
                amx.template store<3>(c + 16 * kColumns + j + 16, kColumns * 4);
            }
        }
    }
};

// Eight tile registers of 16 rows of 64 bytes, as the instructions act on them.
struct EmulatedAmx {
    static constexpr const char* kName = "amx_emulated";
    struct Session {};
    struct Registers {
        uint32_t tile[8][16][16];

        static float word_to_float(uint32_t word) { return bits_to<float>(word); }
        template <int kTile>
        void zero() {
            __builtin_memset(tile[kTile], 0, sizeof tile[kTile]);
        }
        template <int kTile>
        void load(const void* from, int64_t stride_bytes) {
            for (int64_t i = 0; i < 16; ++i)
                __builtin_memcpy(tile[kTile][i], static_cast<const char*>(from) + i * stride_bytes, 64);
        }
        template <int kTile>
        void store(void* to, int64_t stride_bytes) const {
            for (int64_t i = 0; i < 16; ++i)
                __builtin_memcpy(static_cast<char*>(to) + i * stride_bytes, tile[kTile][i], 64);
        }
        template <int kSum, int kA, int kB>
        void multiply_add() {
            for (int64_t m = 0; m < 16; ++m) {
                for (int64_t k = 0; k < 16; ++k) {
                    for (int64_t n = 0; n < 16; ++n) {
                        float sum = word_to_float(tile[kSum][m][n]);
                        sum += word_to_float(tile[kA][m][k] << 16) * word_to_float(tile[kB][k][n] << 16);
                        sum +=
                            word_to_float(tile[kA][m][k] & 0xffff0000U) * word_to_float(tile[kB][k][n] & 0xffff0000U);
                        tile[kSum][m][n] = bits_to<uint32_t>(sum);
                    }
                }
            }
        }
    };
};

#ifdef __x86_64__
// The machine's own. A session configures the calling thread's tiles and gives them back, since a library that also
// uses AMX configures its own.
struct MachineAmx {
    static constexpr const char* kName = "amx";
    struct Session {
        Session() {
            struct alignas(64) {
                uint8_t palette = 1, start_row = 0, reserved[14] = {};
                uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
                uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
            } config;
            static_assert(sizeof config == 64);
            asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
        }
        ~Session() { asm volatile("tilerelease" ::: "memory"); }
        Session(const Session&) = delete;
        Session& operator=(const Session&) = delete;
    };
    struct Registers {
        template <int kTile>
        void zero() {
            asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
        }
        template <int kTile>
        void load(const void* from, int64_t stride_bytes) {
            asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTile) : "memory");
        }
        template <int kTile>
        void store(void* to, int64_t stride_bytes) const {
            asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kTile) : "memory");
        }
        template <int kSum, int kA, int kB>
        void multiply_add() {
            asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
        }
    };
};
#endif
