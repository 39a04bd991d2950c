// Attention of some queries to keys and values that are packed in panels.

#pragma once

#include <algorithm>

#include "product.h"

constexpr long KEYS = 256;  // at a time; with more of them the softmax goes on from the sums so far

// Rows (n, head_dim), ``stride`` apart, turned into panels of 32 of them: [panel][word of the row][row], zeros up to padded.
template <class T>
void pack_turned(const T* x, long stride, long n, long padded, long head_dim, T* panels) {
    constexpr long WORD = 4 / sizeof(T);  // numbers in 32 bits
    const long words = head_dim / WORD;
    alignas(64) int32_t some[16 * 16], turned[16 * 16];
    for (long i = 0; i < padded; i += 16)
        for (long j = 0; j < words; j += 16) {
            const long rows = std::clamp<long>(n - i, 0, 16), columns = std::min<long>(16, words - j);
            int32_t* to = reinterpret_cast<int32_t*>(panels) + i / PANEL * PANEL * words + j * PANEL + i % PANEL;
            const int32_t* from = reinterpret_cast<const int32_t*>(x + i * stride) + j;
            if (rows == 16 && columns == 16) {
                turn(from, stride / WORD, to, PANEL);
                continue;
            }
            std::memset(some, 0, sizeof some);
            for (long row = 0; row < rows; row++)
                std::memcpy(some + row * 16, from + row * stride / WORD, columns * sizeof(int32_t));
            turn(some, 16, turned, 16);
            for (long column = 0; column < columns; column++)
                std::memcpy(to + column * PANEL, turned + column * 16, 16 * sizeof(int32_t));
        }
}

// Rows as above in panels of 32 of their channels: [panel][row, or two][channel], zeros up to padded.
template <class T>
void pack(const T* x, long stride, long n, long padded, long head_dim, T* panels) {
    for (long j = 0; j < head_dim; j += PANEL) {
        T* to = panels + j * padded;
        if (head_dim - j < PANEL) std::memset(to, 0, padded * PANEL * sizeof(T));
        for (long c = 0; c < std::min(PANEL, head_dim - j); c += LANES)
            if constexpr (sizeof(T) == 4)
                for (long i = 0; i < padded; i++)
                    store(to + i * PANEL + c, i < n ? load(x + i * stride + j + c) : Row{});
            else
                for (long i = 0; i < padded; i += 2) {
                    Bits low = i < n ? bits(x + i * stride + j + c) : Bits{};
                    Bits high = i + 1 < n ? bits(x + (i + 1) * stride + j + c) : Bits{};
                    low |= high << 16;
                    std::memcpy(to + i * PANEL + c * 2, &low, sizeof low);
                }
    }
}

// Writes a tile's rows x columns to ``to``, whose rows are ``stride`` apart, each row times its factor where there are factors.
template <class T>
inline void put(T* to, long stride, long rows, long columns, const float* c, const float* factors = nullptr) {
    for (long i = 0; i < rows; i++, to += stride, c += PANEL)
        for (long j = 0; j < columns; j += LANES) store(to + j, factors ? load(c + j) * factors[i] : load(c + j));
}

// softmax(scale·Q·Kᵀ)·V for ``rows`` queries (at most a tile of them), n keys packed as above; calls
// take(row, rows, column, columns, c, factors) with tiles that want to be multiplied by each row's factor.
template <class T, class Take>
void attend(const T* q, long ldq, long rows, float scale, const T* keys, const T* values, long n, long padded,
            long head_dim, Take take) {
    constexpr long ROWS = Tile<T>::ROWS;
    alignas(64) float scores[ROWS * KEYS];
    alignas(64) T shares[ROWS * KEYS];
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
            Row high = load(own);
            for (long j = LANES; j < some; j += LANES) high = larger(load(own + j), high);
            float now = largest(high);
            if (first && !(now > top[i])) now = top[i];
            factor[i] = first ? exponential<T>(all(top[i] - now))[0] : 0;
            top[i] = now;
            Row sum{};
            for (long j = 0; j < some; j += LANES) {
                Row share = exponential<T>(load(own + j) - now);
                if (j + LANES > real)
                    for (long lane = std::max<long>(0, real - j); lane < LANES; lane++) share[lane] = 0;
                sum += share;
                store(shares + i * KEYS + j, share);
            }
            total_of[i] = (first ? total_of[i] * factor[i] : 0) + total(sum);
        }
        const bool last = first + KEYS >= n;
        if (last)
            for (long i = 0; i < rows; i++) top[i] = 1 / total_of[i];
        multiply(shares, KEYS, rows, values + first * PANEL, padded, some, head_dim,
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
