// GroupNorm and BatchNorm in training, alone or with the SiLU after them.
//
// With z = (x - mean)·inverse·weight + bias, inverse = 1/√(variance + eps), a norm gives y = z or SiLU(z).
// With n numbers that share a mean, S = Σ weight·dz and Q = Σ weight·dz·(x - mean) over them,
//
//     dbias = Σ dz,   dweight = Σ dz·(x - mean)·inverse,   dx = inverse·(weight·dz - S/n - (x - mean)·Q·inverse²/n)
//
// Maps are (batch, positions, channels), channels a multiple of 16. Work is assigned to threads statically.

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "sums.h"

namespace {

// Of each channel, in fp32.
struct Norm {
    const float *mean, *scale, *shift;  // z = (x - mean)·scale + shift: x·scale alone may be far larger than z

    Vec at(Vec x, long c) const { return (x - load(mean + c)) * load(scale + c) + load(shift + c); }
};

template <bool SILU, class T>
void normalise(const T* x, T* y, long positions, long channels, Norm norm) {
    for (long i = 0; i < positions * channels; i += channels)
        for (long c = 0; c < channels; c += LANES) {
            Vec z = norm.at(load(x + i + c), c);
            if (SILU) z = silu<T>(z);
            store(y + i + c, z);
        }
}

// dz, given dy.
template <bool SILU, class T>
inline Vec before_activation(const T* dy, Vec x, Norm norm, long c) {
    if (!SILU) return load(dy);
    Vec value;
    return load(dy) * silu_gradient<T>(norm.at(x, c), value);
}

// Adds sums of dz and of dz·(x - mean) over some positions to ``sums`` (2, channels).
template <bool SILU, class T>
void add_gradient_sums(const T* x, const T* dy, long positions, long channels, Norm norm, double* sums) {
    constexpr long SOME = 512;
    for (long start = 0; start < positions; start += SOME)
        by_vectors(channels, [&]<long COUNT>(long c) {
            const long end = std::min(positions, start + SOME);
            Vec first[COUNT] = {}, second[COUNT] = {};
            for (long i = start; i < end; i++)
#pragma GCC unroll 4
                for (long k = 0; k < COUNT; k++) {
                    const long channel = c + k * LANES, at = i * channels + channel;
                    soon(x + at, channels), soon(dy + at, channels);
                    const Vec value = load(x + at), dz = before_activation<SILU, T>(dy + at, value, norm, channel);
                    first[k] += dz;
                    second[k] += dz * (value - load(norm.mean + channel));
                }
            for (long k = 0; k < COUNT; k++)
                for (int i = 0; i < LANES; i++) {
                    sums[c + k * LANES + i] += first[k][i];
                    sums[channels + c + k * LANES + i] += second[k][i];
                }
        });
}

// dx = dz·scale + (x - mean)·by_x + rest
template <bool SILU, class T>
void gradient(const T* x, const T* dy, T* dx, long positions, long channels, Norm norm, const float* by_x, const float* rest) {
    for (long i = 0; i < positions * channels; i += channels)
        for (long c = 0; c < channels; c += LANES) {
            const Vec value = load(x + i + c), dz = before_activation<SILU, T>(dy + i + c, value, norm, c);
            store(dx + i + c, dz * load(norm.scale + c) + (value - load(norm.mean + c)) * load(by_x + c) + load(rest + c));
        }
}

// Mean and 1/√(variance + eps) from sums of n numbers and of their squares; NaN stays NaN.
inline void find_statistics(double sum, double square, double n, float eps, double& mean, double& variance, double& inverse) {
    mean = sum / n;
    variance = square / n - mean * mean;
    variance = variance < 0 ? 0 : variance;
    inverse = 1 / std::sqrt(variance + eps);
}

struct Shape {
    long batch, positions, channels, groups;

    long size() const { return positions * channels; }  // of an image
    long each() const { return channels / groups; }
};

// Calls run(own, sums), for each image, with memory for ``arrays`` times (channels) and for (2, channels).
template <class Run>
void for_each_image(Shape s, long arrays, long threads, Run run) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long image = 0; image < s.batch; image++) {
        Scratch& memory = scratch();
        if (!memory.begin(s.channels * (arrays * 4 + 16) + 256)) continue;
        double* sums = memory.take<double>(2 * s.channels);
        std::fill_n(sums, 2 * s.channels, 0.0);
        run(image, memory.take<float>(arrays * s.channels), sums);
    }
}

