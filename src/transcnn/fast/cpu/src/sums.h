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
