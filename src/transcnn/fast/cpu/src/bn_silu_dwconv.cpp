// Training an inverted residual between its 1x1 convolutions: BatchNorm, SiLU, depthwise convolution, BatchNorm, SiLU, fused.
//
// Of the five maps that these layers output only the convolution's is kept, and each is read as seldom as BatchNorm allows:
// the statistics of a norm are summed where its input is computed.
// Letters: e is the input, a = SiLU(BatchNorm(e)), m = the convolution of a, s = SiLU(BatchNorm(m)) the output.
// All maps are (B, H, W, C), channels a multiple of 16; a norm is ``x * scale + shift`` with both in fp32. Work is assigned
// to threads statically, so that a run is reproducible for a given number of threads.

#include <omp.h>

#include <algorithm>

#include "depthwise.h"
#include "sums.h"

namespace {

constexpr long CACHE = 1 << 20;  // bytes of the maps in use at a time
constexpr long MAX_CHANNELS = 64;  // in use at a time

// Adds what f(channel, index, first, second) accumulates over all positions to ``sums`` (threads, 2, channels).
template <class F>
void sum_up(long tokens, long channels, double* sums, long threads, F f) {
    constexpr long SOME = 512;
    const long pieces = (tokens + SOME - 1) / SOME;
#pragma omp parallel num_threads(threads)
    {
        double* own = sums + omp_get_thread_num() * 2 * channels;
#pragma omp for schedule(static)
        for (long piece = 0; piece < pieces; piece++)
            by_vectors(channels, [&]<long COUNT>(long c) {
                Vec first[COUNT] = {}, second[COUNT] = {};
                const long end = std::min(tokens, (piece + 1) * SOME);
                for (long token = piece * SOME; token < end; token++)
#pragma GCC unroll 4
                    for (long k = 0; k < COUNT; k++) {
                        const long channel = c + k * LANES;
                        f(channel, token * channels + channel, first[k], second[k]);
                    }
                for (long k = 0; k < COUNT; k++)
                    for (int i = 0; i < LANES; i++) {
                        own[c + k * LANES + i] += first[k][i];
                        own[channels + c + k * LANES + i] += second[k][i];
                    }
            });
    }
}

// Sizes, and how some channels of some rows of an image become maps in the layout of depthwise.h.
struct Shape {
    long batch, height, width, channels, size;

    long halo() const { return size / 2; }
    long line() const { return (width + size - 1) * LANES; }
    auto rows(const float* map) const {
        return [map, line = line()](long i) { return map + i * line; };
    }

    // How many channels and rows of ``maps`` maps fit the cache.
    void divide(long maps, long& some, long& rows) const {
        rows = std::min(height, std::max<long>(4 * size, 1024 / width));
        const long fitting = CACHE / (maps * map_size(rows, width, size) * 4) * LANES;
        some = std::min(std::min(channels, MAX_CHANNELS), std::max(LANES, fitting));
    }

