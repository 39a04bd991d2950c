// Attention of some queries to keys and values that are packed in panels.

#pragma once

#include <algorithm>

#include "gemm.h"

constexpr long KEYS = 256;  // per block; the softmax is rescaled from block to block (online softmax)

// Transposes rows (n, head_dim) with this stride into panels of 32 rows: [panel][32-bit word of the row][row], zeros up to padded.
template <class T>
void pack_transposed(const T* x, long stride, long n, long padded, long head_dim, T* panels) {
    constexpr long WORD = 4 / sizeof(T);  // elements in 32 bits
    const long words = head_dim / WORD;
    alignas(64) int32_t some[16 * 16], transposed[16 * 16];
    for (long i = 0; i < padded; i += 16)
        for (long j = 0; j < words; j += 16) {
            const long rows = std::clamp<long>(n - i, 0, 16), columns = std::min<long>(16, words - j);
            int32_t* to = reinterpret_cast<int32_t*>(panels) + i / PANEL * PANEL * words + j * PANEL + i % PANEL;
            const int32_t* from = reinterpret_cast<const int32_t*>(x + i * stride) + j;
            if (rows == 16 && columns == 16) {
                transpose(from, stride / WORD, to, PANEL);
                continue;
            }
            std::memset(some, 0, sizeof some);
            for (long row = 0; row < rows; row++)
                std::memcpy(some + row * 16, from + row * stride / WORD, columns * sizeof(int32_t));
            transpose(some, 16, transposed, 16);
            for (long column = 0; column < columns; column++)
                std::memcpy(to + column * PANEL, transposed + column * 16, 16 * sizeof(int32_t));
        }
}

// Packs such rows into panels of 32 channels: [panel][row, or pair of rows in bf16][channel], zeros up to padded.
template <class T>
void pack(const T* x, long stride, long n, long padded, long head_dim, T* panels) {
    for (long j = 0; j < head_dim; j += PANEL) {
        T* to = panels + j * padded;
        if (head_dim - j < PANEL) std::memset(to, 0, padded * PANEL * sizeof(T));
        for (long c = 0; c < std::min(PANEL, head_dim - j); c += LANES)
            if constexpr (sizeof(T) == 4)
                for (long i = 0; i < padded; i++)
                    store(to + i * PANEL + c, i < n ? load(x + i * stride + j + c) : Vec{});
            else
                for (long i = 0; i < padded; i += 2) {
                    Bits low = i < n ? bits(x + i * stride + j + c) : Bits{};
                    Bits high = i + 1 < n ? bits(x + (i + 1) * stride + j + c) : Bits{};
                    low |= high << 16;
                    std::memcpy(to + i * PANEL + c * 2, &low, sizeof low);
                }
    }
}

// Stores a tile's rows x columns at ``to``, each row times its factor where factors are given, plus ``residual`` (as ``to``).
template <class T>
inline void put(T* to, long stride, long rows, long columns, const float* c, const float* factors = nullptr,
                const T* residual = nullptr) {
    for (long i = 0; i < rows; i++, c += PANEL)
        for (long j = 0; j < columns; j += LANES) {
            const Vec value = factors ? load(c + j) * factors[i] : load(c + j);
            store(to + i * stride + j, residual ? value + load(residual + i * stride + j) : value);
        }
}

// softmax(scale·Q·Kᵀ)·V for ``rows`` queries (at most one tile) and n packed keys; calls
// take(row, rows, column, columns, c, factors) with tiles whose rows are still to be multiplied by their factors.
template <class T, class Take>
void attend(const T* q, long ldq, long rows, float scale, const T* keys, const T* values, long n, long padded,
            long head_dim, Take take) {
    constexpr long ROWS = Tile<T>::ROWS;
    alignas(64) float scores[ROWS * KEYS];
    alignas(64) T probs[ROWS * KEYS];
    alignas(64) float sums[ROWS * 256], top[ROWS], factor[ROWS];
    float total_of[ROWS];
    for (long first = 0; first < n; first += KEYS) {
        const long some = std::min(KEYS, padded - first), real = std::min(KEYS, n - first);
        multiply(q, ldq, rows, keys + first * head_dim, head_dim, head_dim, some,
                 [&](long row, long count, long column, long, const float* c) {
                     for (long i = 0; i < count; i++, c += PANEL)
                         for (long j = 0; j < PANEL; j += LANES)
                             store(scores + (row + i) * KEYS + column + j, load(c + j) * scale);
                 });
        for (long i = 0; i < rows; i++) {
            float* own = scores + i * KEYS;
            for (long j = real; j < some; j++) own[j] = -__builtin_inff();
            Vec high = load(own);
            for (long j = LANES; j < some; j += LANES) high = larger(load(own + j), high);
            float now = largest(high);
            if (first && !(now > top[i])) now = top[i];
            factor[i] = first ? exponential<T>(all(top[i] - now))[0] : 0;
            top[i] = now;
            Vec sum{};
            for (long j = 0; j < some; j += LANES) {
                Vec prob = exponential<T>(load(own + j) - now);
                if (j + LANES > real)
                    for (long lane = std::max<long>(0, real - j); lane < LANES; lane++) prob[lane] = 0;
                sum += prob;
                store(probs + i * KEYS + j, prob);
            }
            total_of[i] = (first ? total_of[i] * factor[i] : 0) + total(sum);
        }
        const bool last = first + KEYS >= n;
        if (last)
            for (long i = 0; i < rows; i++) top[i] = 1 / total_of[i];
        multiply(probs, KEYS, rows, values + first * PANEL, padded, some, head_dim,
                 [&](long row, long count, long column, long columns, float* c) {
                     if (first || !last)
                         for (long i = row; i < row + count; i++)
                             for (long j = 0; j < columns; j += LANES) {
                                 float* sum = sums + i * 256 + column + j;
                                 float* p = c + (i - row) * PANEL + j;
                                 if (first) store(p, load(p) + load(sum) * factor[i]);
                                 store(sum, load(p));
                             }
                     if (last) take(row, count, column, columns, c, top);
                 });
    }
}
