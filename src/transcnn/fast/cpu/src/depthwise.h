// Depthwise convolution in fp32 of sixteen channels that are contiguous in memory, on a zero-padded map.
//
// A map has (rows - 1) * STRIDE + SIZE rows of (width - 1) * STRIDE + SIZE positions, and AT_ONCE * STRIDE further positions at
// its end, which may be read; row(i) is the address of the i-th row. The weights (i, j) of the kernel are at (i * SIZE + j) * ldw.

#pragma once

#include "vec.h"

constexpr int MAX_HALO = 3;  // rows above and below that a convolution reads
constexpr int AT_ONCE = 8;   // positions per iteration: enough independent sums for two FMA units

inline long map_size(long rows, long width, long size) {
    return ((rows + size - 1) * (width + size - 1) + AT_ONCE) * LANES;
}

// Calls take(y, x, count, sums) with the convolution's output at ``count`` positions from (y, x) on.
template <int SIZE, int STRIDE = 1, class Rows, class Take>
inline void convolve(Rows row, long rows, long width, const float* weight, long ldw, Vec bias, Take take) {
    static_assert(SIZE / 2 <= MAX_HALO);
    for (long y = 0; y < rows; y++)
        for (long x = 0; x < width; x += AT_ONCE) {
            Vec sums[AT_ONCE];
#pragma GCC unroll 8
            for (Vec& sum : sums) sum = bias;
            for (int i = 0; i < SIZE; i++) {
                const float* p = row(y * STRIDE + i) + x * STRIDE * LANES;
                Vec weights[SIZE];
                for (int j = 0; j < SIZE; j++) weights[j] = load(weight + (i * SIZE + j) * ldw);
#pragma GCC unroll 24
                for (int j = 0; j < SIZE + (AT_ONCE - 1) * STRIDE; j++) {
                    Vec value = load(p + j * LANES);
#pragma GCC unroll 8
                    for (int k = 0; k < AT_ONCE; k++)
                        if (j - k * STRIDE >= 0 && j - k * STRIDE < SIZE) sums[k] += value * weights[j - k * STRIDE];
                }
            }
            take(y, x, width - x < AT_ONCE ? width - x : AT_ONCE, sums);
        }
}

// Of take(y * width + x, sum) for one position what :func:`convolve` calls.
template <class Take>
inline auto each_position(long width, Take take) {
    return [=](long y, long x, long count, const Vec* sums) mutable {
        for (long k = 0; k < AT_ONCE && k < count; k++) take(y * width + x + k, sums[k]);
    };
}

// Accumulates rows FROM to TO (exclusive) of the weight gradient, (SIZE * SIZE, 16), from a map of the input and one of the
// output's gradient; both are padded, the latter with zeros.
template <int SIZE, int FROM, int TO>
inline void gather_weights(const float* input, const float* grad, long rows, long width, float* sums) {
    constexpr int SOME = 4;
    const long line = (width + SIZE - 1) * LANES, middle = SIZE / 2;
    Vec own[TO - FROM][SIZE];
#pragma GCC unroll 8
    for (int i = FROM; i < TO; i++)
#pragma GCC unroll 8
        for (int j = 0; j < SIZE; j++) own[i - FROM][j] = load(sums + (i * SIZE + j) * LANES);
    for (long y = 0; y < rows; y++)
        for (long x = 0; x < width; x += SOME) {
            const float* g = grad + (y + middle) * line + (x + middle) * LANES;
            Vec grads[SOME];
#pragma GCC unroll 4
            for (int k = 0; k < SOME; k++) grads[k] = x + k < width ? load(g + k * LANES) : Vec{};
#pragma GCC unroll 8
            for (int i = FROM; i < TO; i++) {
                const float* p = input + (y + i) * line + x * LANES;
#pragma GCC unroll 16
                for (int j = 0; j < SIZE + SOME - 1; j++) {
                    Vec value = load(p + j * LANES);
#pragma GCC unroll 4
                    for (int k = 0; k < SOME; k++)
                        if (j - k >= 0 && j - k < SIZE) own[i - FROM][j - k] += value * grads[k];
                }
            }
        }
#pragma GCC unroll 8
    for (int i = FROM; i < TO; i++)
#pragma GCC unroll 8
        for (int j = 0; j < SIZE; j++) store(sums + (i * SIZE + j) * LANES, own[i - FROM][j]);
}