// statistics (batch, groups, 2): mean and inverse
template <bool SILU, class T>
void group_norm_forward(const T* x, T* y, const float* weight, const float* bias, float* statistics, float eps, Shape s,
                        long threads) {
    for_each_image(s, 3, threads, [&](long image, float* middle, double* sums) {
        float *scale = middle + s.channels, *shift = scale + s.channels, *own = statistics + image * s.groups * 2;
        add_sums(x + image * s.size(), s.positions, s.channels, sums);
        for (long group = 0; group < s.groups; group++) {
            const long start = group * s.each(), end = start + s.each();
            double sum = 0, square = 0, mean, variance, inverse;
            for (long c = start; c < end; c++) sum += sums[c], square += sums[s.channels + c];
            find_statistics(sum, square, double(s.positions) * s.each(), eps, mean, variance, inverse);
            own[2 * group] = mean, own[2 * group + 1] = inverse;
            const double rounding = own[2 * group] - mean;
            for (long c = start; c < end; c++) {
                middle[c] = mean, scale[c] = weight[c] * inverse;
                shift[c] = bias[c] + rounding * weight[c] * inverse;
            }
        }
        normalise<SILU>(x + image * s.size(), y + image * s.size(), s.positions, s.channels, {middle, scale, shift});
    });
}

// found (threads, 2, channels): dbias and dweight
template <bool SILU, class T>
void group_norm_backward(const T* x, const T* dy, T* dx, const float* weight, const float* bias, const float* statistics,
                         double* found, Shape s, long threads) {
    for_each_image(s, 4, threads, [&](long image, float* mean, double* sums) {
        const long channels = s.channels, start = image * s.size();
        float *scale = mean + channels, *by_x = scale + channels, *rest = by_x + channels;
        const float* own = statistics + image * s.groups * 2;
        for (long c = 0; c < channels; c++) {
            const double middle = own[c / s.each() * 2], inverse = own[c / s.each() * 2 + 1];
            mean[c] = middle, scale[c] = weight[c] * inverse;
        }
        add_gradient_sums<SILU>(x + start, dy + start, s.positions, channels, {mean, scale, bias}, sums);
        double* total = found + omp_get_thread_num() * 2 * channels;
        const double n = double(s.positions) * s.each();
        for (long first = 0; first < channels; first += s.each()) {
            const double inverse = own[first / s.each() * 2 + 1];
            double sum = 0, products = 0;
            for (long c = first; c < first + s.each(); c++) {
                sum += weight[c] * sums[c], products += weight[c] * sums[channels + c];
                total[c] += sums[c], total[channels + c] += sums[channels + c] * inverse;
            }
            for (long c = first; c < first + s.each(); c++)
                by_x[c] = -inverse * inverse * inverse * products / n, rest[c] = -inverse * sum / n;
        }
        gradient<SILU>(x + start, dy + start, dx + start, s.positions, channels, {mean, scale, bias}, by_x, rest);
    });
}

// Calls run(first position, their number) for pieces of all positions, and so that a thread has its own ones.
template <class Run>
void for_pieces(long positions, Run run) {
    constexpr long SOME = 512;
#pragma omp for schedule(static)
    for (long first = 0; first < positions; first += SOME) run(first, std::min(SOME, positions - first));
}

inline void add_threads(double* sums, long channels, long threads) {
    for (long i = 2 * channels; i < threads * 2 * channels; i++) sums[i % (2 * channels)] += sums[i];
}

// statistics (5, channels): mean, inverse, variance, scale and shift; sums (threads, 2, channels), zeros
template <bool SILU, class T>
void batch_norm_forward(const T* x, T* y, const float* weight, const float* bias, float* statistics, double* sums, float eps,
                        long positions, long channels, long threads) {
    float *scale = statistics + 3 * channels, *shift = scale + channels;
#pragma omp parallel num_threads(threads)
    {
        double* own = sums + omp_get_thread_num() * 2 * channels;
        for_pieces(positions, [&](long i, long count) { add_sums(x + i * channels, count, channels, own); });
#pragma omp single
        {
            add_threads(sums, channels, threads);
            for (long c = 0; c < channels; c++) {
                double mean, variance, inverse;
                find_statistics(sums[c], sums[channels + c], positions, eps, mean, variance, inverse);
                statistics[c] = mean, statistics[channels + c] = inverse, statistics[2 * channels + c] = variance;
                scale[c] = weight[c] * inverse, shift[c] = bias[c] + (statistics[c] - mean) * weight[c] * inverse;
            }
        }
        for_pieces(positions, [&](long i, long count) {
            normalise<SILU>(x + i * channels, y + i * channels, count, channels, {statistics, scale, shift});
        });
    }
}