    // Fills a map for rows top to bottom with f(channel, position in the image) for ``some`` channels, zeros outside the image.
    template <class F>
    void fill(float* map, long block, long channel, long some, long top, long bottom, F f) const {
        const long first = std::max<long>(0, top - halo()), last = std::min(height, bottom + halo());
        for (long c = 0; c < some; c += LANES) {
            float* own = map + c / LANES * block;
            const long above = (first - (top - halo())) * line(), all = (bottom - top + size - 1) * line();
            const long there = (last - first) * line();
            std::memset(own, 0, above * sizeof(float));
            std::memset(own + above + there, 0, (all + AT_ONCE * LANES - above - there) * sizeof(float));
        }
        for (long y = first; y < last; y++) {
            float* row = map + (y - (top - halo())) * line();
            for (long c = 0; c < some; c += LANES) {
                float* own = row + c / LANES * block;
                for (long i = 0; i < halo() * LANES; i += LANES)
                    store(own + i, Vec{}), store(own + (width + halo()) * LANES + i, Vec{});
            }
            for (long x = 0; x < width; x++)
                for (long c = 0; c < some; c += LANES)
                    store(row + c / LANES * block + (x + halo()) * LANES, f(channel + c, y * width + x));
        }
    }
};

// Where sums is null there is no norm after the convolution; ``activated`` gets SiLU(m) then, and is null else.
template <class T>
void forward(const T* e, const float* scale, const float* shift, const float* weight, T* m, T* activated, double* sums,
             Shape s, long threads) {
    long some, step;
    s.divide(1, some, step);
    const long pieces = (s.channels + some - 1) / some, per_image = s.height * s.width;
#pragma omp parallel num_threads(threads)
    {
        double* own = sums ? sums + omp_get_thread_num() * 2 * s.channels : nullptr;
#pragma omp for schedule(static)
        for (long item = 0; item < s.batch * pieces; item++) {
            const long channel = item % pieces * some, count = std::min(some, s.channels - channel);
            const long block = map_size(step, s.width, s.size), image = item / pieces * per_image;
            Scratch& memory = scratch();
            if (!memory.begin(count / LANES * block * 4 + 64)) continue;
            float* map = memory.take<float>(count / LANES * block);
            for (long top = 0; top < s.height; top += step) {
                const long bottom = std::min(s.height, top + step);
                s.fill(map, block, channel, count, top, bottom, [&](long c, long position) {
                    const T* from = e + (image + position) * s.channels + c;
                    soon(from, s.channels);
                    return silu<T>(load(from) * load(scale + c) + load(shift + c));
                });
                for (long c = 0; c < count; c += LANES) {
                    const long start = (image + top * s.width) * s.channels + channel + c;
                    const auto from = s.rows(map + c / LANES * block);
                    const auto run = [&](auto take) {
                        const float* w = weight + channel + c;
                        const auto each = each_position(s.width, take);
                        if (s.size == 3) convolve<3>(from, bottom - top, s.width, w, s.channels, Vec{}, each);
                        if (s.size == 5) convolve<5>(from, bottom - top, s.width, w, s.channels, Vec{}, each);
                        if (s.size == 7) convolve<7>(from, bottom - top, s.width, w, s.channels, Vec{}, each);
                    };
                    if (!sums) {
                        run([&](long token, Vec sum) {
                            store(m + start + token * s.channels, sum);
                            store(activated + start + token * s.channels, silu<T>(sum));
                        });
                        continue;
                    }
                    Vec centre{}, first{}, second{};
                    run([&](long token, Vec sum) {
                        store(m + start + token * s.channels, sum);
                        if (token == 0) centre = sum;  // near the mean, so that squares don't cancel
                        Vec off = sum - centre;
                        first += off;
                        second += off * off;
                    });
                    add_channel_sums(own + channel + c, s.channels, centre, first, second, (bottom - top) * s.width);
                }
            }
        }
    }
}

template <class T>
void channel_sums(const T* x, double* sums, long tokens, long channels, long threads) {
    constexpr long SOME = 128;
#pragma omp parallel num_threads(threads)
    {
        double* own = sums + omp_get_thread_num() * 2 * channels;
#pragma omp for schedule(static)
        for (long start = 0; start < tokens; start += SOME)
            add_sums(x + start * channels, std::min(SOME, tokens - start), channels, own);
    }
}

// The gradient of m is of_z * by_z + m * by_m + rest, with of_z = ds * SiLU'(m * scale + shift).
// Computes the gradients of BatchNorm(e) and of the weights (threads, size², channels), and sums of the former for that norm.
template <class T>
void backward(const T* m, const T* ds, const float* const* norm2, const T* e, const float* const* norm1,
              const float* flipped, T* dz, float* dweight, double* sums, Shape s, long threads) {
    const float *scale2 = norm2[0], *shift2 = norm2[1], *by_z = norm2[2], *by_m = norm2[3], *rest = norm2[4];
    const float *scale1 = norm1[0], *shift1 = norm1[1], *mean1 = norm1[2];
    long some, step;
    s.divide(3, some, step);
    const long pieces = (s.channels + some - 1) / some, per_image = s.height * s.width, area = s.size * s.size;
#pragma omp parallel num_threads(threads)
    {
        double* own = sums + omp_get_thread_num() * 2 * s.channels;
        float* weights = dweight + omp_get_thread_num() * area * s.channels;
#pragma omp for schedule(static)
        for (long item = 0; item < s.batch * pieces; item++) {
            const long channel = item % pieces * some, count = std::min(some, s.channels - channel);
            const long block = map_size(step, s.width, s.size), image = item / pieces * per_image;
            Scratch& memory = scratch();
            const long many = step * s.width * LANES;
            if (!memory.begin(count / LANES * (2 * block + many) * 4 + 192)) continue;
            float* slopes = memory.take<float>(count / LANES * many);  // SiLU'(BatchNorm(e))
            float* input = memory.take<float>(count / LANES * block);
            float* grad = memory.take<float>(count / LANES * block);
            for (long top = 0; top < s.height; top += step) {
                const long bottom = std::min(s.height, top + step);
                s.fill(grad, block, channel, count, top, bottom, [&](long c, long position) {
                    const long at = (image + position) * s.channels + c;
                    soon(m + at, s.channels), soon(ds + at, s.channels);
                    Vec x = load(m + at), value;
                    Vec of_z = load(ds + at) * silu_gradient<T>(x * load(scale2 + c) + load(shift2 + c), value);
                    return of_z * load(by_z + c) + x * load(by_m + c) + load(rest + c);
                });
                s.fill(input, block, channel, count, top, bottom, [&](long c, long position) {
                    const T* from = e + (image + position) * s.channels + c;
                    soon(from, s.channels);
                    Vec value, slope = silu_gradient<T>(load(from) * load(scale1 + c) + load(shift1 + c), value);
                    const long own = position - top * s.width;  // outside the rows in the halo
                    if (own >= 0 && own < (bottom - top) * s.width)
                        store(slopes + (c - channel) / LANES * many + own * LANES, slope);
                    return value;
                });
                for (long c = 0; c < count; c += LANES) {
                    const float *x = input + c / LANES * block, *g = grad + c / LANES * block;
                    alignas(64) float found[49 * LANES];
                    for (long i = 0; i < area; i++) store(found + i * LANES, load(weights + i * s.channels + channel + c));
                    if (s.size == 3) gather_weights<3, 0, 3>(x, g, bottom - top, s.width, found);
                    if (s.size == 5) gather_weights<5, 0, 5>(x, g, bottom - top, s.width, found);
                    if (s.size == 7) gather_weights<7, 0, 4>(x, g, bottom - top, s.width, found);
                    if (s.size == 7) gather_weights<7, 4, 7>(x, g, bottom - top, s.width, found);
                    for (long i = 0; i < area; i++) store(weights + i * s.channels + channel + c, load(found + i * LANES));

                    const long start = (image + top * s.width) * s.channels + channel + c;
                    const Vec mean = load(mean1 + channel + c);
                    const float* slope = slopes + c / LANES * many;
                    Vec first{}, second{};
                    const auto take = [&](long token, Vec sum) {
                        const Vec of_z = sum * load(slope + token * LANES);
                        store(dz + start + token * s.channels, of_z);
                        first += of_z;
                        second += of_z * (load(e + start + token * s.channels) - mean);
                    };
                    const float* w = flipped + channel + c;
                    if (s.size == 3) convolve<3>(s.rows(g), bottom - top, s.width, w, s.channels, Vec{}, each_position(s.width, take));
                    if (s.size == 5) convolve<5>(s.rows(g), bottom - top, s.width, w, s.channels, Vec{}, each_position(s.width, take));
                    if (s.size == 7) convolve<7>(s.rows(g), bottom - top, s.width, w, s.channels, Vec{}, each_position(s.width, take));
                    for (int i = 0; i < LANES; i++) {
                        own[channel + c + i] += first[i];
                        own[s.channels + channel + c + i] += second[i];
                    }
                }
            }
        }
    }
}

// out = SiLU(x * scale + shift)
template <class T>
void bn_silu(const T* x, const float* scale, const float* shift, T* out, long tokens, long channels, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < tokens; i++)
        for (long c = 0; c < channels; c += LANES) {
            const long at = i * channels + c;
            store(out + at, silu<T>(load(x + at) * load(scale + c) + load(shift + c)));
        }
}

