// A depthwise convolution of sixteen channels that lie together, fp32, over a map with a border of zeros.
//
// A map has rows + SIZE - 1 rows of width + SIZE - 1 positions, and AT_ONCE positions over at its end; row(i) is where the
// i-th of them begins. Weights of tap (i, j) lie at (i * SIZE + j) * ldw.

#pragma once

#include "numbers.h"

constexpr int MOST_REACH = 3;  // rows above and below that a convolution sees
constexpr int AT_ONCE = 8;     // positions side by side: so many sums keep two units busy

inline long map_size(long rows, long width, long size) {
    return ((rows + size - 1) * (width + size - 1) + AT_ONCE) * LANES;
}

// Calls take(y * width + x, sum) with the weighed sum around each position.
template <int SIZE, class Rows, class Take>
inline void convolve(Rows row, long rows, long width, const float* weight, long ldw, Row bias, Take take) {
    static_assert(SIZE / 2 <= MOST_REACH);
    for (long y = 0; y < rows; y++)
        for (long x = 0; x < width; x += AT_ONCE) {
            Row sums[AT_ONCE];
#pragma GCC unroll 8
            for (Row& sum : sums) sum = bias;
            for (int i = 0; i < SIZE; i++) {
                const float* p = row(y + i) + x * LANES;
                Row weights[SIZE];
                for (int j = 0; j < SIZE; j++) weights[j] = load(weight + (i * SIZE + j) * ldw);
#pragma GCC unroll 16
                for (int j = 0; j < SIZE + AT_ONCE - 1; j++) {
                    Row value = load(p + j * LANES);
#pragma GCC unroll 8
                    for (int k = 0; k < AT_ONCE; k++)
                        if (j - k >= 0 && j - k < SIZE) sums[k] += value * weights[j - k];
                }
            }
            for (long k = 0; k < AT_ONCE && x + k < width; k++) take(y * width + x + k, sums[k]);
        }
}

// Adds to rows FROM to TO (exclusive) of the weights' gradient, (SIZE * SIZE, 16), what these maps of the input and of the
// output's gradient give; both have the border, and that of the gradient holds zeros.
template <int SIZE, int FROM, int TO>
inline void gather_weights(const float* input, const float* grad, long rows, long width, float* sums) {
    constexpr int SOME = 4;
    const long line = (width + SIZE - 1) * LANES, middle = SIZE / 2;
    Row own[TO - FROM][SIZE];
#pragma GCC unroll 8
    for (int i = FROM; i < TO; i++)
#pragma GCC unroll 8
        for (int j = 0; j < SIZE; j++) own[i - FROM][j] = load(sums + (i * SIZE + j) * LANES);
    for (long y = 0; y < rows; y++)
        for (long x = 0; x < width; x += SOME) {
            const float* g = grad + (y + middle) * line + (x + middle) * LANES;
            Row grads[SOME];
#pragma GCC unroll 4
            for (int k = 0; k < SOME; k++) grads[k] = x + k < width ? load(g + k * LANES) : Row{};
#pragma GCC unroll 8
            for (int i = FROM; i < TO; i++) {
                const float* p = input + (y + i) * line + x * LANES;
#pragma GCC unroll 16
                for (int j = 0; j < SIZE + SOME - 1; j++) {
                    Row value = load(p + j * LANES);
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