// statistics as above; factors (2, channels) is memory to work in; found (2, channels): dbias and dweight
template <bool SILU, class T>
void batch_norm_backward(const T* x, const T* dy, T* dx, const float* statistics, float* factors, float* found, double* sums,
                         long positions, long channels, long threads) {
    const float *inverse = statistics + channels, *scale = statistics + 3 * channels;
    const Norm norm = {statistics, scale, scale + channels};
#pragma omp parallel num_threads(threads)
    {
        double* own = sums + omp_get_thread_num() * 2 * channels;
        for_pieces(positions, [&](long i, long count) {
            add_gradient_sums<SILU>(x + i * channels, dy + i * channels, count, channels, norm, own);
        });
#pragma omp single
        {
            add_threads(sums, channels, threads);
            for (long c = 0; c < channels; c++) {
                const double factor = double(scale[c]) * inverse[c] * inverse[c];
                found[c] = sums[c], found[channels + c] = sums[channels + c] * inverse[c];
                factors[c] = -factor * sums[channels + c] / positions;
                factors[channels + c] = -double(scale[c]) * sums[c] / positions;
            }
        }
        for_pieces(positions, [&](long i, long count) {
            gradient<SILU>(x + i * channels, dy + i * channels, dx + i * channels, count, channels, norm, factors,
                           factors + channels);
        });
    }
}

// Calls run<SILU>().
template <class Run>
void with(bool silu, Run run) {
    silu ? run.template operator()<true>() : run.template operator()<false>();
}

}  // namespace

#define NORMS(SUFFIX, T)                                                                                                    \
    extern "C" void group_norm_forward_##SUFFIX(const T* x, T* y, const float* weight,                                     \
                                                const float* bias, float* statistics, const float* eps, long batch,        \
                                                long positions, long channels, long groups, long silu, long threads) {     \
        with(silu, [&]<bool SILU>() {                                                                                      \
            group_norm_forward<SILU>(x, y, weight, bias, statistics, *eps,                                       \
                                     Shape{batch, positions, channels, groups}, threads);                                  \
        });                                                                                                                \
    }                                                                                                                      \
    extern "C" void group_norm_backward_##SUFFIX(const T* x, const T* dy, T* dx, const float* weight, const float* bias,   \
                                                 const float* statistics, double* found, long batch, long positions,       \
                                                 long channels, long groups, long silu, long threads) {                    \
        with(silu, [&]<bool SILU>() {                                                                                      \
            group_norm_backward<SILU>(x, dy, dx, weight, bias, statistics, found,                                          \
                                      Shape{batch, positions, channels, groups}, threads);                                 \
        });                                                                                                                \
    }                                                                                                                      \
    extern "C" void batch_norm_forward_##SUFFIX(const T* x, T* y, const float* weight, const float* bias,                  \
                                                float* statistics, double* sums, const float* eps, long positions,         \
                                                long channels, long silu, long threads) {                                  \
        with(silu, [&]<bool SILU>() {                                                                                      \
            batch_norm_forward<SILU>(x, y, weight, bias, statistics, sums, *eps, positions, channels, threads);            \
        });                                                                                                                \
    }                                                                                                                      \
    extern "C" void batch_norm_backward_##SUFFIX(const T* x, const T* dy, T* dx, const float* statistics,                  \
                                                 float* factors, float* found, double* sums, long positions,               \
                                                 long channels, long silu, long threads) {                                 \
        with(silu, [&]<bool SILU>() {                                                                                      \
            batch_norm_backward<SILU>(x, dy, dx, statistics, factors, found, sums, positions, channels, threads);          \
        });                                                                                                                \
    }

NORMS(fp32, float)
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
NORMS(bf16, bf16)
#endif
