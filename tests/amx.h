// AMX's tiles computed by plain C++: kernels compiled with -include of this file run their AMX code on any x86-64 CPU that has
// AVX512_BF16. All tiles have 16 rows of 64 bytes, as those of the kernels.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

struct EmulatedTile {
    uint8_t bytes[16][64];
};

inline thread_local EmulatedTile emulated_tiles[8];

inline float emulated_bf16(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    const uint32_t whole = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &whole, 4);
    return value;
}

inline void emulated_load(int tile, const void* base, long stride) {
    for (int i = 0; i < 16; i++)
        std::memcpy(emulated_tiles[tile].bytes[i], static_cast<const char*>(base) + i * stride, 64);
}

inline void emulated_store(int tile, void* base, long stride) {
    for (int i = 0; i < 16; i++) std::memcpy(static_cast<char*>(base) + i * stride, emulated_tiles[tile].bytes[i], 64);
}

inline void emulated_product(int to, int left, int right) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            float sum;
            std::memcpy(&sum, emulated_tiles[to].bytes[i] + 4 * j, 4);
            for (int k = 0; k < 32; k++)
                sum += emulated_bf16(emulated_tiles[left].bytes[i] + 2 * k) *
                       emulated_bf16(emulated_tiles[right].bytes[k / 2] + 4 * j + 2 * (k % 2));
            std::memcpy(emulated_tiles[to].bytes[i] + 4 * j, &sum, 4);
        }
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#define _tile_loadd(tile, base, stride) emulated_load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated_store(tile, base, stride)
#define _tile_zero(tile) std::memset(&emulated_tiles[tile], 0, sizeof(EmulatedTile))
#define _tile_dpbf16ps(to, left, right) emulated_product(to, left, right)
#define _tile_loadconfig(from) static_cast<void>(from)
#define _tile_storeconfig(to) static_cast<void>(to)
#define _tile_release() static_cast<void>(0)
#define syscall(...) 0L  // Linux's permission to use AMX
