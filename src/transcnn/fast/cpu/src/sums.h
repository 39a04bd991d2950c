// What kernels for training share: sums over positions for each channel, and the derivative of SiLU.

#pragma once

#include "vec.h"

// SiLU'(x), and SiLU(x) in ``value``.
template <class T>
inline Vec silu_gradient(Vec x, Vec& value) {
    Vec prob = inverse(exponential<T>(-x) + 1.0f);
    value = x * prob;
    return prob + value * (1.0f - prob);
}

// Adds sums of x - centre and of its square over n positions, converted to those of x and of x², in double precision.
inline void add_channel_sums(double* sums, long channels, Vec centre, Vec first, Vec second, double n) {
    for (int i = 0; i < LANES; i++) {
        const double c = centre[i];
        sums[i] += first[i] + n * c;
        sums[channels + i] += second[i] + 2 * c * first[i] + n * c * c;
    }
}

// Has what is read a few positions later brought into the cache: prefetchers don't follow a few channels of each position.
template <class T>
inline void soon(const T* p, long channels) {
    __builtin_prefetch(p + 12 * channels);
}

// Calls f<4>(channel) for each four vectors of channels, and f<1> for those that are left.
template <class F>
inline void by_vectors(long channels, F f) {
    long c = 0;
    for (; c + 4 * LANES <= channels; c += 4 * LANES) f.template operator()<4>(c);
    for (; c < channels; c += LANES) f.template operator()<1>(c);
}

// Adds sums of x and of x² over some positions to ``sums`` (2, channels).
template <class T>
inline void add_sums(const T* x, long positions, long channels, double* sums) {
    constexpr long SOME = 128;
    for (long start = 0; start < positions; start += SOME)
        by_vectors(channels, [&]<long COUNT>(long c) {
            const long end = start + SOME < positions ? start + SOME : positions;
            Vec centre[COUNT], first[COUNT] = {}, second[COUNT] = {};
            for (long k = 0; k < COUNT; k++) centre[k] = load(x + start * channels + c + k * LANES);
            for (long i = start; i < end; i++)
#pragma GCC unroll 4
                for (long k = 0; k < COUNT; k++) {
                    const T* from = x + i * channels + c + k * LANES;
                    soon(from, channels);
                    const Vec off = load(from) - centre[k];  // near zero, so that squares don't cancel
                    first[k] += off;
                    second[k] += off * off;
                }
            for (long k = 0; k < COUNT; k++)
                add_channel_sums(sums + c + k * LANES, channels, centre[k], first[k], second[k], end - start);
        });
}