// Sums of dz and of dz * (x - mean), with dz = ds * SiLU'(x * scale + shift).
template <class T>
void bn_silu_backward_sums(const T* x, const T* ds, const float* scale, const float* shift, const float* mean, double* sums,
             long tokens, long channels, long threads) {
    sum_up(tokens, channels, sums, threads, [&](long c, long at, Vec& first, Vec& second) {
        soon(x + at, channels), soon(ds + at, channels);
        Vec value, before = load(x + at);
        Vec dz = load(ds + at) * silu_gradient<T>(before * load(scale + c) + load(shift + c), value);
        first += dz;
        second += dz * (before - load(mean + c));
    });
}

// dx = dz * by_z + x * by_x + rest, in place of dz
template <class T>
void bn_backward(T* dz, const T* x, const float* by_z, const float* by_x, const float* rest, long tokens, long channels,
            long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < tokens; i++)
        for (long c = 0; c < channels; c += LANES) {
            const long at = i * channels + c;
            store(dz + at, load(dz + at) * load(by_z + c) + load(x + at) * load(by_x + c) + load(rest + c));
        }
}

}  // namespace

#define TRAINING(SUFFIX, T)                                                                                            \
    extern "C" void channel_sums_##SUFFIX(const T* x, double* sums, long tokens, long channels, long threads) {             \
        channel_sums(x, sums, tokens, channels, threads);                                                                   \
    }                                                                                                                  \
    extern "C" void bn_silu_##SUFFIX(const T* x, const float* scale, const float* shift, T* out, long tokens,         \
                                      long channels, long threads) {                                                   \
        bn_silu(x, scale, shift, out, tokens, channels, threads);                                                     \
    }                                                                                                                  \
    extern "C" void bn_silu_backward_sums_##SUFFIX(const T* x, const T* ds, const float* scale, const float* shift,                  \
                                     const float* mean, double* sums, long tokens, long channels, long threads) {      \
        bn_silu_backward_sums(x, ds, scale, shift, mean, sums, tokens, channels, threads);                                           \
    }                                                                                                                  \
    extern "C" void bn_backward_##SUFFIX(T* dz, const T* x, const float* by_z, const float* by_x, const float* rest,        \
                                    long tokens, long channels, long threads) {                                        \
        bn_backward(dz, x, by_z, by_x, rest, tokens, channels, threads);                                                    \
    }                                                                                                                  \
    extern "C" void bn_silu_dwconv_forward_##SUFFIX(const T* e, const float* scale, const float* shift, const float* weight,   \
                                            T* m, T* activated, double* sums, long batch, long height, long width,     \
                                            long channels, long size, long threads) {                                  \
        forward(e, scale, shift, weight, m, activated, sums, Shape{batch, height, width, channels, size}, threads);    \
    }                                                                                                                  \
    extern "C" void bn_silu_dwconv_backward_##SUFFIX(                                                                          \
        const T* m, const T* ds, const float* scale2, const float* shift2, const float* by_z, const float* by_m,       \
        const float* rest, const T* e, const float* scale1, const float* shift1, const float* mean1,                   \
        const float* flipped, T* dz, float* dweight, double* sums, long batch, long height, long width, long channels,  \
        long size, long threads) {                                                                                     \
        const float *norm2[] = {scale2, shift2, by_z, by_m, rest}, *norm1[] = {scale1, shift1, mean1};                 \
        backward(m, ds, norm2, e, norm1, flipped, dz, dweight, sums, Shape{batch, height, width, channels, size},       \
                 threads);                                                                                             \
    }

TRAINING(fp32, float)
TRAINING(bf16, bf16)
